"""Data: from the [data] table to a `Corpus`."""

from pathlib import Path

from tokenizers import Tokenizer

from memforge.errors import UsageError
from memforge.plan import Plan
from memforge.spec.schema import FactsSpec
from memforge.training.data.corpus import Corpus, HeldOut, Stream
from memforge.training.data.facts import facts_corpus
from memforge.training.data.text import text_corpus

__all__ = ["Corpus", "HeldOut", "Stream", "load_corpus"]


def load_corpus(plan: Plan, data_root: Path, tokenizer: Tokenizer | None = None) -> Corpus:
    """The corpus of a plan, in the tokens of `tokenizer` or of one trained on it.

    Raises UsageError when the plan has no data, or the data does not fit it.
    """
    data, train, vocab_size = plan.run.data, plan.run.train, plan.model.vocab_size
    if data is None or train is None:
        raise UsageError(f"{plan.name}: training needs the tables [data] and [train]")
    if isinstance(data, FactsSpec):
        limit = plan.model.max_seq_len
        return facts_corpus(data, vocab_size=vocab_size, max_seq_len=limit, seed=train.seed, tokenizer=tokenizer)
    window = train.seq_len + 1
    return text_corpus(data, root=data_root, vocab_size=vocab_size, window=window, seed=train.seed, tokenizer=tokenizer)
