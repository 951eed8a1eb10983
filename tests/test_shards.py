"""Packed tokens: made once, verified, watched while they are read."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import write
from made_data import packed_of

from memforge.errors import StorageError
from memforge.storage import cache_dir
from memforge.training.data import Prefetch, progress, shards
from memforge.training.data.progress import Progress
from memforge.training.data.shards import packed_tokens
from memforge.training.data.stream import Stream
from memforge.training.data.text import WindowUnits


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


TOKENS = np.arange(400) % 389


def test_tokens_are_made_once(cache: Path) -> None:
    notes: list[str] = []
    first = packed_of(TOKENS, note=notes.append)

    def never(_: shards.Writer) -> dict[str, int | str]:
        raise AssertionError("made again")

    again = packed_tokens("k", never, num_ids=500, vocab_size=500, note=notes.append)
    assert (again.directory, notes) == (first.directory, [])
    assert again.directory == cache / "k" == cache_dir() / "data" / "k"
    assert np.array_equal(np.concatenate([shard.tokens for shard in again.shards]), TOKENS)
    assert {shard.tokens.dtype.itemsize for shard in again.shards} == {2}


def test_large_vocabularies_take_four_bytes(cache: Path) -> None:
    tokens = np.array([0, 2**16, 70_000])
    packed = packed_of(tokens, num_ids=70_001, vocab_size=70_001)
    assert np.concatenate([shard.tokens for shard in packed.shards]).tolist() == tokens.tolist()


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: flip(d / "tokens-00003.bin"),
        lambda d: flip(d / "lengths.bin"),
        lambda d: flip(d / "index.json"),
        lambda d: (d / "tokens-00006.bin").write_bytes(b""),
        lambda d: (d / "tokens-00000.bin").unlink(),
        lambda d: (d / "index.json").unlink(),
        lambda d: (d / "index.json").write_text("[[[["),
        lambda d: (d / "index.json").write_text((d / "index.json").read_text().replace('"k"', '"other"')),
    ],
    ids=["flip", "lengths", "index", "cut", "missing", "no-index", "no-json", "other-key"],
)
def test_a_damaged_entry_is_made_again(cache: Path, damage: Callable[[Path], object]) -> None:
    notes: list[str] = []
    damage(packed_of(TOKENS).directory)
    again = packed_of(TOKENS, note=notes.append)
    assert np.array_equal(np.concatenate([shard.tokens for shard in again.shards]), TOKENS)
    assert any("made again" in note for note in notes)
    notes.clear()
    packed_of(TOKENS, note=notes.append)
    assert notes == []


@pytest.mark.parametrize("change", ["cut", "write"])
def test_a_shard_that_changes_under_a_reader_is_an_error(cache: Path, change: str) -> None:
    packed = packed_of(TOKENS)
    one = Stream(WindowUnits(packed, 10, np.array([3])), window=10, seed=0)
    one.windows(0, 4)
    path = packed.shards[2].path
    with path.open("r+b") as file:
        file.truncate(10) if change == "cut" else file.write(b"\1")
    with (
        Prefetch(one, 4, first_step=1, workers=2) as ahead,
        pytest.raises(StorageError, match=r"tokens-00002\.bin: changed"),
    ):
        ahead.batch(1)


def test_an_entry_that_is_replaced_does_not_disturb_its_readers(cache: Path) -> None:
    packed = packed_of(TOKENS)
    for file in packed.directory.iterdir():
        file.rename(file.with_suffix(".old"))
    packed.require_unchanged()
    packed_of(TOKENS)
    out = np.empty(400, np.int32)
    packed.read_into(out, 0)
    assert np.array_equal(out, TOKENS)


def test_a_token_outside_the_vocabulary_is_refused_by_file(cache: Path) -> None:
    with pytest.raises(StorageError, match=r"tokens-00000\.bin: token 63 is not in a vocabulary of 40"):
        packed_of(TOKENS, vocab_size=40)


def test_of_several_that_prepare_one_does(cache: Path) -> None:
    made: list[int] = []
    notes: list[str] = []

    def fill(writer: shards.Writer) -> dict[str, int | str]:
        made.append(1)
        time.sleep(0.2)
        writer.tokens(TOKENS)
        return {}

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(packed_tokens, "k", fill, num_ids=500, vocab_size=500, note=notes.append) for _ in range(4)]
        assert all(job.result().num_tokens == 400 for job in jobs)
    assert len(made) == 1
    assert set(notes) <= {"waiting for another process that prepares the same data"}
    assert notes


def test_what_a_killed_process_left_is_cleared_away(cache: Path) -> None:
    left = cache / ".tmp-k-0123"
    left.mkdir(parents=True)
    packed_of(TOKENS)
    assert not left.exists()


def test_without_a_cache_tokens_are_kept_for_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", "")))
    notes: list[str] = []
    packed = packed_of(TOKENS, note=notes.append)
    assert np.array_equal(np.concatenate([shard.tokens for shard in packed.shards]), TOKENS)
    assert "temporary directory" in notes[0]
    directory = packed.directory
    assert directory.is_dir()
    del packed
    assert not directory.exists()


def test_without_any_place_it_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "file", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setattr(shards.tempfile, "tempdir", str(file))
    with pytest.raises(StorageError, match="file"):
        packed_of(TOKENS)


def test_a_full_disk_leaves_no_entry(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file = shards._File.write

    def full(self: shards._File, values: np.ndarray) -> None:
        if cache in self.path.parents:
            raise OSError(28, "No space left on device", str(self.path))
        write_file(self, values)

    monkeypatch.setattr(shards._File, "write", full)
    notes: list[str] = []
    packed = packed_of(TOKENS, note=notes.append)
    assert packed.num_tokens == 400
    assert "No space left on device" in notes[0]
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_progress_is_told_in_units_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    Progress(notes.append, "tokenizing", 5 * 10**9).at(10**9)
    assert notes == []  # it is early
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_NOTES", 0.0)
    Progress(notes.append, "tokenizing", 5 * 10**9).at(12 * 10**8)
    Progress(notes.append, "hashing", 5 * 10**6).at(10**6)
    assert notes == ["tokenizing 1.2 of 5.0 GB", "hashing 1.0 of 5.0 MB"]
