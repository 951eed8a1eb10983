"""Data: from the [data] table to a `Corpus`."""

from itertools import cycle
from pathlib import Path

from tokenizers import Tokenizer

from memforge.errors import UsageError
from memforge.plan import Plan, TrainPlan
from memforge.spec.schema import FactsSpec, MixtureSpec
from memforge.training.data.corpus import Corpus, HeldOut, Part
from memforge.training.data.facts import FactsSource
from memforge.training.data.prefetch import Prefetch
from memforge.training.data.progress import Note, ignore
from memforge.training.data.stream import Stream
from memforge.training.data.text import TextSource
from memforge.training.data.tokenizer import read_tokenizer, train_tokenizer

__all__ = ["Corpus", "HeldOut", "Prefetch", "Stream", "load_corpus"]

# BPE training reads this much text; more changes the merges of a small vocabulary very little.
TOKENIZER_CHARACTERS = 20_000_000


def load_corpus(plan: Plan, data_root: Path, tokenizer: Tokenizer | None = None, *, note: Note = ignore) -> Corpus:
    """The corpus of a plan, in the tokens of `tokenizer`, or of data.tokenizer, or of one trained on it.

    `note` is told about work that takes long. Raises UsageError when the plan has no data or the data does not fit it,
    DeviceError when a package that it needs is absent, StorageError when it cannot be read or its tokens not be kept.
    """
    data, train = plan.run.data, plan.run.train
    if data is None or train is None:
        raise UsageError(f"{plan.name}: training needs the tables [data] and [train]")
    mixed = isinstance(data, MixtureSpec)
    tables = {f"data.parts.{name}": part for name, part in data.parts.items()} if mixed else {"data": data}
    names = list(data.parts) if mixed else [""]
    weights = {name: data.weights[name] if mixed else 1.0 for name in names}
    sources = [
        FactsSource(table, seed=train.seed, key=key)
        if isinstance(table, FactsSpec)
        else TextSource(table, root=data_root, key=key)
        for key, table in tables.items()
    ]
    if tokenizer is None and data.tokenizer is not None:
        tokenizer = read_tokenizer(data_root, data.tokenizer, vocab_size=plan.model.vocab_size)
    if tokenizer is None:
        texts = tokenizer_sample(sources, list(weights.values()))
        tokenizer = train_tokenizer(texts, plan.model.vocab_size, note=note)
    parts = {name: _part(source, tokenizer, plan, train, note) for name, source in zip(names, sources, strict=True)}
    return Corpus.of(tokenizer, parts, weights)


def _part(source: FactsSource | TextSource, tokenizer: Tokenizer, plan: Plan, train: TrainPlan, note: Note) -> Part:
    vocab_size = plan.model.vocab_size
    if isinstance(source, FactsSource):
        return source.part(tokenizer, max_seq_len=plan.model.max_seq_len, vocab_size=vocab_size, note=note)
    return source.part(
        tokenizer,
        window=train.seq_len + 1,
        seed=train.seed,
        vocab_size=vocab_size,
        max_held_out=plan.run.eval.max_prompts,
        note=note,
    )


def tokenizer_sample(sources: list[FactsSource | TextSource], weights: list[float]) -> list[str]:
    """Text of all sources in the shares of their weights, TOKENIZER_CHARACTERS at most; a small source is repeated."""
    shares = [weight / sum(weights) for weight in weights]
    samples = [
        source.sample(max(1, round(TOKENIZER_CHARACTERS * share)))
        for source, share in zip(sources, shares, strict=True)
    ]
    if len(samples) == 1:
        return samples[0]
    sizes = [sum(map(len, texts)) for texts in samples]
    # As much as the source that has most of its share; more of it would only repeat that one too.
    total = min(TOKENIZER_CHARACTERS, max(size / share for size, share in zip(sizes, shares, strict=True)))
    return [
        text for texts, share in zip(samples, shares, strict=True) for text in _repeated(texts, round(total * share))
    ]


def _repeated(texts: list[str], characters: int) -> list[str]:
    """The texts over and over, until there are so many characters."""
    taken: list[str] = []
    for text in cycle(texts):
        if characters <= 0:
            break
        taken.append(text[:characters])
        characters -= len(taken[-1])
    return taken
