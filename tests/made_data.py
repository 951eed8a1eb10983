"""Corpora and packed tokens as the tests of data make them."""

from pathlib import Path

import numpy as np
from conftest import SMALL, write
from tokenizers import Tokenizer

from memforge.plan import make_plan
from memforge.spec import load_spec
from memforge.spec.schema import FactsSpec
from memforge.training.data import Corpus, load_corpus, shards
from memforge.training.data.corpus import Ragged
from memforge.training.data.facts import (
    FactsSource,
)
from memforge.training.data.shards import Packed, packed_tokens
from memforge.training.data.tokenizer import train_tokenizer

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


def packed_of(tokens: np.ndarray, *, num_ids: int = 500, vocab_size: int = 500, note=print, key: str = "k") -> Packed:
    def fill(writer: shards.Writer) -> dict[str, int | str]:
        for part in np.array_split(tokens, 7):
            writer.tokens(part)
        writer.lengths(np.array([len(tokens)]))
        return {"documents": 1}

    return packed_tokens(key, fill, num_ids=num_ids, vocab_size=vocab_size, note=note)
