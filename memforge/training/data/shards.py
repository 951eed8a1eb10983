"""Tokens packed into mapped files, kept by what they were made of, verified when opened and watched while read."""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from memforge.errors import StorageError
from memforge.storage import cache_dir, file_sha256, replaced_directory, storage_errors, write_json
from memforge.training.data.progress import Note, Progress
from memforge.training.data.sources import UnreadableError

FORMAT_VERSION = 1
SHARD_TOKENS = 2**27
INDEX, LENGTHS = "index.json", "lengths.bin"
# Written by little-endian machines and read by them: the dtypes say so.
NARROW, WIDE = "<u2", "<u4"

Ids: TypeAlias = npt.NDArray[np.integer]
# Writes everything and returns what the index is to say of it.
Fill: TypeAlias = Callable[["Writer"], dict[str, int | str]]


class _DamagedError(StorageError):
    """An entry of the cache is not what was written there; it is made again."""


@dataclass(frozen=True)
class Shard:
    """One mapped file of tokens, the largest of them, and the file's size and last change when it was opened."""

    path: Path
    file: IO[bytes]
    tokens: Ids
    stamp: tuple[int, int]
    largest: int

    def require_unchanged(self) -> None:
        """Raises StorageError when the file has changed; to read a mapped file that was cut would end the process."""
        if _stamp(self.file) != self.stamp:
            raise StorageError(f"{self.path}: changed while it is read; its tokens are no longer those of the run")


@dataclass(frozen=True)
class Packed:
    """A flat sequence of tokens in shards; `lengths` are those of the documents in it, in tokens.

    `size` is what was counted when it was made. `keeper` deletes the files at the end if they are temporary.
    """

    directory: Path
    shards: tuple[Shard, ...]
    lengths: Ids
    size: dict[str, int | str]
    num_bytes: int
    keeper: Any = None
    starts: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        ends = np.cumsum([len(shard.tokens) for shard in self.shards])
        object.__setattr__(self, "starts", np.concatenate([[0], ends]).astype(np.int64))

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    def require_unchanged(self) -> None:
        for shard in self.shards:
            shard.require_unchanged()

    def read_into(self, out: npt.NDArray[np.int32], start: int) -> None:
        """Fill `out` with the tokens from `start` on."""
        done = 0
        i = int(np.searchsorted(self.starts, start, side="right")) - 1
        while done < len(out):
            inside = start + done - int(self.starts[i])
            part = self.shards[i].tokens[inside : inside + len(out) - done]
            out[done : done + len(part)] = part
            done, i = done + len(part), i + 1


class Writer:
    """Writes tokens and document lengths into `directory` and hashes them on the way."""

    def __init__(self, directory: Path, num_ids: int) -> None:
        self._directory = directory
        self._dtype = np.dtype(NARROW if num_ids <= 2**16 else WIDE)
        self._shards: list[_File] = []
        self._lengths = _File(directory / LENGTHS)

    def tokens(self, ids: Ids) -> None:
        packed = ids.astype(self._dtype)
        while len(packed):
            if not self._shards or self._shards[-1].count >= SHARD_TOKENS:
                self._shards.append(_File(self._directory / f"tokens-{len(self._shards):05d}.bin"))
            room = SHARD_TOKENS - self._shards[-1].count
            self._shards[-1].write(packed[:room])
            packed = packed[room:]

    def lengths(self, lengths: Ids) -> None:
        self._lengths.write(lengths.astype(np.dtype(WIDE)))

    def index(self, key: str, size: dict[str, int | str]) -> dict[str, Any]:
        """What the index says of the files, once everything is written."""
        shards = [
            {
                "file": s.path.name,
                "tokens": s.count,
                "dtype": self._dtype.str,
                "sha256": s.close(),
                "largest": s.largest,
            }
            for s in self._shards
        ]
        lengths = {"file": LENGTHS, "count": self._lengths.count, "sha256": self._lengths.close()}
        return {"format": FORMAT_VERSION, "key": key, "shards": shards, "lengths": lengths, "size": size}


class _File:
    """A file of integers that is written once."""

    def __init__(self, path: Path) -> None:
        self.path, self.count, self.largest = path, 0, 0
        self._sha, self._out = hashlib.sha256(), path.open("wb")

    def write(self, values: Ids) -> None:
        if len(values):
            raw = values.tobytes()
            self._sha.update(raw)
            self._out.write(raw)
            self.count, self.largest = self.count + len(values), max(self.largest, int(values.max()))

    def close(self) -> str:
        """The SHA-256 of all of it."""
        self._out.close()
        return self._sha.hexdigest()


def entry_key(**made_of: str | int) -> str:
    """The name of an entry of the cache: SHA-256 over the format and what its tokens were made of."""
    record = json.dumps({"format": FORMAT_VERSION, **made_of}, sort_keys=True)
    return hashlib.sha256(record.encode()).hexdigest()


def packed_tokens(key: str, fill: Fill, *, num_ids: int, vocab_size: int, note: Note) -> Packed:
    """The tokens of an entry of the cache, made by `fill` unless they are there and whole.

    Where the cache cannot be written they lie in a temporary directory until the process ends. Raises StorageError
    when that cannot be written either, or a token is not below `vocab_size`.
    """
    directory = cache_dir() / "data" / key
    packed = _opened_if_whole(directory, key, note)
    if packed is None:
        try:
            packed = _made_once(directory, key, fill, num_ids, note)
        except UnreadableError:
            raise
        except StorageError as error:
            note(f"the cache cannot be used ({error}); tokens are kept in a temporary directory")
            packed = _made_for_now(key, fill, num_ids, note)
    for shard in packed.shards:
        if shard.largest >= vocab_size:
            raise StorageError(f"{shard.path}: token {shard.largest} is not in a vocabulary of {vocab_size:,}")
    return packed


def _made_once(directory: Path, key: str, fill: Fill, num_ids: int, note: Note) -> Packed:
    """Of several processes that prepare the same data one does, and the others wait for it."""
    with _locked(directory, note):
        if (packed := _opened_if_whole(directory, key, note)) is not None:
            return packed
        for left in directory.parent.glob(f".tmp-{key}-*"):  # by a process that was killed: the lock is ours
            shutil.rmtree(left, ignore_errors=True)
        with replaced_directory(directory) as temporary:
            _write(temporary, key, fill, num_ids)
        return _opened(directory, key, note)


def _made_for_now(key: str, fill: Fill, num_ids: int, note: Note) -> Packed:
    with storage_errors(Path("temporary directory")):
        keeper = tempfile.TemporaryDirectory(prefix="memforge-data-")
        directory = Path(keeper.name)
        _write(directory, key, fill, num_ids)
        return _opened(directory, key, note, keeper)


def _write(directory: Path, key: str, fill: Fill, num_ids: int) -> None:
    with storage_errors(directory):
        writer = Writer(directory, num_ids)
        index = writer.index(key, fill(writer))
        write_json(directory / INDEX, index | {"seal": _seal(index)})


def _seal(index: dict[str, Any]) -> str:
    plain = {name: value for name, value in index.items() if name != "seal"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@contextmanager
def _locked(directory: Path, note: Note) -> Iterator[None]:
    path = directory.with_name(f"{directory.name}.lock")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("wb")
    with lock:
        with storage_errors(path):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note("waiting for another process that prepares the same data")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _opened_if_whole(directory: Path, key: str, note: Note) -> Packed | None:
    try:
        present = directory.exists()
    except OSError:
        return None
    try:
        return _opened(directory, key, note) if present else None
    except StorageError as error:
        note(f"{error}; made again")
        return None


def _opened(directory: Path, key: str, note: Note, keeper: Any = None) -> Packed:
    """An entry whose every byte has the hash it was written with. Raises StorageError for any other."""
    index = _index(directory, key)
    files = [*index["shards"], {**index["lengths"], "tokens": index["lengths"]["count"], "dtype": WIDE}]
    total = sum(record["tokens"] * np.dtype(record["dtype"]).itemsize for record in files)
    progress, done, shards = Progress(note, "verifying", total), 0, []
    for record in files:
        shards.append(_shard(directory / record["file"], record))
        done += shards[-1].stamp[0]
        progress.at(done)
    *shards, lengths = shards
    return Packed(directory, tuple(shards), lengths.tokens, index["size"], total, keeper)


def _index(directory: Path, key: str) -> dict[str, Any]:
    path = directory / INDEX
    with storage_errors(path):
        raw = path.read_bytes()
    try:
        index = json.loads(raw)
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, dict) or index.get("seal") != _seal(index) or index.get("key") != key:
        raise _DamagedError(f"{path}: the index is damaged")
    return index


def _shard(path: Path, record: dict[str, Any]) -> Shard:
    dtype = np.dtype(record["dtype"])
    with storage_errors(path):
        file = path.open("rb")
        stamp = _stamp(file)
        if stamp[0] != record["tokens"] * dtype.itemsize or file_sha256(path) != record["sha256"]:
            raise _DamagedError(f"{path}: the content does not match its hash in {INDEX}")
        # An empty file cannot be mapped.
        tokens = np.memmap(file, dtype, mode="r") if stamp[0] else np.zeros(0, dtype)
    return Shard(path, file, tokens, stamp, record.get("largest", 0))


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    """Size in bytes and time of the last change of an open file, whatever its name leads to by now."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns
