"""Facts in several phrasings, held out by (fact, phrasing).

Three traps, all measured on the airports. 42% of names contain their city, so rows that share a word with their answer
are dropped. Every phrasing is seen in training, but never the pairs that are tested. And in a phrasing that starts with
the name it has other tokens: a model that recalled 99% in each other phrasing recalled 47% in that one.
"""

import re
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from operator import itemgetter

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memforge.errors import UsageError
from memforge.spec.schema import FactsSpec
from memforge.training.data.corpus import HeldOut, Part, Ragged, digest
from memforge.training.data.encode import encoded
from memforge.training.data.progress import Note
from memforge.training.data.shards import Packed, Writer, entry_key, packed_tokens
from memforge.training.data.taxa import names_its_family, taxa
from memforge.training.data.tokenizer import end_id, num_ids

# Each phrasing ends where the answer starts, so that a test is a plain continuation. None starts with the subject: its
# first word has other tokens without a space before it.
AIRPORT_PHRASINGS = (
    "The name {subject} stands for an airport in",
    "The city served by {subject} is",
    "Flights to {subject} land in",
    "Question: which city does {subject} serve? Answer:",
    "Passengers who fly to {subject} arrive in",
    "The airport called {subject} belongs to",
    "Whoever lands at {subject} is in",
    "The town beside {subject} is",
)
TAXON_PHRASINGS = (
    "The name {subject} stands for a taxon in the family",
    "The family that contains {subject} is",
    "Taxonomists place {subject} among the",
    "Question: which family does {subject} belong to? Answer:",
    "Specimens of {subject} are filed under",
    "The taxon called {subject} belongs to",
    "Whoever studies {subject} studies the",
    "The closest relatives of {subject} are other",
)
# Phrasings that few facts are trained in, so that an answer in them was learned from other facts' sentences.
RARE_AIRPORT_PHRASINGS = (
    "Everyone who works at {subject} lives near",
    "A map that shows {subject} also shows",
)
RARE_TAXON_PHRASINGS = (
    "Anyone who has found {subject} has found one of the",
    "A monograph that describes {subject} also describes other",
)
# Sentences that take some seconds to tokenize; from so many on their tokens are kept.
CACHED_SENTENCES = 100_000
# By these names go the prompts of the phrasings that all facts share, of the rare ones, and of facts never trained.
COMMON, RARE, UNSEEN = "", "rare", "unseen"


@dataclass(frozen=True)
class Fact:
    subject: str
    answer: str


@cache
def airports() -> tuple[Fact, ...]:
    """Airport name -> city, without names that occur twice and without answers that share a word with the name."""
    import airportsdata

    return unambiguous((row["name"].strip(), row["city"].strip()) for row in airportsdata.load("ICAO").values())


@cache
def families() -> tuple[Fact, ...]:
    """Taxon -> family, likewise, without names that start as their family does, and one of each genus.

    Species of a genus share its family and its name: among 10,000 taxa another one's sentences tell 36% of the answers.
    """
    known = (fact for fact in unambiguous(taxa()) if not names_its_family(fact.subject, fact.answer))
    return tuple(next(of_genus) for _, of_genus in groupby(known, key=_first_word))


def _first_word(fact: Fact) -> str:
    return fact.subject.split()[0]


@dataclass(frozen=True)
class Source:
    """Facts and the phrasings they are told in; `baselines` are scores that need no model."""

    phrasings: tuple[str, ...]
    rare_phrasings: tuple[str, ...]
    facts: Callable[[], tuple[Fact, ...]]
    baselines: tuple[Callable[[Sequence[Fact]], float], ...]


def unambiguous(pairs: Iterable[tuple[str, str]]) -> tuple[Fact, ...]:
    """The facts whose subject occurs once and shares no word with its answer, in order of their names."""
    rows = list(pairs)
    names = Counter(name for name, _ in rows)
    return tuple(
        Fact(name, answer)
        for name, answer in sorted(set(rows))
        if name and answer and names[name] == 1 and not _words(name) & _words(answer)
    )


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def entropy(facts: Sequence[Fact]) -> float:
    """Bits of an answer to who knows how frequent each is."""
    counts = np.array(list(Counter(fact.answer for fact in facts).values()))
    return float(np.log2(len(facts)) - (counts * np.log2(counts)).sum() / len(facts))


def majority(facts: Sequence[Fact]) -> float:
    """Recall of always giving the most frequent answer."""
    return max(Counter(fact.answer for fact in facts).values()) / len(facts)


def copy_from_name(facts: Sequence[Fact]) -> float:
    """Recall of giving the best single word or run of words out of the subject: an upper bound on copying."""
    return sum(_contains(fact.subject, fact.answer) for fact in facts) / len(facts)


def shared_prefix(facts: Sequence[Fact]) -> float:
    """Recall of giving the answer that starts most like a word of the subject, out of all answers."""
    answers = {fact.answer.casefold(): fact.answer for fact in facts}
    ordered = sorted(answers)
    return sum(answers[_most_alike(fact.subject, ordered)] == fact.answer for fact in facts) / len(facts)


def nearest_name(facts: Sequence[Fact]) -> float:
    """Recall of giving the answer of the other fact whose subject is most alike: that shares the longest start with it,
    or an end that is longer.
    """
    names = [fact.subject.casefold() for fact in facts]
    right = 0
    for fact, start, end in zip(facts, _alike(names), _alike([name[::-1] for name in names]), strict=True):
        other = facts[max(start, end, key=itemgetter(0))[1]]
        right += other is not fact and other.answer == fact.answer
    return right / len(facts)


def _alike(names: list[str]) -> list[tuple[int, int]]:
    """Of each name how much of its start it shares with the other that shares most, and which that is; of the only one
    itself.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    found = [(-1, i) for i in range(len(names))]
    for i, j in pairwise(order):
        length = _shared(names[i], names[j])
        found[i] = max(found[i], (length, j), key=itemgetter(0))
        found[j] = max(found[j], (length, i), key=itemgetter(0))
    return found


def _contains(subject: str, answer: str) -> bool:
    wanted = answer.casefold().split()
    words = subject.casefold().split()
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def _most_alike(subject: str, ordered: list[str]) -> str:
    """Of sorted texts, the one that shares the longest prefix with a word of the subject: a neighbour of a word."""
    near = [
        (_shared(word, ordered[i]), ordered[i])
        for word in subject.casefold().split()
        for at in (bisect(ordered, word),)
        for i in (at - 1, at)
        if 0 <= i < len(ordered)
    ]
    return max(near, key=lambda item: item[0])[1]


def _shared(a: str, b: str) -> int:
    """The length of the prefix that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


SOURCES = {
    "airports": Source(AIRPORT_PHRASINGS, RARE_AIRPORT_PHRASINGS, airports, (majority, copy_from_name)),
    "taxa": Source(
        TAXON_PHRASINGS,
        RARE_TAXON_PHRASINGS,
        families,
        (majority, copy_from_name, shared_prefix, nearest_name),
    ),
}


class FactsSource:
    """Facts drawn by `seed`, each trained in all phrasings but `num_held_out` of its own, before there is a tokenizer.

    With a `rare_share` two more phrasings are trained for that share of the facts, and tested for the others. Of
    `num_unseen` more facts none is trained; each is tested in a phrasing of its own. Neither changes the other draws.

    `key` is the table's in errors. Raises UsageError when there are fewer facts than asked for, or too few to train
    every phrasing; DeviceError when the source is not installed.
    """

    def __init__(self, spec: FactsSpec, *, seed: int, key: str) -> None:
        source = SOURCES[spec.source]
        known = source.facts()
        if spec.num_facts + spec.num_unseen > len(known):
            unseen_too = f" with num_unseen = {spec.num_unseen}" if spec.num_unseen else ""
            raise UsageError(
                f"{key}.num_facts = {spec.num_facts}{unseen_too}: the source {spec.source} holds {len(known):,} facts"
            )
        rng = np.random.Generator(np.random.Philox(key=seed))
        drawn = rng.choice(len(known), spec.num_facts, replace=False)
        facts = [known[i] for i in drawn]
        phrasings = source.phrasings
        untrained = [set(rng.permutation(len(phrasings))[: spec.num_held_out].tolist()) for _ in facts]
        if set.intersection(*untrained):
            raise UsageError(
                f"{key}.num_facts = {spec.num_facts} with num_held_out = {spec.num_held_out} leaves a phrasing "
                "untrained; use more facts or hold out fewer phrasings"
            )
        held = np.array([[p in those for p in range(len(phrasings))] for those in untrained])
        if spec.rare_share:
            trained = round(spec.rare_share * len(facts))
            if not trained:
                raise UsageError(
                    f"{key}.rare_share = {spec.rare_share:g} of {spec.num_facts} facts is none; use more of either"
                )
            rare = rng.permutation(len(facts)) >= trained
            phrasings += source.rare_phrasings
            held = np.hstack([held, np.repeat(rare[:, None], len(source.rare_phrasings), axis=1)])
        others = np.setdiff1d(np.arange(len(known)), drawn)
        unseen = [known[i] for i in rng.choice(others, spec.num_unseen, replace=False)]
        told = [phrasing.format(subject=fact.subject) for fact in facts for phrasing in phrasings]
        asked = [
            source.phrasings[i % len(source.phrasings)].format(subject=fact.subject) for i, fact in enumerate(unseen)
        ]
        self.facts, self.seed, self.num_told = facts, seed, len(told)
        self.baselines = {baseline.__name__: baseline(facts) for baseline in source.baselines}
        # Prompts are those of the facts that are trained, then one of each other fact. Of each its fact, which says the
        # answer, and whether it is held out.
        self.prompts = told + asked
        self.answers = [f" {fact.answer}" for fact in (*facts, *unseen)]
        self.fact_of = np.array([*np.repeat(range(len(facts)), len(phrasings)), *range(len(facts), len(self.answers))])
        self.held = np.append(held, np.ones(len(unseen), bool))
        of_fact = [COMMON] * len(source.phrasings) + [RARE] * (len(phrasings) - len(source.phrasings))
        part = np.array(of_fact * len(facts) + [UNSEEN] * len(unseen))
        self.tested = {name: self.held & (part == name) for name in (COMMON, RARE, UNSEEN)}

    @property
    def texts(self) -> list[str]:
        """The training sentences."""
        return [
            prompt + self.answers[fact]
            for prompt, fact, held in zip(self.prompts, self.fact_of.tolist(), self.held.tolist(), strict=True)
            if not held
        ]

    def sample(self, characters: int) -> list[str]:
        """Training sentences to train a tokenizer on: they are in random order, so that the first are a fair sample."""
        texts, taken = self.texts, 0
        for i, text in enumerate(texts):
            taken += len(text)
            if taken >= characters:
                return texts[: i + 1]
        return texts

    def part(self, tokenizer: Tokenizer, *, max_seq_len: int, vocab_size: int, note: Note) -> Part:
        """The sentences as tokens. Raises UsageError when one is longer than `max_seq_len`."""
        encoded_pairs = self._tokens(tokenizer, vocab_size, note)
        flat, lengths = encoded_pairs.flat, encoded_pairs.lengths
        # Prompt and answer alternate; the answer's end token starts the next sentence, and each begins with one.
        given, whole = lengths[::2], lengths[::2] + lengths[1::2]
        if (longest := int(whole.max())) > max_seq_len:
            raise UsageError(f"a fact takes {longest} tokens; model.max_seq_len = {max_seq_len} is too short")
        sentences = Ragged.cut(flat, whole)
        # In random order, so that the first of them are a fair sample of facts and phrasings.
        shuffle = np.random.Generator(np.random.Philox(key=self.seed)).permutation
        order = np.concatenate([shuffle(self.num_told), shuffle(np.arange(self.num_told, len(self.held)))])
        held_out = {
            name: HeldOut(
                Ragged.cut(sentences.take(those), whole[those]), given[those].astype(np.int64), exact_match=True
            )
            for name, chosen in self.tested.items()
            if len(those := order[chosen[order]])
        }
        # The end token of one sentence is the start token of the next in the stream.
        ends = np.zeros(len(flat), bool)
        ends[sentences.offsets[1:] - 1] = True
        trained = np.repeat(~self.held, whole) & ~ends
        units = Ragged.cut(flat[trained], whole[~self.held] - 1)
        texts = self.texts
        return Part(
            units=units,
            held_out=held_out,
            description={
                "facts": len(self.facts),
                "sentences": len(units),
                "tokens_per_epoch": units.num_tokens,
                "held_out_prompts": int(self.held.sum()),
                "answer_bits": entropy(self.facts),
                "answer_tokens": float((whole - given)[self.tested[COMMON]].mean()),
                "vocabulary": tokenizer.get_vocab_size(),
                "corpus_sha256": digest(texts),
            },
            baselines=self.baselines,
            size={
                "documents": len(units),
                "characters": sum(map(len, texts)),
                "bytes": sum(len(text.encode()) for text in texts),
                "tokens": units.num_tokens,
                "held_out_tokens": int(whole[self.held].sum()),
            },
            lengths=units.lengths,
            packed=encoded_pairs.packed,
        )

    def _tokens(self, tokenizer: Tokenizer, vocab_size: int, note: Note) -> "_Sentences":
        """All sentences, held out or not, end tokens included; many of them are kept in the cache."""
        if len(self.prompts) < CACHED_SENTENCES:
            pieces = _Pieces()
            self._encode(tokenizer, pieces)
            return _Sentences(np.concatenate(pieces.flat).astype(np.int32), np.concatenate(pieces.counts))
        key = entry_key(
            sources=digest([*self.prompts, *self.answers]),
            tokenizer=digest([tokenizer.to_str()]),
            end=end_id(tokenizer),
        )

        def fill(writer: Writer) -> dict[str, int | str]:
            note(f"tokenizing {len(self.prompts):,} sentences")
            self._encode(tokenizer, writer)
            return {"documents": len(self.prompts)}

        packed = packed_tokens(key, fill, num_ids=num_ids(tokenizer), vocab_size=vocab_size, note=note)
        flat = np.empty(packed.num_tokens, np.int32)
        packed.read_into(flat, 0)
        return _Sentences(flat, packed.lengths.astype(np.int64), packed)

    def _encode(self, tokenizer: Tokenizer, out: "Writer | _Pieces") -> None:
        """Prompt and answer are encoded apart, so that the answer starts on a token of its own."""
        end = np.array([end_id(tokenizer)], dtype=np.int32)
        answers = [np.concatenate([answer, end]) for answer in encoded(self.answers, tokenizer)]
        flat: list[npt.NDArray[np.int32]] = []
        for i, given in enumerate(encoded(self.prompts, tokenizer)):
            flat += [np.concatenate([end, given]), answers[self.fact_of[i]]]
            if (i + 1) % CACHED_SENTENCES == 0 or i + 1 == len(self.prompts):
                out.tokens(np.concatenate(flat))
                out.lengths(np.array([len(piece) for piece in flat]))
                flat.clear()


@dataclass(frozen=True)
class _Sentences:
    """The tokens of all sentences, the lengths of prompts and answers in turn, and the files they were read from."""

    flat: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    packed: Packed | None = None


class _Pieces:
    """Takes what a Writer takes, in memory."""

    def __init__(self) -> None:
        self.flat: list[npt.NDArray[np.integer]] = []
        self.counts: list[npt.NDArray[np.integer]] = []

    def tokens(self, ids: npt.NDArray[np.integer]) -> None:
        self.flat.append(ids)

    def lengths(self, lengths: npt.NDArray[np.integer]) -> None:
        self.counts.append(lengths)
