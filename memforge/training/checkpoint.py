"""Run directories and checkpoints: written whole or not at all, verified when read."""

import re
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from memforge import __version__
from memforge.build import build_model
from memforge.errors import StorageError
from memforge.plan import Plan, read_plan
from memforge.storage import file_sha256, replaced_directory, storage_errors, write_json

FORMAT_VERSION = 1
PLAN, TOKENIZER, METRICS, SUMMARY = "plan.json", "tokenizer.json", "metrics.jsonl", "summary.json"
WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"
_STEP = re.compile(r"step-([0-9]{8,})")


class Record(BaseModel):
    """A JSON file of a run: strict, and newer fields are let through."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class Manifest(Record):
    """What a checkpoint holds; it is written last."""

    format_version: int
    memforge: str
    torch: str
    step: int
    model_hash: str
    run_hash: str
    tokenizer_sha256: str
    files: dict[str, str]


class Summary(Record):
    """What a run was and what came of it; `final` is its last row of metrics."""

    name: str
    model_hash: str
    steps: int
    epochs: float
    params: int
    active_params: int
    flops_per_token: int | float
    data: dict[str, int | float | str]
    baselines: dict[str, float]
    final: dict[str, int | float]
    training_seconds: float
    checkpoint: str
    ended: Literal["done", "interrupted", "non-finite"]
    exposures_per_fact: float | None = None
    caveats: list[str] = []


_R = TypeVar("_R", bound=Record)


def read_record(path: Path, kind: type[_R]) -> _R:
    """The record in a file. Raises StorageError when it is absent or damaged."""
    with storage_errors(path):
        raw = path.read_bytes()
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise StorageError(f"{path}: damaged" + (f" at `{where}`" if where else "")) from None


def save_checkpoint(run_dir: Path, step: int, plan: Plan, model: nn.Module) -> Path:
    """Write `run_dir/step-<n>` with the weights and a manifest that holds their hash."""
    target = run_dir / f"step-{step:08d}"
    with replaced_directory(target) as directory:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, directory / WEIGHTS)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            memforge=__version__,
            torch=str(torch.__version__),
            step=step,
            model_hash=plan.model.model_hash,
            run_hash=plan.run.run_hash,
            tokenizer_sha256=file_sha256(run_dir / TOKENIZER),
            files={WEIGHTS: file_sha256(directory / WEIGHTS)},
        )
        write_json(directory / MANIFEST, manifest.model_dump())
    return target


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(m, p.parent) for p in run_dir.glob(f"step-*/{MANIFEST}") if (m := _STEP.fullmatch(p.parent.name))]
    return [path for _, path in sorted((int(m[1]), path) for m, path in found)]


def load_weights(checkpoint: Path, plan: Plan) -> dict[str, Tensor]:
    """The verified tensors of a checkpoint. Raises StorageError when a file is missing, changed or foreign."""
    manifest = read_record(checkpoint / MANIFEST, Manifest)
    if manifest.format_version != FORMAT_VERSION:
        raise StorageError(f"{checkpoint}: format {manifest.format_version}; this memforge reads {FORMAT_VERSION}")
    if manifest.model_hash != plan.model.model_hash:
        raise StorageError(f"{checkpoint}: belongs to another model (its model hash is {manifest.model_hash[:12]})")
    with storage_errors(checkpoint):
        _require_hash(checkpoint / WEIGHTS, manifest.files.get(WEIGHTS))
        _require_hash(checkpoint.parent / TOKENIZER, manifest.tokenizer_sha256)
        return load_file(checkpoint / WEIGHTS)


def _require_hash(path: Path, expected: str | None) -> None:
    if file_sha256(path) != expected:
        raise StorageError(f"{path}: the content does not match its hash in the checkpoint's {MANIFEST}")


def open_run(run_dir: Path, device: str) -> tuple[Plan, nn.Module, Tokenizer, Path]:
    """Plan, model in eval mode, tokenizer and the newest checkpoint of a run. Raises StorageError."""
    if not run_dir.is_dir():
        raise StorageError(f"{run_dir}: no such run directory")
    plan = read_plan(run_dir / PLAN)
    found = checkpoints(run_dir)
    if not found:
        raise StorageError(f"{run_dir}: holds no checkpoint")
    state = load_weights(found[-1], plan)
    model = build_model(plan.model, device="meta")
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)
    return plan, model.to(device).eval(), _read_tokenizer(run_dir / TOKENIZER), found[-1]


def is_run(path: Path) -> bool:
    """Whether a directory is a run of memforge and holds nothing else, so that it may be overwritten."""
    if path.is_symlink() or not path.is_dir():
        return False
    known = {PLAN, TOKENIZER, METRICS, SUMMARY}
    names = {entry.name for entry in path.iterdir()}
    ours = {name for name in names if name in known or _STEP.fullmatch(name) or name.startswith(".tmp-step-")}
    if not {PLAN, TOKENIZER} <= names or names > ours:
        return False
    try:
        read_plan(path / PLAN)
    except StorageError:
        return False
    return True


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    with storage_errors(run_dir):
        write_json(run_dir / SUMMARY, Summary.model_validate(summary).model_dump(exclude_none=True))


def _read_tokenizer(path: Path) -> Tokenizer:
    with storage_errors(path):
        text = path.read_text(encoding="utf-8")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  the library raises nothing narrower
        raise StorageError(f"{path}: not a tokenizer: {error}") from None
