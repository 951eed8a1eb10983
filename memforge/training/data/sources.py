"""The files of a data path: which there are, in which order, and the hash of what they hold."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memforge.errors import StorageError, UsageError, printable
from memforge.spec.load import data_path
from memforge.training.data.progress import Note, Progress

KINDS = {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet"}
# What `datasets` writes into the folder of a dataset, and into one of several splits.
STATE, INFO, SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
BLOCK_BYTES = 2**20


class UnreadableError(StorageError):
    """A file of the data could not be read; no other place for what is made of it would help."""


@dataclass(frozen=True)
class SourceFile:
    """One file to read: `shown` names it to the user; `kind` is txt, jsonl, parquet or arrow.

    `stamp` is its size in bytes and the time of its last change, when it was found.
    """

    path: Path
    shown: str
    kind: str
    stamp: tuple[int, int]

    @property
    def size(self) -> int:
        return self.stamp[0]


def source_files(root: Path, name: str, key: str) -> list[SourceFile]:
    """The files below the data path `name` of the spec's `key`, in the order they are read.

    Raises UsageError when there are none, a dataset is not whole, or a link leads out of `root`; StorageError when a
    folder cannot be listed.
    """
    try:
        path = data_path(root, name)
    except ValueError as error:
        raise UsageError(f"{key} {printable(name)}: {error}") from None
    finder = _Finder(root.resolve(), path, name, key)
    if path.is_file():
        return [finder.file(path, KINDS.get(path.suffix, "txt"))]
    found = sorted(finder.below(path), key=lambda item: item[0])
    if not found:
        raise UsageError(f"{key} {printable(name)}: holds no .txt, .jsonl or .parquet file and no dataset")
    return [file for _, file in found]


@dataclass(frozen=True)
class _Finder:
    """`start` is where the data path `name` leads; what it finds may not lead out of `root`."""

    root: Path
    start: Path
    name: str
    key: str

    def below(self, folder: Path) -> Iterator[tuple[tuple[Any, ...], SourceFile]]:
        """Each file with what it is sorted by: its path, and in a dataset its place."""
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise UnreadableError(f"{self.shown(folder)}: {error.strerror or error}") from None
        names = {entry.name for entry in entries}
        if SPLITS in names:
            raise self._several_splits(folder)
        if STATE in names or (INFO in names and any(entry.suffix == ".arrow" for entry in entries)):
            for i, path in enumerate(self._dataset(folder)):
                yield (folder.parts, i), self.file(path, "arrow")
            return
        for entry in entries:
            if entry.is_dir():
                if not entry.is_symlink():  # a link may lead to where it stands
                    yield from self.below(entry)
            elif entry.suffix in KINDS:
                yield (entry.parts, 0), self.file(entry, KINDS[entry.suffix])

    def file(self, path: Path, kind: str) -> SourceFile:
        shown = self.shown(path)
        try:
            inside = path.resolve().is_relative_to(self.root)
            status = path.stat()
        except (OSError, RuntimeError) as error:
            raise UnreadableError(f"{shown}: {getattr(error, 'strerror', None) or error}") from None
        if not inside:
            raise UsageError(f"{self.key}: {shown} leads outside the data root; --data-root DIR moves it")
        if not path.is_file():
            raise UsageError(f"{self.key}: {shown} is not a regular file")
        return SourceFile(path, shown, kind, (status.st_size, status.st_mtime_ns))

    def shown(self, path: Path) -> str:
        """The path as it reads from the data root."""
        return printable(os.path.normpath(Path(self.name) / path.relative_to(self.start)))

    def _dataset(self, folder: Path) -> list[Path]:
        """The arrow files of a dataset in their order."""
        state = self._json(folder / STATE)
        files = state.get("_data_files")
        names = [item.get("filename") if isinstance(item, dict) else None for item in files or ()]
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UsageError(f"{self.key}: {self.shown(folder / STATE)} names no data files")
        if any(state.get(key) for key in ("_indices_files", "_indices_data_files")):
            raise UsageError(
                f"{self.key}: {self.shown(folder)} is a selection of rows; save it again after flatten_indices()"
            )
        return [folder / str(name) for name in names]

    def _several_splits(self, folder: Path) -> UsageError:
        splits = self._json(folder / SPLITS).get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        shown = self.shown(folder)
        if not names:
            return UsageError(f"{self.key}: {shown}/{SPLITS} names no splits")
        listed = ", ".join(printable(name) for name in names)
        return UsageError(
            f"{self.key}: {shown} is a DatasetDict with the splits {listed}; name one of them: "
            f'{self.key.rpartition(".")[2]} = "{os.path.normpath(f"{shown}/{printable(names[0])}")}"'
        )

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UsageError(
                f"{self.key}: {self.shown(path.parent)} is no dataset that save_to_disk wrote: it has no {path.name}"
            ) from None
        except OSError as error:
            raise UnreadableError(f"{self.shown(path)}: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise UsageError(f"{self.key}: {self.shown(path)} is not a JSON object")
        return record


def content_sha256(files: Sequence[SourceFile], note: Note) -> str:
    """SHA-256 over kind, size and bytes of each file in turn."""
    sha, done = hashlib.sha256(), 0
    progress = Progress(note, "hashing", sum(file.size for file in files))
    for file in files:
        sha.update(f"{file.kind} {file.size}\n".encode())
        for block in _blocks(file):
            sha.update(block)
            done += len(block)
            progress.at(done)
    return sha.hexdigest()


def _blocks(file: SourceFile) -> Iterator[bytes]:
    try:
        with file.path.open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                yield block
    except OSError as error:
        raise UnreadableError(f"{file.shown}: {error.strerror or error}") from None


def require_unchanged(files: Sequence[SourceFile]) -> None:
    """Raises StorageError when a file is not what it was when it was found: its tokens belong to no hash."""
    for file in files:
        try:
            status = file.path.stat()
        except OSError as error:
            raise UnreadableError(f"{file.shown}: {error.strerror or error}") from None
        if (status.st_size, status.st_mtime_ns) != file.stamp:
            raise UnreadableError(f"{file.shown}: changed while it was read")
