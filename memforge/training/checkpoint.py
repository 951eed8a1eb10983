"""Run directories and checkpoints: written whole or not at all, verified when read."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
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


def save_checkpoint(run_dir: Path, step: int, plan: Plan, model: nn.Module) -> Path:
    """Write `run_dir/step-<n>` with the weights and a manifest that holds their hash."""
    target = run_dir / f"step-{step:08d}"
    with replaced_directory(target) as directory:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, directory / WEIGHTS)
        manifest = {
            "format_version": FORMAT_VERSION,
            "memforge": __version__,
            "torch": torch.__version__,
            "step": step,
            "model_hash": plan.model.model_hash,
            "run_hash": plan.run.run_hash,
            "files": {WEIGHTS: file_sha256(directory / WEIGHTS)},
        }
        write_json(directory / MANIFEST, manifest)
    return target


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p.parent for p in run_dir.glob(f"step-*/{MANIFEST}"))


def load_weights(checkpoint: Path, plan: Plan) -> dict[str, Tensor]:
    """The verified tensors of a checkpoint. Raises StorageError when a file is missing, changed or foreign."""
    with storage_errors(checkpoint):
        try:
            manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
            version, model_hash, files = manifest["format_version"], manifest["model_hash"], manifest["files"]
        except (ValueError, KeyError, TypeError):
            raise StorageError(f"{checkpoint / MANIFEST}: damaged") from None
        if version != FORMAT_VERSION:
            raise StorageError(f"{checkpoint}: checkpoint format {version}; this memforge reads {FORMAT_VERSION}")
        if model_hash != plan.model.model_hash:
            raise StorageError(f"{checkpoint}: belongs to another model (its model hash is {model_hash[:12]})")
        if files.get(WEIGHTS) != file_sha256(checkpoint / WEIGHTS):
            raise StorageError(f"{checkpoint / WEIGHTS}: the content does not match its hash in {MANIFEST}")
        try:
            return load_file(checkpoint / WEIGHTS)
        except SafetensorError as error:
            raise StorageError(f"{checkpoint / WEIGHTS}: {error}") from None


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
    return plan, model.to(device).eval(), load_tokenizer(run_dir / TOKENIZER), found[-1]


def load_tokenizer(path: Path) -> Tokenizer:
    with storage_errors(path):
        text = path.read_text(encoding="utf-8")
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  the library raises nothing narrower
        raise StorageError(f"{path}: not a tokenizer: {error}") from None
