"""Facts and text: no leaks, honest hold-outs, an order that is a function of the seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write

from memforge.errors import UsageError
from memforge.spec.schema import FactsSpec, TextSpec
from memforge.training.data.corpus import Ragged, Stream
from memforge.training.data.facts import (
    AIRPORT_PHRASINGS,
    Fact,
    airports,
    copy_from_name,
    facts_corpus,
    majority,
)
from memforge.training.data.text import text_corpus
from memforge.training.data.tokenizer import END_ID, train_tokenizer


def facts(num_facts: int = 40, seed: int = 0, held: int = 2):
    spec = FactsSpec(kind="facts", num_facts=num_facts, num_held_out=held)
    return facts_corpus(spec, vocab_size=400, max_seq_len=96, seed=seed)


def test_no_airport_gives_its_city_away() -> None:
    known = airports()
    assert len(known) > 10_000
    assert len({fact.subject for fact in known}) == len(known)
    shared = [f for f in known if set(f.subject.casefold().split()) & set(f.answer.casefold().split())]
    assert shared == []
    assert copy_from_name(list(known)) == 0


def test_the_corpus_is_the_one_that_was_measured() -> None:
    """The hash of the pinned data version; a new version of the package changes the demo's facts."""
    description = facts(256, seed=1).description
    assert description["corpus_sha256"] == "8ab0e6a3d6e090361e3af2bdf5374fbac2334f3795fcd14eef1032e9b9766fe0"
    assert (description["sentences"], description["held_out_prompts"]) == (256 * 6, 256 * 2)


def test_every_phrasing_is_trained_and_no_tested_pair_is() -> None:
    corpus = facts()
    decode = corpus.tokenizer.decode
    trained = {decode(corpus.units[i].tolist()) for i in range(len(corpus.units))}
    tested = {decode(corpus.held_out.sequences[i].tolist()) for i in range(len(corpus.held_out.sequences))}
    assert (len(trained), len(tested)) == (40 * 6, 40 * 2)
    assert trained.isdisjoint(tested)
    for phrasing in AIRPORT_PHRASINGS:
        start, _, end = phrasing.partition("{subject}")
        assert any(t.startswith(start) and end in t for t in trained)


def test_the_scored_part_is_the_answer_and_its_end() -> None:
    corpus = facts()
    for i in range(len(corpus.held_out.sequences)):
        sequence = corpus.held_out.sequences[i].tolist()
        given, answer = sequence[: corpus.held_out.scored_from[i]], sequence[corpus.held_out.scored_from[i] :]
        assert (given[0], answer[-1]) == (END_ID, END_ID)
        assert corpus.tokenizer.decode(answer).startswith(" ")
        assert any(corpus.tokenizer.decode(given).endswith(p.partition("{subject}")[2]) for p in AIRPORT_PHRASINGS)


def test_baselines() -> None:
    known = [Fact("A", "x"), Fact("B", "x"), Fact("C y field", "y"), Fact("D", "z")]
    assert majority(known) == 0.5
    assert copy_from_name(known) == 0.25


@pytest.mark.parametrize(
    ("num_facts", "held", "max_seq_len", "message"),
    [(10**6, 2, 96, "holds"), (40, 2, 8, "too short"), (4, 7, 96, "a phrasing untrained")],
)
def test_facts_that_do_not_fit_are_refused(num_facts: int, held: int, max_seq_len: int, message: str) -> None:
    spec = FactsSpec(kind="facts", num_facts=num_facts, num_held_out=held)
    with pytest.raises(UsageError, match=message):
        facts_corpus(spec, vocab_size=400, max_seq_len=max_seq_len, seed=0)


def test_the_seed_decides_facts_and_hold_outs() -> None:
    one, same, other = facts(seed=1), facts(seed=1), facts(seed=2)
    assert np.array_equal(one.units.flat, same.units.flat)
    assert one.description["corpus_sha256"] != other.description["corpus_sha256"]


def stream(seed: int = 0) -> Stream:
    return Stream(Ragged.of([[i] * (i % 5 + 1) for i in range(1, 30)]), window=7, seed=seed)


def test_windows_are_a_function_of_their_position() -> None:
    whole = stream().windows(0, 60)
    for start, count in ((0, 1), (13, 5), (59, 1), (20, 40)):
        assert np.array_equal(stream().windows(start, count), whole[start : start + count])
    assert not np.array_equal(stream(1).windows(0, 60), whole)


def test_each_epoch_holds_every_token_once_in_a_new_order() -> None:
    s = stream()
    tokens = s.windows(0, 3 * s.epoch_tokens).reshape(-1)
    epochs = [tokens[i * s.epoch_tokens : (i + 1) * s.epoch_tokens] for i in range(3)]
    assert all(np.array_equal(np.sort(e), np.sort(s.units.flat)) for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_tokenizers_are_kept_and_damaged_ones_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = train_tokenizer(["some text to learn from"] * 3, 280).to_str()
    (file,) = (tmp_path / "memforge" / "tokenizers").iterdir()
    assert train_tokenizer(["some text to learn from"] * 3, 280).to_str() == first
    file.write_text("{broken")
    assert train_tokenizer(["some text to learn from"] * 3, 280).to_str() == first
    assert file.read_text() == first


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(write(tmp_path / "file", "")))
    assert train_tokenizer(["abc"], 280).get_vocab_size() >= 257


def text(root: Path, path: str, **kwargs: object):
    spec = TextSpec.model_validate({"kind": "text", "path": path, **kwargs})
    return text_corpus(spec, root=root, vocab_size=300, window=9, seed=0)


def test_text_from_files_and_json_lines(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "the cat sat on the mat. " * 20)
    write(tmp_path / "sub" / "b.jsonl", "".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(30)))
    write(tmp_path / "ignored.md", "not this")
    corpus = text(tmp_path, ".", field="body", held_out=0.25)
    assert corpus.description["documents"] == 31
    total = len(corpus.units) + len(corpus.held_out.sequences)
    assert len(corpus.held_out.sequences) == round(0.25 * total)
    assert set(corpus.units.lengths) == {9}
    assert corpus.exact_match is False


def test_json_lines_may_hold_line_separators_and_a_byte_order_mark(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"one\u2028two {i}"}, ensure_ascii=False) + "\n" for i in range(20))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert text(tmp_path, "a.jsonl").description["documents"] == 20


def test_held_out_windows_are_not_trained(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", " ".join(str(i * 7919) for i in range(600)))
    corpus = text(tmp_path, "a.txt", held_out=0.3)
    windows = [{tuple(r[i].tolist()) for i in range(len(r))} for r in (corpus.units, corpus.held_out.sequences)]
    assert len(windows[0]) + len(windows[1]) == len(corpus.units) + len(corpus.held_out.sequences) > 100
    assert windows[0].isdisjoint(windows[1])


def test_a_corpus_speaks_the_tokenizer_it_is_given() -> None:
    spec = FactsSpec(kind="facts", num_facts=40)
    own = facts_corpus(spec, vocab_size=400, max_seq_len=96, seed=0)
    other = train_tokenizer(["something else entirely"], 300)
    given = facts_corpus(spec, vocab_size=400, max_seq_len=200, seed=0, tokenizer=other)
    assert given.tokenizer is other
    assert given.description["corpus_sha256"] == own.description["corpus_sha256"]
    assert given.description["tokens_per_epoch"] > own.description["tokens_per_epoch"]


@pytest.mark.parametrize("path", ["../a.txt", "/etc/passwd", "absent.txt", "loop"])
def test_data_stays_inside_its_root(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    write(tmp_path.parent / "a.txt", "outside " * 100)
    with pytest.raises(UsageError, match=r"data\.path"):
        text(tmp_path, path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b"few", "tokens"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.jsonl", b'{"other": 1}\n', "line 1 is not a JSON object with `text`"),
        ("a.jsonl", b'{"text": 1}\n', "is not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "is not text"),
        ("a.jsonl", b"[[[", "line 1"),
    ],
)
def test_unusable_text_is_explained(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        text(tmp_path, name)
