"""The model with its weights as a graph of plain torch ops: a .pt2 that runs where memforge is not installed."""

import warnings
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from memforge.errors import CheckFailedError, UsageError
from memforge.export.graph import exported
from memforge.machine import require_memory
from memforge.plan import ModelPlan
from memforge_kernels.decompositions import DECOMPOSITIONS, TooManyExpertsError

# The model, the file in memory before it is written, and the file read back.
COPIES = 3
# Largest difference of logits from the model's, as a share of the largest logit: rounding in fp32, through all layers.
MAX_DIFFERENCE = 1e-4


def require_room(plan: ModelPlan) -> None:
    """Raises DeviceError when the weights do not fit into main memory as often as an export holds them."""
    require_memory(COPIES * plan.weight_bytes(), f"exporting {COPIES} copies of the weights")


def aten_program(plan: ModelPlan, model: nn.Module) -> ExportedProgram:
    """The model in eval mode on the CPU, every memforge op replaced by plain torch; batch and length are dynamic.

    Raises UsageError for more experts than a graph of plain ops can list.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its pytrees
        try:
            program = exported(plan, model).run_decompositions(DECOMPOSITIONS)
        except TooManyExpertsError as error:  # torch adds lines on where it was
            raise UsageError(str(error).split("\n")[0]) from None
    left = sorted({str(node.target) for node in program.graph.nodes if "memforge" in str(node.target)})
    assert not left, f"no decomposition for {', '.join(left)}"
    return program


def logit_difference(file: Path, plan: ModelPlan, model: nn.Module) -> float:
    """The largest difference between the logits of the saved graph and of the model, on a small random batch.

    Raises CheckFailedError when it is more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(plan.vocab_size, (3, min(7, plan.max_seq_len)), generator=generator)
    with torch.no_grad():
        ours, theirs = model(tokens)[0], torch.export.load(file).module()(tokens)[0]
    difference = float((ours - theirs).abs().max())
    if not difference <= MAX_DIFFERENCE * float(ours.abs().max()):
        raise CheckFailedError(f"the exported graph's logits differ from the model's by {difference:g}")
    return difference
