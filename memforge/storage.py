"""Files and directories that are written whole or not at all."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from memforge.errors import StorageError


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
    """A temporary directory beside `target` that takes its name when the block ends well, and vanishes otherwise."""
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".tmp-{target.name}-{secrets.token_hex(4)}")
        temporary.mkdir()
    try:
        with storage_errors(target):
            yield temporary
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            if target.exists():
                aside = temporary.with_name(temporary.name + "-old")
                target.rename(aside)
                temporary.rename(target)
                shutil.rmtree(aside)
            else:
                temporary.rename(target)
            sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def write_json(path: Path, record: Any) -> None:
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
