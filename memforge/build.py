"""From a plan to tensors: the module, and the build directory with its exported graph."""

import io
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

from memforge import __version__
from memforge.cost import estimate
from memforge.errors import CheckFailedError, StorageError
from memforge.nn.decoder import Decoder
from memforge.nn.init import fill
from memforge.parity import claimed
from memforge.plan import ModelPlan, Plan
from memforge.storage import file_sha256, replaced_directory, write_json
from memforge_kernels import FLOP_FORMULAS

FORMAT_VERSION = 1
# model.pt2 is a zip archive in which torch writes its own identifiers; the rest is the same byte for byte.
REPRODUCIBLE = {"plan.json": True, "cost.json": True, "graph.py": True, "model.pt2": False}
COUNTED_BATCH, COUNTED_SEQ_LEN = 2, 32


def build_model(plan: ModelPlan, *, seed: int = 0, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a plan, initialised from `seed`: equal plans and seeds give bit-equal weights.

    On device "meta" nothing is allocated and nothing initialised.
    """
    with torch.device("meta"):
        model = Decoder(plan)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    for row in plan.params:
        fill(model.get_parameter(row.path), row.init, seed, row.path)
    return model


def export_graph(plan: ModelPlan) -> ExportedProgram:
    """The model in eval mode, exported on meta with dynamic batch and sequence length; memforge ops stay visible."""
    model = build_model(plan, device="meta").eval()
    tokens = torch.zeros(2, min(2, plan.max_seq_len), dtype=torch.int64, device="meta")
    shapes: dict[int, Any] = {0: Dim("batch")}
    if plan.max_seq_len > 2:
        shapes[1] = Dim("seq_len", max=plan.max_seq_len)
    return torch.export.export(model, (tokens,), dynamic_shapes=(shapes,))


def count_flops(plan: ModelPlan, batch: int, seq_len: int) -> tuple[int, int]:
    """Forward and backward FLOPs as torch's FlopCounterMode sees them on the meta model in training mode."""
    model = build_model(plan, device="meta").train()
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        logits, losses = model(tokens)
        forward = counter.get_total_flops()
        (logits.sum() + sum(losses.values())).backward()
    return forward, counter.get_total_flops() - forward


def require_exact(plan: ModelPlan) -> dict[str, Any]:
    """The ledger beside the built model: same parameters, same executed FLOPs. Raises CheckFailedError otherwise."""
    batch, seq_len = COUNTED_BATCH, min(COUNTED_SEQ_LEN, plan.max_seq_len)
    ledger = estimate(plan, batch=batch, seq_len=seq_len).flops(executed=True)
    counter = count_flops(plan, batch, seq_len)
    model = build_model(plan, device="meta")
    built = {(name, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in model.named_parameters()}
    planned = {(row.path, row.shape, row.dtype) for row in plan.params}
    if buffers := [name for name, _ in model.named_buffers()]:
        raise CheckFailedError(f"buffers have no row in the plan and would start undefined: {', '.join(buffers)}")
    if built != planned:
        differing = ", ".join(sorted(str(row) for row in built ^ planned)[:6])
        raise CheckFailedError(f"the model does not have the parameters of its plan: {differing}")
    if ledger != counter:
        raise CheckFailedError(
            f"the ledger's executed FLOPs {ledger} (forward, backward) differ from the counter's {counter}"
        )
    return {"batch": batch, "seq_len": seq_len, "forward": counter[0], "backward": counter[1], "equal": True}


def write_build(plan: Plan, out: Path) -> dict[str, Any]:
    """Write the build directory of a plan and return its manifest.

    `out` is replaced if it is a build directory. Raises StorageError if it is anything else that is not empty, and
    CheckFailedError if the model does not have the parameters and FLOPs of the ledger.
    """
    if out.is_symlink() or (out.exists() and not _is_replaceable(out)):
        raise StorageError(f"{out}: exists and is not a build directory; choose another --out")
    counted = require_exact(plan.model)
    program = export_graph(plan.model)
    parity = claimed(plan)
    with replaced_directory(out) as directory:
        (directory / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        cost = estimate(plan.model).as_dict()
        write_json(directory / "cost.json", cost | {"parity": parity.as_dict() if parity else None})
        (directory / "graph.py").write_text(readable(program), encoding="utf-8")
        for node in program.graph.nodes:  # source positions of this machine; graph.py has them without directories
            node.meta.pop("stack_trace", None)
        # Through memory: on a full disk torch's own writer ends the process.
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        (directory / "model.pt2").write_bytes(buffer.getvalue())
        manifest = {
            "format_version": FORMAT_VERSION,
            "name": plan.name,
            "model_hash": plan.model.model_hash,
            "run_hash": plan.run.run_hash,
            "versions": {
                "memforge": __version__,
                "python": platform.python_version(),
                "torch": version("torch"),
            },
            "counter": counted,
            "files": {
                name: {"sha256": file_sha256(directory / name), "byte_identical": same}
                for name, same in REPRODUCIBLE.items()
            },
        }
        write_json(directory / "manifest.json", manifest)
    return manifest


def _is_replaceable(out: Path) -> bool:
    """Whether `out` is an empty directory, or one that holds a build and nothing else."""
    if not out.is_dir():
        return False
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return True
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        return names <= {"manifest.json", *REPRODUCIBLE} and manifest["files"].keys() == REPRODUCIBLE.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def readable(program: ExportedProgram) -> str:
    """The exported graph as annotated Python, with source comments that name files inside their packages only."""
    text = program.graph_module.print_readable(print_output=False)
    return re.sub(r"# File: \S*?/((?:memforge|memforge_kernels|torch)/\S+:\d+)", r"# \1", text) + "\n"
