"""A byte-level BPE trained on the corpus, kept under the hash of what it was trained on."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from memforge.storage import cache_dir
from memforge.training.data.corpus import digest

END = "<|end|>"
END_ID = 0


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens; token 0 separates documents. Reads and fills the cache."""
    file = cache_dir() / "tokenizers" / f"{digest([tokenizers.__version__, str(vocab_size), *texts])}.json"
    if (cached := _cached(file)) is not None:
        return cached
    tokenizer = _trained(texts, vocab_size)
    _keep(file, tokenizer.to_str())
    return tokenizer


def _cached(file: Path) -> Tokenizer | None:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    try:
        return Tokenizer.from_str(text)
    except Exception:  # noqa: BLE001  the library raises nothing narrower; a damaged entry is trained again
        return None


def _trained(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _keep(file: Path, text: str) -> None:
    """Write through a temporary file; a cache that cannot be written is only slower."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as out:
            out.write(text)
        Path(out.name).replace(file)
    except OSError:
        return
