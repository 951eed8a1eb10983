"""The build directory: plan, cost, graphs, and a manifest of them."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from memforge import __version__
from memforge.build import build_model
from memforge.cost import estimate
from memforge.errors import StorageError
from memforge.export.aten import aten_program, logit_difference, require_room
from memforge.export.graph import export_graph, pt2_bytes, readable
from memforge.export.kernels import kernel_configs
from memforge.mesh import Mesh
from memforge.parity import claimed, report_seq_len
from memforge.plan import Plan
from memforge.profile.counter import require_exact
from memforge.report.cost import cost_record
from memforge.report.html import profile_page
from memforge.storage import file_sha256, replaced_directory, write_json
from memforge.training.checkpoint import open_run

FORMAT_VERSION = 1
# The .pt2 files are zip archives in which torch writes its own identifiers; the rest is the same byte for byte.
FILES = {
    "plan.json": True,
    "cost.json": True,
    "report.html": True,
    "graph.py": True,
    "kernels.json": True,
    "model.pt2": False,
}
ATEN = {"model.aten.pt2": False}


@dataclass(frozen=True)
class Weights:
    """The weights of an export: the newest checkpoint of a run, or what a seed gives (by default train.seed)."""

    seed: int | None = None
    run: Path | None = None


def write_build(
    plan: Plan,
    out: Path,
    *,
    aten: Weights | None = None,
    mesh: Mesh | None = None,
    targets: list[str] | None = None,
) -> dict[str, Any]:
    """Write the build directory of a plan and return its manifest.

    `targets` are GPUs that the kernels are compiled for, so that kernels.json says what they take there. With `aten`
    the model is also exported with those weights as plain torch ops, to run without memforge.
    `out` is replaced if it is a build directory. Raises StorageError if it is anything else that is not empty,
    CheckFailedError if the model does not have the parameters and FLOPs of the ledger, and DeviceError if the weights
    to export do not fit into memory.
    """
    if out.is_symlink() or (out.exists() and not _is_replaceable(out)):
        raise StorageError(f"{out}: exists and is not a build directory; choose another --out")
    if aten is not None:
        require_room(plan.model)
    counted = require_exact(plan.model)
    given = {"pools": plan.run.parallel.pools, "update": plan.run.pool_update}
    cost = estimate(plan.model, seq_len=report_seq_len(plan), mesh=mesh, **given)
    parity, kernels = claimed(plan), kernel_configs(plan, targets)
    program = export_graph(plan.model)
    with replaced_directory(out) as directory:
        (directory / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        record = cost_record(plan.name, cost.as_dict(), [parity] if parity else [])
        write_json(directory / "cost.json", record)
        (directory / "report.html").write_text(profile_page(record), encoding="utf-8")
        write_json(directory / "kernels.json", {"kernels": kernels})
        (directory / "graph.py").write_text(readable(program, plan.name), encoding="utf-8")
        (directory / "model.pt2").write_bytes(pt2_bytes(program))
        emitted = _emit_aten(plan, directory, aten) if aten is not None else None
        names = FILES | (ATEN if aten is not None else {})
        manifest = _manifest(plan, directory, names) | {"counter": counted, "aten": emitted}
        write_json(directory / "manifest.json", manifest)
    return manifest


def _manifest(plan: Plan, directory: Path, names: Mapping[str, bool]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "name": plan.name,
        "model_hash": plan.model.model_hash,
        "run_hash": plan.run.run_hash,
        "versions": {"memforge": __version__, "python": platform.python_version(), "torch": version("torch")},
        "files": {
            name: {"sha256": file_sha256(directory / name), "byte_identical": same} for name, same in names.items()
        },
    }


def _emit_aten(plan: Plan, directory: Path, weights: Weights) -> dict[str, Any]:
    """Write model.aten.pt2 and say where its weights come from and how far its logits are from the model's."""
    model, origin = _weighted(plan, weights)
    file = directory / "model.aten.pt2"
    file.write_bytes(pt2_bytes(aten_program(plan.model, model)))
    return {"weights": origin, "largest_logit_difference": logit_difference(file, plan.model, model)}


def _weighted(plan: Plan, weights: Weights) -> tuple[nn.Module, str]:
    """The model with its weights, and what they are. Raises StorageError for a run of another model."""
    if weights.run is not None:
        trained, model, _, checkpoint = open_run(weights.run, "cpu")
        if trained.model.model_hash != plan.model.model_hash:
            raise StorageError(f"{weights.run}: its model is not the one of this spec (the model hashes differ)")
        return model, checkpoint.name
    seed = weights.seed
    if seed is None:
        seed = plan.run.train.seed if plan.run.train is not None else 0
    return build_model(plan.model, seed=seed).requires_grad_(False), f"seed {seed}"


def _is_replaceable(out: Path) -> bool:
    """Whether `out` is an empty directory, or one that holds a build and nothing else."""
    if not out.is_dir():
        return False
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return True
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"].keys()
        return names <= {"manifest.json", *files} and "plan.json" in files and files <= {*FILES, *ATEN}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
