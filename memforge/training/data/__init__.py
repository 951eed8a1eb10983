"""Data: from the [data] table to a `Corpus`."""

from pathlib import Path

from memforge.errors import UsageError
from memforge.plan import Plan
from memforge.spec.schema import FactsSpec
from memforge.training.data.corpus import Corpus, HeldOut, Stream
from memforge.training.data.facts import facts_corpus
from memforge.training.data.text import text_corpus

__all__ = ["Corpus", "HeldOut", "Stream", "load_corpus"]


def load_corpus(plan: Plan, data_root: Path) -> Corpus:
    """The corpus of a plan. Raises UsageError when the plan has no data, or the data does not fit it."""
    data, train = plan.run.data, plan.run.train
    if data is None or train is None:
        raise UsageError(f"{plan.name}: training needs the tables [data] and [train]")
    if isinstance(data, FactsSpec):
        return facts_corpus(data, vocab_size=plan.model.vocab_size, max_seq_len=plan.model.max_seq_len, seed=train.seed)
    window = train.seq_len + 1
    return text_corpus(data, root=data_root, vocab_size=plan.model.vocab_size, window=window, seed=train.seed)
