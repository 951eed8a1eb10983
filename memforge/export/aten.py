"""The model with its weights as a graph of plain torch ops: a .pt2 that runs where memforge is not installed."""

import io
import warnings

import torch
from torch import nn
from torch.export import ExportedProgram

from memforge.errors import CheckFailedError, DeviceError, UsageError
from memforge.export.graph import dynamic_shapes
from memforge.machine import machine_memory
from memforge.plan import ModelPlan
from memforge_kernels.decompositions import DECOMPOSITIONS

# The module, the graph's constants, and the file in memory before it is written.
COPIES = 3


def require_room(plan: ModelPlan) -> None:
    """Raises DeviceError when the weights do not fit into main memory as often as an export holds them."""
    weights = plan.weight_bytes()
    if COPIES * weights > (available := machine_memory()):
        raise DeviceError(
            f"exporting {weights / 1e9:,.1f} GB of weights holds {COPIES} copies of them; "
            f"this machine has {available / 1e9:,.1f} GB"
        )


def aten_program(plan: ModelPlan, model: nn.Module) -> ExportedProgram:
    """The model in eval mode on the CPU, every memforge op replaced by plain torch; batch and length are dynamic.

    Raises UsageError when an op has no such form at its size.
    """
    tokens = torch.zeros(2, min(2, plan.max_seq_len), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its pytrees
        program = torch.export.export(model.eval(), (tokens,), dynamic_shapes=(dynamic_shapes(plan),))
        try:
            program = program.run_decompositions(DECOMPOSITIONS)
        except ValueError as error:  # a decomposition says what it cannot hold; torch adds where it was
            raise UsageError(str(error).split("\n")[0]) from None
    left = sorted({str(node.target) for node in program.graph.nodes if "memforge" in str(node.target)})
    assert not left, f"no decomposition for {', '.join(left)}"
    return program


def saved_and_checked(program: ExportedProgram, plan: ModelPlan, model: nn.Module) -> tuple[bytes, float]:
    """The .pt2 file, and the largest difference of its logits from the model's on a random batch.

    Raises CheckFailedError when they differ by more than rounding.
    """
    buffer = io.BytesIO()  # through memory: on a full disk torch's own writer ends the process
    torch.export.save(program, buffer)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(plan.vocab_size, (3, min(7, plan.max_seq_len)), generator=generator)
    with torch.no_grad():
        ours, theirs = model(tokens)[0], program.module()(tokens)[0]
    difference = float((ours - theirs).abs().max())
    if not difference <= 1e-4 * float(ours.abs().max()):
        raise CheckFailedError(f"the exported graph's logits differ from the model's by {difference:g}")
    return buffer.getvalue(), difference
