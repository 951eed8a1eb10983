"""Run directories: what lies in one, who writes to it, and how a run begins, is taken up again, or is overwritten."""

import fcntl
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from tokenizers import Tokenizer

from memforge.errors import DamagedError, StorageError, printable
from memforge.plan import read_plan
from memforge.report.run import METRICS, SAMPLES, SPEED, STEP, SUMMARY
from memforge.report.run import RUN as IDENTITY
from memforge.storage import json_text, replace_file, storage_errors

FORMAT_VERSION = 3
PLAN, TOKENIZER, REPORT, LOCK = "plan.json", "tokenizer.json", "report.html", ".lock"
_OURS = frozenset((PLAN, TOKENIZER, SUMMARY, IDENTITY, METRICS, SPEED, SAMPLES, REPORT, LOCK, "tensorboard", "wandb"))
_ASIDE = (".tmp-step-", ".bad-step-", ".abandoned-step-")


class Record(BaseModel):
    """A JSON file of a run: strict, and newer fields are let through."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class Identity(Record):
    """What tells the checkpoints of one run from those of another."""

    format_version: int
    run_id: str


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
    ended: Literal["running", "done", "budget", "interrupted", "non-finite"]
    exposures_per_fact: float | None = None
    caveats: list[str] = []


_R = TypeVar("_R", bound=Record)


def read_record(path: Path, kind: type[_R], *, exact: bool = False) -> _R:
    """The record in a file; an `exact` one must be written as write_json does it, to the byte.

    Raises StorageError when it is absent or damaged.
    """
    raw = read_damaged_if_absent(path)
    try:
        record = kind.model_validate_json(raw)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DamagedError(f"{path}: damaged" + (f" at `{where}`" if where else "")) from None
    if exact and raw != json_text(record.model_dump()).encode():
        raise DamagedError(f"{path}: was changed after it was written")
    return record


def read_damaged_if_absent(path: Path) -> bytes:
    """The content of a file that must be there; what else keeps it from being read may pass."""
    with storage_errors(path):
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            raise DamagedError(f"{path}: {error.strerror}") from None


def read_tokenizer(run_dir: Path) -> Tokenizer:
    path = run_dir / TOKENIZER
    with storage_errors(path):
        text = path.read_bytes()
    try:
        return Tokenizer.from_str(text.decode("utf-8"))
    except Exception as error:  # noqa: BLE001  the library raises nothing narrower
        raise StorageError(f"{path}: not a tokenizer: {error}") from None


def run_id(run_dir: Path) -> str:
    """Raises StorageError for what is no run, or one of another format."""
    if not run_dir.is_dir():
        raise StorageError(f"{run_dir}: no such run directory")
    identity = read_record(run_dir / IDENTITY, Identity, exact=True)
    if identity.format_version != FORMAT_VERSION:
        raise StorageError(f"{run_dir}: run format {identity.format_version}; this memforge reads {FORMAT_VERSION}")
    return identity.run_id


def is_run(path: Path) -> bool:
    """Whether a directory is a run of memforge and holds nothing else, so that it may be overwritten."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    ours = {name for name in names if name in _OURS or STEP.fullmatch(name) or name.startswith(_ASIDE)}
    if names > ours or LOCK not in names:
        return False
    if not {PLAN, TOKENIZER} <= names:  # killed while it was being made
        return not any(STEP.fullmatch(name) for name in names)
    try:
        read_plan(path / PLAN)
    except StorageError:
        return False
    return True


def require_run(run_dir: Path) -> None:
    """Raises StorageError for what is neither a run nor the beginning of one."""
    if not run_dir.is_dir():
        raise StorageError(f"{run_dir}: no such run; leave --resume out to start one")
    if not (run_dir / IDENTITY).is_file() and any(run_dir.iterdir()) and not is_run(run_dir):
        raise StorageError(f"{run_dir}: is not a run of memforge")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the right to write to a run directory. Raises StorageError naming the process that has it."""
    with storage_errors(run_dir):
        file = (run_dir / LOCK).open("a+", encoding="utf-8")
    with file:
        _lock(file, run_dir)
        yield


def _lock(file: IO[str], run_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = printable(file.read(256).strip()) or "another process"
        raise StorageError(f"{run_dir}: {holder} is writing to this run") from None
    except OSError as error:  # a file system without locks
        raise StorageError(f"{run_dir}: cannot be locked: {error.strerror}") from None
    with storage_errors(run_dir):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


@contextmanager
def new_run(run_dir: Path, *, overwrite: bool) -> Iterator[Callable[[], None]]:
    """Make and lock a run directory. Until the block calls the yielded function, nothing is lost: when it fails before,
    all is put back as it was, an overwritten run included.
    """
    with _moved_aside(run_dir, wanted=overwrite) as aside:
        occupied = run_dir.is_symlink() or (run_dir.exists() and not run_dir.is_dir())
        entries = set() if occupied or not run_dir.exists() else {entry.name for entry in run_dir.iterdir()}
        if occupied or (entries and LOCK not in entries):
            raise StorageError(_why_occupied(run_dir, overwrite=overwrite))
        made, kept = [path for path in (run_dir, *run_dir.parents) if not path.exists()], False
        with storage_errors(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(run_dir):
            if {entry.name for entry in run_dir.iterdir()} != {LOCK}:
                raise StorageError(_why_occupied(run_dir, overwrite=overwrite))

            def started() -> None:
                nonlocal kept
                if kept:
                    return
                kept = True  # first: whatever interrupts the rest must not cost the new run as well
                if aside is not None:
                    shutil.rmtree(aside, ignore_errors=True)

            try:
                yield started
            finally:
                if not kept:
                    shutil.rmtree(run_dir, ignore_errors=True)
                    _put_back(made, was_empty=run_dir not in made and aside is None, run_dir=run_dir)


def _put_back(made: list[Path], *, was_empty: bool, run_dir: Path) -> None:
    """Parents that were made for the run go again, an empty directory that was there comes back."""
    if was_empty:
        run_dir.mkdir()
    for path in made:
        with suppress(OSError):  # gone already, or no longer empty
            path.rmdir()


def _why_occupied(run_dir: Path, *, overwrite: bool) -> str:
    if overwrite:
        return f"{run_dir}: is not only a run of memforge; choose another --out"
    return (
        f"{run_dir}: exists already; --resume auto goes on with a run, --overwrite deletes it, or choose another --out"
    )


@contextmanager
def _moved_aside(run_dir: Path, *, wanted: bool) -> Iterator[Path | None]:
    """Inside, an earlier run that nobody writes to has another name; it gets its own back if it is still there."""
    if not (wanted and is_run(run_dir)):
        yield None
        return
    aside = run_dir.with_name(f".{run_dir.name}-{secrets.token_hex(4)}.old")
    with locked(run_dir):
        with storage_errors(run_dir):
            run_dir.rename(aside)
        try:
            yield aside
        finally:
            if aside.exists() and not run_dir.exists():
                aside.rename(run_dir)


def write_identity(run_dir: Path) -> str:
    """Give a new run its id."""
    identity = Identity(format_version=FORMAT_VERSION, run_id=secrets.token_hex(16))
    replace_file(run_dir / IDENTITY, json_text(identity.model_dump()))
    return identity.run_id


def write_summary(run_dir: Path, summary: Summary) -> None:
    replace_file(run_dir / SUMMARY, json_text(summary.model_dump(exclude_none=True)))
