"""What a corpus is made of, as plain data for reports."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memforge.errors import printable
from memforge.plan import Plan
from memforge.training.data.corpus import Corpus, Part
from memforge.training.data.stream import cycle_counts
from memforge.training.data.tokenizer import num_ids

# The most frequent tokens that are named, and over how many their share is summed.
NAMED, TOP = 5, 100
BLOCK_TOKENS = 2**22


def corpus_stats(corpus: Corpus, plan: Plan) -> dict[str, Any]:
    """Documents, tokens, frequencies and what [train] would read of each part.

    Of text, held-out windows are counted too. Lengths are tokens. Cost: every token is read once.
    """
    train = plan.run.train
    assert train is not None
    epochs = corpus.epochs(train.steps * train.batch_size, train.seq_len + 1)
    counts = cycle_counts([corpus.weights[name] for name in corpus.parts])
    parts = [
        {"part": name, "share": count / sum(counts), "epochs": epochs[name]}
        | _part_stats(part, corpus.tokenizer, epochs[name])
        for (name, part), count in zip(corpus.parts.items(), counts, strict=True)
    ]
    return {
        "name": plan.name,
        "vocabulary": corpus.tokenizer.get_vocab_size(),
        "vocab_size": plan.model.vocab_size,
        "steps": train.steps,
        "train_tokens": train.steps * train.batch_size * train.seq_len,
        "parts": parts,
    }


def prepared(corpus: Corpus, plan: Plan) -> dict[str, Any]:
    """Where the tokens of each part lie and how many there are; sizes are bytes on disk, 0 for what stays in memory."""
    return {
        "name": plan.name,
        "vocabulary": corpus.tokenizer.get_vocab_size(),
        "parts": [_place(name, part) for name, part in corpus.parts.items()],
        "description": corpus.description,
    }


def _place(name: str, part: Part) -> dict[str, Any]:
    packed = part.packed
    return {
        "part": name,
        "documents": part.size["documents"],
        "tokens": part.size["tokens"],
        "training_tokens": part.units.num_tokens,
        "shards": len(packed.shards) if packed else 0,
        "bytes": packed.num_bytes if packed else 0,
        "directory": str(packed.directory) if packed else None,
        "temporary": packed is not None and packed.keeper is not None,
    }


def _part_stats(part: Part, tokenizer: Tokenizer, epochs: float) -> dict[str, Any]:
    counts = _counts(part, num_ids(tokenizer))
    tokens, size = int(counts.sum()), part.size
    order = np.argsort(-counts, kind="stable")
    held_out = int(size["held_out_tokens"])
    exposures = "facts" in part.description
    return {
        "documents": size["documents"],
        "tokens": size["tokens"],
        "tokens_per_character": int(size["tokens"]) / int(size["characters"]),
        "tokens_per_byte": int(size["tokens"]) / int(size["bytes"]),
        "vocabulary_used": int((counts > 0).sum()),
        "median_document": float(np.median(part.lengths)),
        "longest_document": int(part.lengths.max()),
        "top_tokens_share": float(counts[order[:TOP]].sum() / tokens),
        "most_frequent": [
            {"token": _shown(tokenizer, int(i)), "share": float(counts[i] / tokens)} for i in order[:NAMED]
        ],
        "training_tokens": part.units.num_tokens,
        "held_out_share": held_out / (held_out + part.units.num_tokens),
        "exposures_per_fact": _exposures(part, epochs) if exposures else None,
        "baselines": part.baselines,
    }


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token in quotes, special tokens by their names."""
    return f'"{printable(tokenizer.decode([token], skip_special_tokens=False))}"'


def _exposures(part: Part, epochs: float) -> float:
    """How often training shows each fact, in any phrasing."""
    return epochs * float(part.description["sentences"]) / float(part.description["facts"])


def _counts(part: Part, ids: int) -> npt.NDArray[np.int64]:
    """How often each token occurs: [ids]."""
    counts = np.zeros(ids, np.int64)
    for block in _blocks(part):
        counts += np.bincount(block, minlength=ids)
    return counts


def _blocks(part: Part) -> Iterator[npt.NDArray[np.int32]]:
    """The tokens that `size` counts: of text all, of facts those that are trained."""
    total = int(part.size["tokens"])
    if part.packed is None or "facts" in part.description:
        for start in range(0, len(part.units), BLOCK_TOKENS):
            yield part.units.take(np.arange(start, min(start + BLOCK_TOKENS, len(part.units))))
        return
    for start in range(0, total, BLOCK_TOKENS):
        part.packed.require_unchanged()
        block = np.empty(min(BLOCK_TOKENS, total - start), np.int32)
        part.packed.read_into(block, start)
        yield block
