"""The user's own text: .txt files are one document each, .jsonl files one a line."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from memforge.errors import UsageError, is_text, printable
from memforge.spec.load import data_path
from memforge.spec.schema import TextSpec
from memforge.training.data.corpus import Corpus, HeldOut, Ragged, digest, split_evenly
from memforge.training.data.tokenizer import END_ID, train_tokenizer

# BPE training reads this much text; more changes the merges of a small vocabulary very little.
TOKENIZER_CHARACTERS = 20_000_000


def text_corpus(
    spec: TextSpec, *, root: Path, vocab_size: int, window: int, seed: int, tokenizer: Tokenizer | None = None
) -> Corpus:
    """Documents joined by end tokens and cut into windows; a share of the windows, chosen by `seed`, is held out.

    Raises UsageError when there is no text, or fewer than two windows of it.
    """
    try:
        path = data_path(root, spec.path)
    except ValueError as error:
        raise UsageError(f"data.path {printable(spec.path)}: {error}") from None
    documents = [text for text in _documents(path, spec.field) if text]
    if not documents:
        raise UsageError(f"data.path {printable(spec.path)}: no text in any .txt or .jsonl file")
    tokenizer = tokenizer or train_tokenizer(_sample(documents), vocab_size)
    flat = np.fromiter((t for e in tokenizer.encode_batch(documents) for t in (END_ID, *e.ids)), dtype=np.int32)
    blocks = [flat[s] for s in split_evenly(len(flat) // window * window, window)]
    if len(blocks) < 2:
        raise UsageError(
            f"data.path {printable(spec.path)}: {len(flat):,} tokens; at least {2 * window:,} are needed for "
            f"train.seq_len = {window - 1}"
        )
    num_held = min(max(1, round(spec.held_out * len(blocks))), len(blocks) - 1)
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(blocks))
    # Held-out windows stay in random order, so that the first `max_prompts` of them are a fair sample.
    held, kept = order[:num_held], sorted(order[num_held:])
    return Corpus(
        tokenizer=tokenizer,
        units=Ragged.of(blocks[i].tolist() for i in kept),
        held_out=HeldOut(Ragged.of(blocks[i].tolist() for i in held), np.ones(num_held, dtype=np.int64)),
        description={
            "documents": len(documents),
            "tokens_per_epoch": len(kept) * window,
            "held_out_windows": num_held,
            "vocabulary": tokenizer.get_vocab_size(),
            "corpus_sha256": digest(documents),
        },
        exact_match=False,
    )


def _documents(path: Path, field: str) -> Iterator[str]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl"))
    for file in files:
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(f"data.path: {printable(file.name)} is not UTF-8 text (byte {error.start})") from None
        if file.suffix == ".jsonl":
            yield from _json_lines(text, field, file.name)
        else:
            yield text


def _json_lines(text: str, field: str, name: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(
                f"data.path: {printable(name)} line {number} is not a JSON object with `{printable(field)}`"
            ) from None
        if not isinstance(value, str) or not is_text(value):
            raise UsageError(f"data.path: {printable(name)} line {number}: `{printable(field)}` is not text")
        yield value


def _sample(documents: list[str]) -> list[str]:
    sample, left = [], TOKENIZER_CHARACTERS
    for text in documents:
        sample.append(text[:left])
        left -= len(sample[-1])
        if left <= 0:
            break
    return sample
