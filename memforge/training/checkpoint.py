"""Checkpoints: all state of a run after a step, written whole or not at all, verified when read.

A checkpoint is a directory `step-<n>`. Its files are written to a temporary directory and flushed; their hashes go into
a manifest, which is sealed by its own and written last; then the directory is renamed, read back, and only then is an
older one deleted. No checkpoint is ever overwritten.
"""

import hashlib
import json
import secrets
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from memforge import __version__
from memforge.build import build_model
from memforge.errors import DamagedError, NonFiniteError, StorageError
from memforge.plan import Plan, read_plan
from memforge.report.cost import si
from memforge.storage import file_sha256, replaced_directory, storage_errors, sync, write_json
from memforge.training.run_directory import (
    FORMAT_VERSION,
    PLAN,
    STEP,
    TOKENIZER,
    Record,
    read_record,
    read_tokenizer,
    run_id,
)

MANIFEST, WEIGHTS = "manifest.json", "model.safetensors"
# Beside the tensors: headers, manifest, directory blocks.
OVERHEAD_BYTES = 2**20


class LogMark(Record):
    """How far a log had been written, and the hash of that much of it."""

    bytes: int
    sha256: str


class Manifest(Record):
    """What a checkpoint holds; it is written last. `seal` is the hash of all the rest."""

    format_version: int
    run_id: str
    memforge: str
    torch: str
    step: int
    model_hash: str
    run_hash: str
    tokenizer_sha256: str
    corpus_sha256: str
    files: dict[str, str]
    logs: dict[str, LogMark]
    state: dict[str, Any]
    seal: str = ""

    def sealed(self) -> "Manifest":
        return self.model_copy(update={"seal": self.hash_of_the_rest()})

    def hash_of_the_rest(self) -> str:
        text = json.dumps(self.model_dump(exclude={"seal"}), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RunIdentity:
    """What the checkpoints of one run have in common."""

    run_id: str
    plan: Plan
    tokenizer_sha256: str
    corpus_sha256: str


@dataclass(frozen=True)
class Snapshot:
    """All state after a step: tensors by file and name, and what is no tensor."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, LogMark] = field(default_factory=dict)

    def copied(self) -> "Snapshot":
        """The same in memory of its own."""
        return replace(self, tensors={file: _copies(tensors) for file, tensors in self.tensors.items()})

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for tensors in self.tensors.values() for t in tensors.values())

    def not_finite(self) -> str | None:
        """The name of a tensor that holds a NaN or an infinity."""
        named = ((name, t) for tensors in self.tensors.values() for name, t in tensors.items())
        return next((name for name, t in named if not _is_finite(t)), None)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _is_finite(tensor: Tensor) -> bool:
    """Extremes carry any NaN and take no memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax())


def save_checkpoint(run_dir: Path, snapshot: Snapshot, run: RunIdentity) -> Path:
    """Write `run_dir/step-<n>` and read it back.

    Raises NonFiniteError for state that is not worth keeping, StorageError, with nothing of it left behind, where it
    cannot be written.
    """
    target = run_dir / f"step-{snapshot.step:08d}"
    if (name := snapshot.not_finite()) is not None:
        raise NonFiniteError(f"{target}: not saved, since {name} is not finite")
    _require_room(target, snapshot.bytes + OVERHEAD_BYTES)
    if target.exists():
        raise StorageError(f"{target}: exists already, and checkpoints are never overwritten")
    with replaced_directory(target) as directory:
        files = {f"{file}.safetensors": tensors for file, tensors in snapshot.tensors.items() if tensors}
        for name, tensors in files.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, directory / name)
            sync(directory / name)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            run_id=run.run_id,
            memforge=__version__,
            torch=str(torch.__version__),
            step=snapshot.step,
            model_hash=run.plan.model.model_hash,
            run_hash=run.plan.run.run_hash,
            tokenizer_sha256=run.tokenizer_sha256,
            corpus_sha256=run.corpus_sha256,
            files={name: file_sha256(directory / name) for name in files},
            logs=snapshot.logs,
            state=snapshot.state,
        )
        write_json(directory / MANIFEST, manifest.sealed().model_dump())
    verify(target)
    return target


def _require_room(target: Path, needed: int) -> None:
    with storage_errors(target):
        free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise StorageError(f"{target}: takes {si(needed, 'B')}; the disk has {si(free, 'B')} left")


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run by name, oldest first; whether they are sound is for `verify` to say."""
    with storage_errors(run_dir):
        found = [(m, p) for p in run_dir.glob("step-*") if (m := STEP.fullmatch(p.name))]
    return [path for _, path in sorted((int(m[1]), path) for m, path in found)]


def verify(checkpoint: Path, *files: str) -> Manifest:
    """The manifest of a checkpoint whose files, or those named, are what was written.

    Raises StorageError with the file and the reason.
    """
    if not checkpoint.is_dir():
        raise StorageError(f"{checkpoint}: no such checkpoint")
    manifest = read_record(checkpoint / MANIFEST, Manifest, exact=True)
    if manifest.format_version != FORMAT_VERSION:
        raise StorageError(f"{checkpoint}: format {manifest.format_version}; this memforge reads {FORMAT_VERSION}")
    if manifest.seal != manifest.hash_of_the_rest():
        raise DamagedError(f"{checkpoint / MANIFEST}: was changed after it was written (its seal does not match)")
    if (found := STEP.fullmatch(checkpoint.name)) is None or int(found[1]) != manifest.step:
        raise DamagedError(f"{checkpoint}: holds step {manifest.step}")
    for name in files or manifest.files:
        _require_hash(checkpoint / name, manifest.files.get(name))
    return manifest


def _require_hash(path: Path, expected: str | None) -> None:
    with storage_errors(path):
        try:
            actual = file_sha256(path)
        except FileNotFoundError as error:
            raise DamagedError(f"{path}: {error.strerror}") from None
    if actual != expected:
        raise DamagedError(f"{path}: the content does not match its hash in the checkpoint's {MANIFEST}")


def require_same_run(checkpoint: Path, manifest: Manifest) -> None:
    """Raises StorageError for a checkpoint that belongs to another run, or whose tokenizer has changed."""
    run_dir = checkpoint.parent
    if manifest.run_id != run_id(run_dir):
        raise DamagedError(f"{checkpoint}: belongs to another run (run id {manifest.run_id[:12]})")
    _require_hash(run_dir / TOKENIZER, manifest.tokenizer_sha256)


def load_tensors(checkpoint: Path, file: str) -> dict[str, Tensor]:
    """The tensors of one file that was verified; none if it was not written."""
    path = checkpoint / f"{file}.safetensors"
    with storage_errors(path):
        return load_file(path) if path.exists() else {}


def load_weights(checkpoint: Path, plan: Plan) -> dict[str, Tensor]:
    """The verified weights of a checkpoint. Raises StorageError when a file is missing, changed or foreign."""
    manifest = verify(checkpoint, WEIGHTS)
    require_same_run(checkpoint, manifest)
    if manifest.model_hash != plan.model.model_hash:
        raise StorageError(f"{checkpoint}: belongs to another model (its model hash is {manifest.model_hash[:12]})")
    return load_tensors(checkpoint, "model")


def newest_sound(run_dir: Path, found: list[Path], note: Callable[[str], None]) -> tuple[Path, Manifest]:
    """The newest checkpoint that verifies; `note` is told about every one that is damaged.

    Raises StorageError where there is none, and for what is not damage and may pass: an older one would cost steps.
    """
    for checkpoint in reversed(found):
        try:
            manifest = verify(checkpoint)
            require_same_run(checkpoint, manifest)
        except DamagedError as error:
            note(f"warning: {error}; trying the one before")
            continue
        return checkpoint, manifest
    raise StorageError(f"{run_dir}: holds no sound checkpoint" if found else f"{run_dir}: holds no checkpoint")


def set_aside(checkpoint: Path, why: str) -> Path:
    """Give a checkpoint a name under which it is no longer found: `.bad-step-..` or `.abandoned-step-..`."""
    aside = checkpoint.with_name(f".{why}-{checkpoint.name}-{secrets.token_hex(4)}")
    with storage_errors(checkpoint):
        checkpoint.rename(aside)
        sync(checkpoint.parent)
    return aside


class Saver:
    """Saves snapshots of one run and deletes old ones: at once, or in a thread from a copy."""

    def __init__(self, run_dir: Path, run: RunIdentity, *, keep: int, in_background: bool) -> None:
        self.run_dir, self.run, self.keep, self.in_background = run_dir, run, keep, in_background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Save the state as it is now. Raises what the save, or the one before in the background, has failed with."""
        self.wait()
        if not self.in_background:
            self._save(snapshot)
            return
        # Not waited for by a process that is told twice to stop: what is half written has another name.
        given = {"args": (snapshot.copied(),), "name": "checkpoint", "daemon": True}
        self._thread = threading.Thread(target=self._in_thread, **given)  # type: ignore[arg-type]
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what a save in the background has failed with, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _in_thread(self, snapshot: Snapshot) -> None:
        try:
            self._save(snapshot)
        except BaseException as error:  # noqa: BLE001  raised again in the thread that trains
            self._error = error

    def _save(self, snapshot: Snapshot) -> None:
        save_checkpoint(self.run_dir, snapshot, self.run)
        # The newest has just been read back, so what stays is never without a sound one.
        for old in checkpoints(self.run_dir)[: -self.keep]:
            # Under another name first: what is half deleted must not pass for a checkpoint.
            shutil.rmtree(set_aside(old, "tmp"), ignore_errors=True)


def open_run(run_dir: Path, device: str) -> tuple[Plan, nn.Module, Tokenizer, Path]:
    """Plan, model in eval mode, tokenizer and the newest checkpoint of a run. Raises StorageError."""
    run_id(run_dir)
    plan = read_plan(run_dir / PLAN)
    found = checkpoints(run_dir)
    if not found:
        raise StorageError(f"{run_dir}: holds no checkpoint")
    state = load_weights(found[-1], plan)
    model = build_model(plan.model, device="meta")
    model.load_state_dict(state, strict=True, assign=True)
    model.requires_grad_(False)
    return plan, model.to(device).eval(), read_tokenizer(run_dir), found[-1]
