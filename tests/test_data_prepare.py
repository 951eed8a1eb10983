"""`memforge data`: every format is read alike, mistakes are one line, and memory does not grow with the data."""

import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import SMALL, memforge, write
from pyarrow import parquet
from test_data import loaded, word_tokenizer

from memforge.errors import DeviceError, StorageError, UsageError
from memforge.training.data import documents
from memforge.training.data.documents import Reader, sample
from memforge.training.data.sources import source_files

FACTS = 'kind = "facts"\nnum_facts = 12'
TEXTS = [f"document {i}: " + "a few words of ünïcode text " * (i % 7) for i in range(300)]


def spec_for(root: Path, data: str) -> Path:
    return write(root / "s.toml", SMALL.replace(FACTS, data).replace("seq_len = 48", "seq_len = 16"))


def save_dataset(folder: Path, texts: list[str], shards: int = 3) -> None:
    """The layout of `datasets.Dataset.save_to_disk`: arrow streams, and a state.json that names them in order."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    size = -(-len(texts) // shards)
    for i, name in enumerate(names):
        table = pa.table({"id": list(range(size))[: len(texts[i * size :])], "text": texts[i * size : (i + 1) * size]})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    write(folder / "state.json", json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None}))
    write(folder / "dataset_info.json", json.dumps({"features": {}}))


def save_texts(path: Path, texts: list[str]) -> None:
    path.mkdir(parents=True)
    for i, text in enumerate(texts):
        write(path / f"{i:04d}.txt", text)


def save_jsonl(path: Path, texts: list[str]) -> None:
    write(path.with_suffix(".jsonl"), "".join(json.dumps({"text": text}) + "\n" for text in texts))


def save_parquet(path: Path, texts: list[str], kind: Any = None) -> None:
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, kind or pa.string())})
    parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=64)


FORMATS: dict[str, tuple[str, Callable[[Path, list[str]], None]]] = {
    "txt": ("data", save_texts),
    "jsonl": ("data.jsonl", save_jsonl),
    "parquet": ("data.parquet", save_parquet),
    "large-strings": ("data.parquet", lambda path, texts: save_parquet(path, texts, pa.large_string())),
    "dictionary": (
        "data.parquet",
        lambda path, texts: save_parquet(path, texts, pa.dictionary(pa.int32(), pa.string())),
    ),
    "dataset": ("data", save_dataset),
}


def read(root: Path, name: str, field: str = "text") -> list[str]:
    """Every document below a data path."""
    reader, found = Reader(field, "data.path"), []
    for file in source_files(root, name, "data.path"):
        for piece in reader.pieces(file):
            if piece.starts_document:
                found.append("")
            found[-1] += piece.text
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_same_documents(tmp_path: Path, name: str) -> None:
    path, save = FORMATS[name]
    save(tmp_path / "data", TEXTS)
    assert read(tmp_path, path) == TEXTS


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    save_dataset(tmp_path / "b", ["two", "three", "four"])
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "c" / "d.txt", "five")
    save_parquet(tmp_path / "e", ["six"])
    assert read(tmp_path, ".") == ["one", "two", "three", "four", "five", "six"]


def test_a_long_document_is_one_document(tmp_path: Path) -> None:
    text = "many words " * 50_000
    write(tmp_path / "a.txt", text)
    save_jsonl(tmp_path / "b", [text, "x"])
    assert read(tmp_path, ".") == [text, text, "x"]


def test_a_sample_is_of_every_file_in_proportion(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a" * 30_000)
    write(tmp_path / "b.txt", "b" * 10_000)
    files = source_files(tmp_path, ".", "data.path")
    assert sample(Reader("text", "data.path"), files, 400) == ["a" * 300, "b" * 100]
    assert sample(Reader("text", "data.path"), files, 40_000) == ["a" * 30_000, "b" * 10_000]


def test_prepare_says_where_the_tokens_lie_and_training_finds_them(tmp_path: Path) -> None:
    save_jsonl(tmp_path / "data", TEXTS)
    spec = spec_for(tmp_path, 'kind = "text"\npath = "data.jsonl"')
    cache = str(tmp_path / "cache")
    done = memforge("data", "prepare", spec, "--json", XDG_CACHE_HOME=cache)
    assert (done.returncode, done.stderr) == (0, "")
    (part,) = json.loads(done.stdout)["parts"]
    assert (part["documents"], part["shards"], part["temporary"]) == (300, 1, False)
    directory = Path(part["directory"])
    assert directory.is_relative_to(cache)
    assert part["bytes"] == 2 * part["tokens"] + 4 * 300
    before = {file: file.stat().st_mtime_ns for file in directory.iterdir()}
    shown = memforge("data", "prepare", spec, XDG_CACHE_HOME=cache)
    assert str(directory) in shown.stdout
    assert {file: file.stat().st_mtime_ns for file in directory.iterdir()} == before


def test_other_data_has_other_tokens(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, 'kind = "text"\npath = "data.jsonl"')
    cache = str(tmp_path / "cache")
    places = []
    for texts in (TEXTS, TEXTS[:-1], TEXTS):
        save_jsonl(tmp_path / "data", texts)
        done = memforge("data", "prepare", spec, "--json", XDG_CACHE_HOME=cache)
        places.append(json.loads(done.stdout)["parts"][0]["directory"])
    assert places[0] == places[2] != places[1]


def test_stats_are_a_table_or_json(tmp_path: Path) -> None:
    save_jsonl(tmp_path / "data", TEXTS)
    data = """\
        kind = "mixture"
        weights = { facts = 1, words = 3 }
        [data.parts.facts]
        kind = "facts"
        num_facts = 12
        [data.parts.words]
        kind = "text"
        path = "data.jsonl"
        """
    spec = spec_for(tmp_path, textwrap.dedent(data))
    done = memforge("data", "stats", spec)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["facts", "words"]
    assert any(line.split() == ["share", "of", "the", "windows", "25.00%", "75.00%"] for line in lines)
    assert any(line.startswith("majority baseline") for line in lines)
    record = json.loads(memforge("data", "stats", spec, "--json").stdout)
    assert [part["part"] for part in record["parts"]] == ["facts", "words"]
    assert record["parts"][0]["exposures_per_fact"] == pytest.approx(6 * record["parts"][0]["epochs"])
    assert record["parts"][1]["exposures_per_fact"] is None


def bad_dataset(folder: Path) -> None:
    save_dataset(folder, TEXTS)
    (folder / "data-00001-of-00003.arrow").write_bytes(b"not arrow")


def cut_parquet(path: Path) -> None:
    save_parquet(path, TEXTS)
    file = path.with_suffix(".parquet")
    file.write_bytes(file.read_bytes()[:-100])


def splits(folder: Path) -> None:
    for name in ("train", "test"):
        save_dataset(folder / name, TEXTS)
    write(folder / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}))


def no_state(folder: Path) -> None:
    save_dataset(folder, TEXTS)
    (folder / "state.json").unlink()


def nulls(path: Path) -> None:
    save_parquet(path, ["a", "b", None, "c"])  # type: ignore[list-item]


def numbers(path: Path) -> None:
    parquet.write_table(pa.table({"text": [1, 2]}), path.with_suffix(".parquet"))


def other_column(path: Path) -> None:
    parquet.write_table(pa.table({"body": ["a"], "id": [1]}), path.with_suffix(".parquet"))


def fifo(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "a.txt")


# What is there, the path that names it, and what is said.
MISTAKES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "empty-file": (lambda p: write(p.with_suffix(".txt"), ""), "data.txt", "data.path data.txt: no text in any file"),
    "empty-folder": (lambda p: p.mkdir(), "data", "data.path data: holds no .txt, .jsonl or .parquet file"),
    "only-empty": (lambda p: save_jsonl(p, ["", ""]), "data.jsonl", "data.path data.jsonl: no text in any file"),
    "no-rows": (lambda p: save_parquet(p, []), "data.parquet", "data.path data.parquet: no text in any file"),
    "short": (lambda p: save_jsonl(p, ["ab"]), "data.jsonl", "2 tokens; at least 34 are needed for train.seq_len = 16"),
    "binary": (lambda p: write(p / "x.txt", "a\0b"), "data", "data/x.txt is binary, not text (byte 1 is 0)"),
    "not-utf-8": (
        lambda p: (p.mkdir(), (p / "x.txt").write_bytes(b"caf\xe9")),
        "data",
        "data/x.txt is not UTF-8 text (byte 3)",
    ),
    "no-json": (lambda p: write(p.with_suffix(".jsonl"), '{"text": "a"}\n{'), "data.jsonl", "data.jsonl line 2 is not"),
    "other-column": (other_column, "data.parquet", "data.parquet has no column `text`; its columns are body, id"),
    "numbers": (numbers, "data.parquet", "data.parquet column `text` holds int64, not text"),
    "nulls": (nulls, "data.parquet", "data.parquet row 3: `text` is null, not text"),
    "no-parquet": (
        lambda p: write(p.with_suffix(".parquet"), "PAR1"),
        "data.parquet",
        "data.parquet is not a parquet file that can be read",
    ),
    "cut-parquet": (cut_parquet, "data.parquet", "data.parquet is not a parquet file that can be read"),
    "bad-dataset": (bad_dataset, "data", "data/data-00001-of-00003.arrow is "),
    "splits": (splits, "data", 'is a DatasetDict with the splits train, test; name one of them: path = "data/train"'),
    "splits-inside": (lambda p: splits(p / "x"), "data", 'splits train, test; name one of them: path = "data/x/train"'),
    "no-state": (no_state, "data", "data is no dataset that save_to_disk wrote: it has no state.json"),
    "state": (lambda p: write(p / "state.json", "[]"), "data", "data/state.json is not a JSON object"),
    "state-paths": (
        lambda p: write(p / "state.json", '{"_data_files": [{"filename": "../x.arrow"}]}'),
        "data",
        "data/state.json names no data files",
    ),
    "fifo": (fifo, "data", "data/a.txt is not a regular file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_explained_with_file_and_place(tmp_path: Path, name: str) -> None:
    make, path, message = MISTAKES[name]
    make(tmp_path / "data")
    with pytest.raises(UsageError) as caught:
        loaded(tmp_path, f'kind = "text"\npath = "{path}"', "train.seq_len=16")
    assert message in str(caught.value)
    assert str(caught.value).startswith("data.path")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["empty-file", "binary", "other-column", "cut-parquet", "splits"])
def test_the_command_line_says_it_in_one_line(tmp_path: Path, name: str) -> None:
    make, path, message = MISTAKES[name]
    make(tmp_path / "data")
    done = memforge("data", "prepare", spec_for(tmp_path, f'kind = "text"\npath = "{path}"'))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: data.path")


def test_a_missing_part_of_a_dataset_is_a_storage_error(tmp_path: Path) -> None:
    save_dataset(tmp_path / "data", TEXTS)
    (tmp_path / "data" / "data-00001-of-00003.arrow").unlink()
    done = memforge("data", "prepare", spec_for(tmp_path, 'kind = "text"\npath = "data"'))
    assert done.returncode == 4
    assert done.stderr == "error: data/data-00001-of-00003.arrow: No such file or directory\n"


def test_a_file_that_changes_while_it_is_read_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.txt", "words " * 1000)
    pieces = Reader._txt

    def growing(self: Reader, source: Any) -> Any:
        yield from pieces(self, source)
        with file.open("a") as out:
            out.write("more")

    monkeypatch.setattr(Reader, "_txt", growing)
    with pytest.raises(StorageError, match=r"a\.txt: changed while it was read"):
        loaded(tmp_path, 'kind = "text"\npath = "a.txt"')


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_parquet(tmp_path / "data", TEXTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DeviceError, match=r'pip install "memforge\[data\]"'):
        read(tmp_path, "data.parquet")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    word_tokenizer("</s>", words=400).save(str(tmp_path / "t.json"))
    done = memforge("data", "prepare", spec_for(tmp_path, f'{FACTS}\ntokenizer = "t.json"'))
    assert done.returncode == 2
    assert done.stderr == "error: data.tokenizer t.json: has 402 tokens, more than model.vocab_size = 300\n"


def test_a_cache_that_cannot_be_written_is_said_and_is_no_error(tmp_path: Path) -> None:
    save_jsonl(tmp_path / "data", TEXTS)
    blocked = write(tmp_path / "file", "")
    done = memforge(
        "data",
        "prepare",
        spec_for(tmp_path, 'kind = "text"\npath = "data.jsonl"'),
        "--json",
        XDG_CACHE_HOME=str(blocked),
    )
    assert done.returncode == 0
    assert json.loads(done.stdout)["parts"][0]["temporary"] is True
    assert "temporary directory" in done.stderr


def test_facts_stay_in_memory(tmp_path: Path) -> None:
    done = memforge("data", "prepare", spec_for(tmp_path, FACTS))
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("in memory")


MEASURED = """
import resource, sys
from pathlib import Path
from memforge.training.data.tokenizer import train_tokenizer
from memforge.spec.schema import TextSpec
from memforge.training.data.text import TextSource

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

root, part = Path(sys.argv[1]), dict(window=65, seed=0, vocab_size=300, max_held_out=64, note=print)
tokenizer = train_tokenizer(["the quick brown fox " * 50], 300)
TextSource(TextSpec(kind="text", path=sys.argv[2]), root=root, key="data").part(tokenizer, **part)
before = peak()
large = TextSource(TextSpec(kind="text", path=sys.argv[3]), root=root, key="data")
made = large.part(tokenizer, **part)
print("RESULT", sum(file.size for file in large.files), made.size["bytes"], peak() - before)
"""


def many_texts(megabytes: int) -> list[str]:
    """About so much text of a few hundred words, in documents of 1 kB."""
    rng = random.Random(0)
    known = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(400)]
    return [" ".join(rng.choices(known, k=200)) for _ in range(megabytes * 1000)]


def one_text(path: Path, texts: list[str]) -> None:
    write(path.with_suffix(".txt"), "\n".join(texts))


LARGE = {
    "txt": ("txt", one_text),
    "jsonl": ("jsonl", save_jsonl),
    "parquet": (
        "parquet",
        lambda path, texts: parquet.write_table(
            pa.table({"text": texts}), f"{path}.parquet", compression="none", use_dictionary=False
        ),
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory_does_not_grow_with_the_data(tmp_path: Path, name: str) -> None:
    """After 4 MB, which are more than a batch, the peak grows by less than half of the next 20 MB."""
    suffix, save = LARGE[name]
    for size in (4, 24):
        save(tmp_path / f"{size}", many_texts(size))
    command = [sys.executable, "-c", MEASURED, str(tmp_path), f"4.{suffix}", f"24.{suffix}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    on_disk, num_bytes, grown = map(int, done.stdout.split("RESULT", 1)[1].split())
    assert min(on_disk, num_bytes) > 22e6
    assert grown < 10e6


def test_the_batch_of_rows_is_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows in one row group are decoded a few at a time."""
    monkeypatch.setattr(documents, "ROWS_BYTES", 1000)
    parquet.write_table(pa.table({"text": ["x" * 400 + str(i) for i in range(50)]}), tmp_path / "a.parquet")
    seen: list[int] = []
    rows = Reader._rows

    def spy(self: Reader, file: Any, column: Any, done: int, bytes_read: int) -> Any:
        seen.append(len(column))
        return rows(self, file, column, done, bytes_read)

    monkeypatch.setattr(Reader, "_rows", spy)
    assert len(read(tmp_path, "a.parquet")) == 50
    assert max(seen) < 10
