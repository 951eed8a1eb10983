"""Checkpoints: all state of a run after a step, written whole or not at all, verified when read.

A checkpoint is a directory `step-<n>`. Its files, of each rank those of its part of the state, are written to a
temporary directory and flushed; when all ranks have written theirs, their hashes go into a manifest, which is sealed by
its own and written last; then the directory is renamed, read back, and only then is an older one deleted. No checkpoint
is ever overwritten.
"""

import hashlib
import json
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from memforge import __version__
from memforge.build import build_model
from memforge.errors import DamagedError, NonFiniteError, StorageError
from memforge.plan import Plan, read_plan
from memforge.report.cost import si
from memforge.storage import file_sha256, replaced_directory, storage_errors, sync, write_json
from memforge.training.ranks import ALONE, Ranks
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
from memforge.training.stored import Cut, Stored

MANIFEST = "manifest.json"
# Beside the tensors: headers, manifest, directory blocks.
OVERHEAD_BYTES = 2**20


class LogMark(Record):
    """How far a log had been written, and the hash of that much of it."""

    bytes: int
    sha256: str


class Manifest(Record):
    """What a checkpoint holds; it is written last. `seal` is the hash of all the rest.

    `files` has the hash of each file, `cuts`, of files with parts of tensors, which parts those are.
    """

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
    cuts: dict[str, dict[str, Cut]]
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
    """All state after a step that this rank has to write: tensors by file and name, and what is no tensor.

    `cuts` tells, by file and name, of what part of a tensor it is.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, LogMark] = field(default_factory=dict)
    cuts: dict[str, dict[str, Cut]] = field(default_factory=dict)

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


def save_checkpoint(run_dir: Path, snapshot: Snapshot, run: RunIdentity, ranks: Ranks = ALONE) -> Path:
    """Write `run_dir/step-<n>` and read it back: of all ranks, or of none.

    Raises NonFiniteError for state that is not worth keeping, StorageError where it cannot be written, with nothing of
    it left behind, or is not read as it was written, with all of it under another name.
    """
    target = run_dir / f"step-{snapshot.step:08d}"
    ranks.all_or_none(lambda: _require_finite(target, snapshot))
    ranks.first(lambda: _require_new(target))
    _require_room(target, sum(ranks.gather(snapshot.bytes)) + OVERHEAD_BYTES, ranks)
    with ranks.first_enters(lambda: replaced_directory(target)) as directory:
        written = ranks.gather(ranks.all_or_none(lambda: _write_files(directory, snapshot, ranks)))
        ranks.first(lambda: _write_manifest(directory, snapshot, run, written))
    try:
        ranks.all_or_none(lambda: require_files(target, read_manifest(target), written[ranks.rank][0]))
    except StorageError:
        ranks.first(lambda: set_aside(target, "bad"))
        raise
    return target


# The hashes of the files that a rank has written, and what parts of tensors are in them.
Written = tuple[dict[str, str], dict[str, dict[str, Cut]]]


def _require_finite(target: Path, snapshot: Snapshot) -> None:
    if (name := snapshot.not_finite()) is not None:
        raise NonFiniteError(f"{target}: not saved, since {name} is not finite")


def _require_new(target: Path) -> None:
    """For the first rank, which renames to it: a network file system may tell the others an old answer for a while."""
    if target.exists():
        raise StorageError(f"{target}: exists already, and checkpoints are never overwritten")


def _write_files(directory: Path, snapshot: Snapshot, ranks: Ranks) -> Written:
    part = "" if ranks.size == 1 else f"-{ranks.rank:05d}-of-{ranks.size:05d}"
    files = {f"{file}{part}.safetensors": tensors for file, tensors in snapshot.tensors.items() if tensors}
    with storage_errors(directory):
        for name, tensors in files.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, directory / name)
            sync(directory / name)
        cuts = {f"{file}{part}.safetensors": found for file, found in snapshot.cuts.items() if found}
        return {name: file_sha256(directory / name) for name in files}, cuts


def _write_manifest(directory: Path, snapshot: Snapshot, run: RunIdentity, written: list[Written]) -> None:
    with storage_errors(directory):
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
            files={name: sha256 for files, _ in written for name, sha256 in files.items()},
            cuts={name: found for _, cuts in written for name, found in cuts.items()},
            logs=snapshot.logs,
            state=snapshot.state,
        )
        write_json(directory / MANIFEST, manifest.sealed().model_dump())


def _require_room(target: Path, needed: int, ranks: Ranks) -> None:
    def check() -> None:
        with storage_errors(target):
            free = shutil.disk_usage(target.parent).free
        if free < needed:
            raise StorageError(f"{target}: takes {si(needed, 'B')}; the disk has {si(free, 'B')} left")

    ranks.all_or_none(check)


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run by name, oldest first; whether they are sound is for `verify` to say."""
    with storage_errors(run_dir):
        found = [(m, p) for p in run_dir.glob("step-*") if (m := STEP.fullmatch(p.name))]
    return [path for _, path in sorted((int(m[1]), path) for m, path in found)]


def verify(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose files are what was written.

    Raises StorageError with the file and the reason.
    """
    manifest = read_manifest(checkpoint)
    require_files(checkpoint, manifest, manifest.files)
    return manifest


def require_files(checkpoint: Path, manifest: Manifest, files: Iterable[str]) -> None:
    """Raises StorageError for the first that is not what was written."""
    for name in files:
        _require_hash(checkpoint / name, manifest.files.get(name))


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint, which is what was written; its files may be anything. Raises StorageError."""
    if not checkpoint.is_dir():
        raise StorageError(f"{checkpoint}: no such checkpoint")
    manifest = read_record(checkpoint / MANIFEST, Manifest, exact=True)
    if manifest.format_version != FORMAT_VERSION:
        raise StorageError(f"{checkpoint}: format {manifest.format_version}; this memforge reads {FORMAT_VERSION}")
    if manifest.seal != manifest.hash_of_the_rest():
        raise DamagedError(f"{checkpoint / MANIFEST}: was changed after it was written (its seal does not match)")
    if (found := STEP.fullmatch(checkpoint.name)) is None or int(found[1]) != manifest.step:
        raise DamagedError(f"{checkpoint}: holds step {manifest.step}")
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


def stored(checkpoint: Path, manifest: Manifest, kind: str) -> Stored:
    """The tensors of a kind, "model", "optimizer", .., in the files of a checkpoint that were verified."""
    return Stored([checkpoint / name for name in _files_of(manifest, kind)], manifest.cuts)


def _files_of(manifest: Manifest, kind: str) -> list[str]:
    return [name for name in manifest.files if re.fullmatch(rf"{kind}(-[0-9]+-of-[0-9]+)?\.safetensors", name)]


def load_weights(checkpoint: Path, plan: Plan) -> dict[str, Tensor]:
    """The verified weights of a checkpoint. Raises StorageError when a file is missing, changed or foreign."""
    manifest = read_manifest(checkpoint)
    require_same_run(checkpoint, manifest)
    if manifest.model_hash != plan.model.model_hash:
        raise StorageError(f"{checkpoint}: belongs to another model (its model hash is {manifest.model_hash[:12]})")
    require_files(checkpoint, manifest, _files_of(manifest, "model"))
    tensors = stored(checkpoint, manifest, "model")
    return {name: tensors.read(name) for name in tensors}


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

    def __init__(
        self, run_dir: Path, run: RunIdentity, *, keep: int, in_background: bool, ranks: Ranks = ALONE
    ) -> None:
        self.run_dir, self.run, self.keep, self.in_background = run_dir, run, keep, in_background
        self.ranks = ranks
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

    @property
    def has_failed(self) -> bool:
        """Whether a save in the background has, and nobody knows yet."""
        return self._error is not None

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
        save_checkpoint(self.run_dir, snapshot, self.run, self.ranks)
        self.ranks.first(self._delete_old)

    def _delete_old(self) -> None:
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
