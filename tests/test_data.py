"""Text, mixtures and tokenizers: what becomes a corpus, and what is refused."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, SMALL, memforge, write
from hypothesis import given, settings
from hypothesis import strategies as st
from made_data import FACTS, facts, loaded
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from memforge.errors import SpecError, UsageError
from memforge.plan import make_plan
from memforge.report.diagnostics import render
from memforge.spec import load_spec
from memforge.spec.schema import MIXTURE_CYCLE
from memforge.training.data import Corpus, load_corpus
from memforge.training.data.corpus import Ragged
from memforge.training.data.documents import PIECE_CHARS, cut_into_pieces
from memforge.training.data.stats import corpus_stats
from memforge.training.data.stream import MixtureStream, Stream, cycle_counts
from memforge.training.data.tokenizer import END_ID, end_id, read_tokenizer, train_tokenizer


def mixture(seed: int = 3) -> MixtureStream:
    parts = [Stream(Ragged.of([[part * 1000 + i] * 4 for i in range(50)]), window=8, seed=seed) for part in range(3)]
    return MixtureStream(parts, cycle_counts([0.7, 0.25, 0.05]), seed=seed)


def test_every_cycle_holds_each_part_in_its_exact_share() -> None:
    counts = cycle_counts([0.7, 0.25, 0.05])
    assert counts == [2867, 1024, 205]
    assert sum(counts) == MIXTURE_CYCLE
    windows = mixture().windows(0, 3 * MIXTURE_CYCLE)[:, 0] // 1000
    cycles = windows.reshape(3, MIXTURE_CYCLE)
    assert all(np.bincount(cycle).tolist() == counts for cycle in cycles)
    assert not np.array_equal(cycles[0], cycles[1])


def test_a_part_of_a_mixture_is_read_in_the_order_it_has_alone() -> None:
    mixed = mixture()
    windows = mixed.windows(0, 2 * MIXTURE_CYCLE)
    for part, one in enumerate(mixed.streams):
        found = windows[windows[:, 0] // 1000 == part]
        assert np.array_equal(found, one.windows(0, len(found)))


def test_windows_of_a_mixture_are_a_function_of_their_position() -> None:
    whole = mixture().windows(0, 2 * MIXTURE_CYCLE)
    for start, count in ((0, 1), (13, 5), (MIXTURE_CYCLE - 3, 9), (MIXTURE_CYCLE, 40), (5, 0)):
        assert np.array_equal(mixture().windows(start, count), whole[start : start + count])
    assert not np.array_equal(mixture(4).windows(0, 100), whole[:100])


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_shares_are_off_by_less_than_a_window(weights: list[float]) -> None:
    counts = cycle_counts(weights)
    assert sum(counts) == MIXTURE_CYCLE
    exact = [weight / sum(weights) * MIXTURE_CYCLE for weight in weights]
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))


MIXTURE = """\
kind = "mixture"
weights = { airports = 0.3, words = 0.7 }

[data.parts.airports]
kind = "facts"
num_facts = 12

[data.parts.words]
kind = "text"
path = "a.txt"
"""


def words(count: int = 3000) -> str:
    return " ".join(str(i * 7919) for i in range(count))


def test_a_mixture_has_both_parts_in_their_shares_and_a_tokenizer_of_both(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", words())
    corpus = loaded(tmp_path, MIXTURE, "model.vocab_size=600")
    assert list(corpus.held_out) == list(corpus.parts) == ["airports", "words"]
    assert [held.exact_match for held in corpus.held_out.values()] == [True, False]
    assert corpus.baselines == {"airports.majority": pytest.approx(1 / 12), "airports.copy_from_name": 0.0}
    read = corpus.stream(49, 0).windows(0, MIXTURE_CYCLE)
    own = {part.tobytes() for part in corpus.stream(49, 0).streams[1].windows(0, MIXTURE_CYCLE)}
    assert sum(window.tobytes() in own for window in read) == cycle_counts([0.3, 0.7])[1]
    description = corpus.description
    parts = [description["airports.tokens_per_epoch"], description["words.tokens_per_epoch"]]
    assert description["tokens_per_epoch"] == sum(parts) == corpus.stream(49, 0).epoch_tokens
    assert (description["facts"], description["documents"]) == (12, 1)
    # It knows the words of the facts, which the text has none of: alone it would need a token for each letter.
    assert len(corpus.tokenizer.encode("The town beside").ids) < len("The town beside") / 2


def test_epochs_of_a_mixture_are_counted_by_part(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", words())
    corpus = loaded(tmp_path, MIXTURE)
    epochs = corpus.epochs(MIXTURE_CYCLE, 49)
    for name, count in zip(corpus.parts, cycle_counts([0.3, 0.7]), strict=True):
        assert epochs[name] == pytest.approx(count * 49 / corpus.parts[name].units.num_tokens)


@pytest.mark.parametrize(
    ("before", "after", "line", "message"),
    [
        ("num_facts = 12", "num_fact = 12", 32, "unknown key `num_fact`"),
        ("words = 0.7 }", "word = 0.7 }", 28, "no table [data.parts.word]; the parts are airports, words"),
        (", words = 0.7 }", " }", 28, "no weight for the part words"),
        ("words = 0.7 }", "words = 0 }", 28, "must be more than"),
        ("words = 0.7 }", "words = 1e-5 }", 28, "gives less than one window in 4,096 to the part words"),
        ('path = "a.txt"', 'path = "b.txt"', 36, "no such file or directory: b.txt"),
        ('path = "a.txt"', 'path = "a.txt"\ntokenizer = "t.json"', 37, "the parts share one tokenizer"),
        ("weights = {", 'tokenizer = "."\nweights = {', 28, "not a file: ."),
        ('kind = "text"\n', 'kind = "texts"\n', 35, "unknown kind `texts`"),
        ("[data.parts.words]", '[data.parts."w s"]', 34, "`w s` must be letters, digits"),
    ],
)
def test_mistakes_in_a_mixture_are_shown_where_they_stand(
    tmp_path: Path, before: str, after: str, line: int, message: str
) -> None:
    write(tmp_path / "a.txt", words())
    text = SMALL.replace(FACTS, MIXTURE)
    assert before in text
    spec = write(tmp_path / "s.toml", text.replace(before, after, 1))
    with pytest.raises(SpecError) as caught:
        load_spec(spec, require_data=True)
    (headline, *_) = render(caught.value.diagnostics)
    assert f"s.toml:{line}:" in headline
    assert message in headline


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


def word_tokenizer(*special: str, words: int = 20) -> Tokenizer:
    """One token a word, with a start token, truncation and padding, as tokenizers of others have them."""
    vocabulary = {token: i for i, token in enumerate(["[UNK]", *special, *(f"w{i}" for i in range(words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[UNK] $A", special_tokens=[("[UNK]", 0)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding()
    return tokenizer


@pytest.mark.parametrize("end", ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>"])
def test_a_tokenizer_of_others_is_used_as_it_is(tmp_path: Path, end: str) -> None:
    word_tokenizer("x", end).save(str(tmp_path / "t.json"))
    write(tmp_path / "a.jsonl", "".join(json.dumps({"text": "w1 w2 w3 w4 w5"}) + "\n" for _ in range(40)))
    corpus = loaded(tmp_path, 'kind = "text"\npath = "a.jsonl"\ntokenizer = "t.json"', "train.seq_len=5")
    assert end_id(corpus.tokenizer) == 2
    window = corpus.stream(6, 0).windows(0, 1)[0]
    assert window.tolist() == [2, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (word_tokenizer("</s>", words=400).to_str(), "has 402 tokens, more than model.vocab_size = 300"),
        (word_tokenizer().to_str(), r"no token that separates documents; looked for <\|end\|>, <\|endoftext\|>, </s>"),
        ("{}", "is not a JSON file of the library"),
        ("\ud800".encode("utf-8", "surrogatepass"), "utf-8"),
    ],
    ids=["large", "no-end", "other-json", "binary"],
)
def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    (tmp_path / "t.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as caught:
        read_tokenizer(tmp_path, "t.json", vocab_size=300)
    assert str(caught.value).startswith("data.tokenizer t.json: ")


@pytest.mark.parametrize("name", ["../t.json", "absent.json", "."])
def test_a_tokenizer_stays_inside_the_data_root(tmp_path: Path, name: str) -> None:
    word_tokenizer("</s>").save(str(tmp_path / "t.json"))
    (tmp_path / "root").mkdir()
    with pytest.raises(UsageError, match=r"data\.tokenizer"):
        read_tokenizer(tmp_path / "root", name, vocab_size=300)


def test_a_corpus_speaks_the_tokenizer_it_is_given() -> None:
    own = facts()
    other = train_tokenizer(["something else entirely"], 300)
    given_ = facts(tokenizer=other)
    assert given_.tokenizer is other
    assert given_.description["corpus_sha256"] == own.description["corpus_sha256"]
    assert given_.description["tokens_per_epoch"] > own.description["tokens_per_epoch"]


@given(st.lists(st.text(" ab\n\té", max_size=300), max_size=6), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_pieces_are_the_text_and_bounded(chunks: list[str], scale: int) -> None:
    chunks = [chunk * 10 ** (scale + 1) for chunk in chunks]
    pieces = list(cut_into_pieces(chunks))
    assert "".join(pieces) == "".join(chunks)
    assert all(0 < len(piece) <= PIECE_CHARS for piece in pieces)


def test_cutting_a_document_changes_no_token() -> None:
    text = "It's 12  spaces,\n\nlines\tand ünïcode; " * 9000
    tokenizer = train_tokenizer([text[:5000]], 400)
    pieces = list(cut_into_pieces([text]))
    assert len(pieces) > 3
    assert [i for piece in pieces for i in tokenizer.encode(piece).ids] == tokenizer.encode(text).ids


def text(root: Path, path: str, *overrides: str, **keys: object) -> Corpus:
    given_ = "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items())
    return loaded(root, f'kind = "text"\npath = {json.dumps(path)}\n{given_}', "train.seq_len=8", *overrides)


def test_text_from_files_and_json_lines(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "the cat sat on the mat. " * 20)
    write(tmp_path / "sub" / "b.jsonl", "".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(30)))
    write(tmp_path / "ignored.md", "not this")
    corpus = text(tmp_path, ".", field="body", held_out=0.25)
    assert corpus.description["documents"] == 31
    held = corpus.held_out[""]
    total = len(corpus.parts[""].units) + len(held.sequences)
    assert len(held.sequences) == corpus.description["held_out_windows"] == round(0.25 * total)
    assert set(held.sequences.lengths) == {9}
    assert set(held.scored_from) == {1}
    assert held.exact_match is False


def test_json_lines_may_hold_line_separators_and_a_byte_order_mark(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"one\u2028two {i}"}, ensure_ascii=False) + "\n" for i in range(20))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert text(tmp_path, "a.jsonl").description["documents"] == 20


def test_documents_without_text_are_left_out(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": "" if i % 2 else f"line {i}"}) + "\n" for i in range(20))
    write(tmp_path / "a.jsonl", lines)
    corpus = text(tmp_path, "a.jsonl")
    assert corpus.description["documents"] == 10
    assert len(corpus.parts[""].lengths) == 10
    assert corpus.parts[""].lengths.sum() == corpus.parts[""].size["tokens"]


def test_every_window_is_trained_or_held_out_and_none_is_both(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", words(600))
    corpus = text(tmp_path, "a.txt", held_out=0.3)
    units, held = corpus.parts[""].units, corpus.held_out[""].sequences
    one = corpus.stream(9, 0)
    trained = [tuple(w.tolist()) for w in one.windows(0, 3 * len(units))]
    assert Counter(Counter(trained).values()) == {3: len(units)}
    kept = {tuple(held[i].tolist()) for i in range(len(held))}
    assert len(set(trained)) + len(kept) == len(units) + len(held) > 100
    assert kept.isdisjoint(trained)


def test_a_run_may_read_windows_of_another_length_than_they_were_held_out_in(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", words(600))
    corpus = text(tmp_path, "a.txt", held_out=0.3)
    flat = corpus.stream(9, 5).windows(0, 40).reshape(-1)
    assert np.array_equal(corpus.stream(4, 5).windows(0, 90), flat.reshape(90, 4))


def test_only_the_held_out_windows_that_are_scored_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", words(600))
    many, few = text(tmp_path, "a.txt", held_out=0.3), text(tmp_path, "a.txt", "eval.max_prompts=5", held_out=0.3)
    assert len(few.held_out[""].sequences) == 5
    assert few.description == many.description
    assert all(np.array_equal(few.held_out[""].sequences[i], many.held_out[""].sequences[i]) for i in range(5))
    assert np.array_equal(few.stream(9, 0).windows(0, 50), many.stream(9, 0).windows(0, 50))


def test_the_tokens_of_text_do_not_depend_on_shards_or_pieces(cache: Path, tmp_path: Path) -> None:
    write(tmp_path / "a.txt", words(20_000))
    corpus = text(tmp_path, "a.txt")
    packed = corpus.parts[""].packed
    assert len(packed.shards) > 100
    flat = np.empty(packed.num_tokens, np.int32)
    packed.read_into(flat, 0)
    assert flat.tolist() == [END_ID, *corpus.tokenizer.encode(words(20_000)).ids]


def test_a_data_root_that_is_not_there_is_named(tmp_path: Path) -> None:
    spec = REPO / "specs" / "text-demo.toml"
    done = memforge("train", spec, "--data-root", tmp_path / "nowhere", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert f"starts at {tmp_path / 'nowhere'}, which is no directory; --data-root DIR" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["../a.txt", "/etc/passwd", "absent.txt", "loop", "folder"])
def test_data_stays_inside_its_root(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    outside = write(tmp_path.parent / "a.txt", "outside " * 100)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link.txt").symlink_to(outside)
    with pytest.raises(UsageError, match=r"data\.path"):
        text(tmp_path, path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b"few", "tokens"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt is not UTF-8 text \(byte 0\)"),
        ("a.txt", b"long enough\n" * 20_000 + b"\xff", r"not UTF-8 text \(byte 240000\)"),
        ("a.txt", b"long enough\n" * 20_000 + b"\0", r"is binary, not text \(byte 240000 is 0\)"),
        ("a.jsonl", b'{"other": 1}\n', "line 1 is not a JSON object with `text`"),
        ("a.jsonl", b'{"text": 1}\n', "is not text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "is not text"),
        ("a.jsonl", b"[[[", "line 1"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xe9"}\n', r"not UTF-8 text \(byte 25\)"),
    ],
)
def test_unusable_text_is_explained(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        text(tmp_path, name)


def test_statistics_count_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "".join(json.dumps({"text": "é" * (i + 1)}) + "\n" for i in range(40)))
    spec = write(
        tmp_path / "s.toml",
        SMALL.replace(FACTS, 'kind = "text"\npath = "a.jsonl"').replace("seq_len = 48", "seq_len = 8"),
    )
    plan = make_plan(load_spec(spec))
    corpus = load_corpus(plan, tmp_path)
    (part,) = corpus_stats(corpus, plan)["parts"]
    characters = sum(range(1, 41))
    tokens = part["tokens"]
    assert (part["documents"], part["share"]) == (40, 1.0)
    assert part["tokens_per_character"] == tokens / characters
    assert part["tokens_per_byte"] == tokens / (2 * characters)
    assert part["epochs"] == pytest.approx(4 * 4 * 9 / part["training_tokens"])
    assert part["held_out_share"] == pytest.approx(9 / (9 + part["training_tokens"]), rel=0.5)
    assert part["top_tokens_share"] == 1.0
    assert part["longest_document"] == corpus.parts[""].lengths.max()
    assert part["vocabulary_used"] >= 2
    assert any(token["token"] == '"<|end|>"' and token["share"] == 40 / tokens for token in part["most_frequent"])
