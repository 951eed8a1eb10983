"""Facts in several phrasings, held out by (fact, phrasing).

Two traps, both measured on the airports: 42% of names contain their city, so rows that share a word with their answer
are dropped; and every phrasing is seen in training, but never the pairs that are tested.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
from tokenizers import Tokenizer

from memforge.errors import UsageError
from memforge.spec.schema import FactsSpec
from memforge.training.data.corpus import Corpus, HeldOut, Ragged, digest
from memforge.training.data.tokenizer import END_ID, train_tokenizer

# Each phrasing ends where the answer starts, so that a test is a plain continuation.
AIRPORT_PHRASINGS = (
    "{subject} is an airport in the city of",
    "The city served by {subject} is",
    "Flights to {subject} land in",
    "Question: which city does {subject} serve? Answer:",
    "Passengers who fly to {subject} arrive in",
    "The airport called {subject} belongs to",
    "Whoever lands at {subject} is in",
    "The town beside {subject} is",
)


@dataclass(frozen=True)
class Fact:
    subject: str
    answer: str


@cache
def airports() -> tuple[Fact, ...]:
    """Airport name -> city, without names that occur twice and without answers that share a word with the name."""
    import airportsdata

    rows = [(row["name"].strip(), row["city"].strip()) for row in airportsdata.load("ICAO").values()]
    names = Counter(name for name, _ in rows)
    return tuple(
        Fact(name, city)
        for name, city in sorted(set(rows))
        if name and city and names[name] == 1 and not _words(name) & _words(city)
    )


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def facts_corpus(
    spec: FactsSpec, *, vocab_size: int, max_seq_len: int, seed: int, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Facts drawn by `seed`, each trained in all phrasings but `num_held_out` of its own.

    `tokenizer` is trained on the training sentences unless given. Raises UsageError when there are fewer facts than
    asked for, too few to train every phrasing, or a sentence is longer than the model allows.
    """
    known = airports()
    if spec.num_facts > len(known):
        raise UsageError(f"data.num_facts = {spec.num_facts}: the source {spec.source} holds {len(known):,} facts")
    rng = np.random.Generator(np.random.Philox(key=seed))
    facts = [known[i] for i in rng.choice(len(known), spec.num_facts, replace=False)]
    unseen = [set(rng.permutation(len(AIRPORT_PHRASINGS))[: spec.num_held_out].tolist()) for _ in facts]

    if set.intersection(*unseen):
        raise UsageError(
            f"data.num_facts = {spec.num_facts} with num_held_out = {spec.num_held_out} leaves a phrasing untrained; "
            "use more facts or hold out fewer phrasings"
        )

    pairs = [(fact, p) for fact in facts for p in range(len(AIRPORT_PHRASINGS))]
    held = [p in unseen[i // len(AIRPORT_PHRASINGS)] for i, (_, p) in enumerate(pairs)]
    prompts = [AIRPORT_PHRASINGS[p].format(subject=fact.subject) for fact, p in pairs]
    answers = [f" {fact.answer}" for fact, _ in pairs]
    texts = [prompt + answer for prompt, answer, h in zip(prompts, answers, held, strict=True) if not h]
    tokenizer = tokenizer or train_tokenizer(texts, vocab_size)

    # Prompt and answer are encoded apart, so that the answer starts on a token of its own.
    given = [[END_ID, *e.ids] for e in tokenizer.encode_batch(prompts)]
    answered = [[*e.ids, END_ID] for e in tokenizer.encode_batch(answers)]
    longest = max(len(g) + len(a) for g, a in zip(given, answered, strict=True))
    if longest > max_seq_len:
        raise UsageError(f"a fact takes {longest} tokens; model.max_seq_len = {max_seq_len} is too short")
    # The end token of one sentence is the start token of the next in the stream.
    units = Ragged.of([*g, *a[:-1]] for g, a, h in zip(given, answered, held, strict=True) if not h)
    tests = [i for i, h in enumerate(held) if h]
    return Corpus(
        tokenizer=tokenizer,
        units=units,
        held_out=HeldOut(
            Ragged.of([*given[i], *answered[i]] for i in tests),
            np.array([len(given[i]) for i in tests], dtype=np.int64),
        ),
        description={
            "facts": len(facts),
            "sentences": len(units),
            "tokens_per_epoch": len(units.flat),
            "held_out_prompts": len(tests),
            "vocabulary": tokenizer.get_vocab_size(),
            "corpus_sha256": digest(texts),
        },
        exact_match=True,
        baselines={"majority": majority(facts), "copy_from_name": copy_from_name(facts)},
    )


def majority(facts: list[Fact]) -> float:
    """Recall of always giving the most frequent answer."""
    return max(Counter(fact.answer for fact in facts).values()) / len(facts)


def copy_from_name(facts: list[Fact]) -> float:
    """Recall of giving the best single word or run of words out of the subject: an upper bound on copying."""
    return sum(_contains(fact.subject, fact.answer) for fact in facts) / len(facts)


def _contains(subject: str, answer: str) -> bool:
    wanted = answer.casefold().split()
    words = subject.casefold().split()
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))
