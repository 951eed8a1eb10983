"""Files and directories that are written whole or not at all."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from memforge.errors import StorageError


def cache_dir() -> Path:
    """Where what can be made again is kept, by $XDG_CACHE_HOME; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memforge"


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """What the system or safetensors cannot read or write becomes a StorageError with the path."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{error.filename or path}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise StorageError(f"{path}: {error}") from None


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block ends well, and vanishes otherwise."""
    with storage_errors(target):
        # By its real name: `out/../out` no longer leads anywhere once `out` has been moved aside.
        target = Path(os.path.realpath(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")
        temporary.mkdir()
    try:
        with storage_errors(target):
            yield temporary
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            _put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(new: Path, target: Path) -> None:
    """`new` takes the place of `target`, which is deleted; if that fails, `target` is again what it was."""
    aside = new.with_name(f"{new.name}-old")
    moves = _moves(new, target, aside)
    try:
        for source, destination in moves:
            destination.parent.mkdir(exist_ok=True)
            source.rename(destination)
        sync(target)
        sync(target.parent)
    except BaseException:  # a signal too, which may come before a move or after it
        for source, destination in reversed(moves):
            if destination.exists() and not source.exists():
                destination.rename(source)
        with suppress(OSError):
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _moves(new: Path, target: Path, aside: Path) -> list[tuple[Path, Path]]:
    """What is renamed to what, in order. The current directory stays and its entries are exchanged: a shell that
    stands in it would not see one of the same name.
    """
    if not target.exists():
        return [(new, target)]
    if not target.samefile(Path()):
        return [(target, aside), (new, target)]
    old, fresh = sorted(target.iterdir()), sorted(new.iterdir())
    return [*((entry, aside / entry.name) for entry in old), *((entry, target / entry.name) for entry in fresh)]


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, text: str) -> None:
    """Write a file anew: a reader, a failure and a power cut leave the old content or the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    with storage_errors(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                temporary.unlink()


def json_text(record: Any) -> str:
    """The one way in which a record is written."""
    return json.dumps(record, indent=1, sort_keys=True) + "\n"


def write_json(path: Path, record: Any) -> None:
    path.write_text(json_text(record), encoding="utf-8")
