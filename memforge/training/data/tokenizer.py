"""The tokenizer of a corpus: a byte-level BPE trained on it and kept by what it was trained on, or the user's own."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from memforge.errors import StorageError, UsageError, printable
from memforge.spec.load import data_path
from memforge.storage import cache_dir
from memforge.training.data.corpus import digest
from memforge.training.data.progress import Note, ignore

END = "<|end|>"
# Of tokenizers that are trained here; `end_id` finds that of any.
END_ID = 0
# What separates documents in tokenizers of others, the first one that there is.
END_TOKENS = (END, "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
# Of the largest vocabularies in use, JSON takes about 35 MB.
MAX_TOKENIZER_BYTES = 2**28
# To train on so much text takes about a second.
LONG_CHARACTERS = 5_000_000


def end_id(tokenizer: Tokenizer) -> int:
    """The id of the token that separates documents. Raises UsageError when there is none of END_TOKENS."""
    for token in END_TOKENS:
        if (found := tokenizer.token_to_id(token)) is not None:
            return int(found)
    raise UsageError(f"the tokenizer has no token that separates documents; looked for {', '.join(END_TOKENS)}")


def num_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id, which is the vocabulary's size unless ids are left out."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def read_tokenizer(root: Path, name: str, *, vocab_size: int) -> Tokenizer:
    """The tokenizer in a JSON file below `root`, which neither cuts nor pads what it encodes.

    Raises UsageError when it is no tokenizer, has more ids than `vocab_size` or no token that separates documents.
    """
    shown = f"data.tokenizer {printable(name)}"
    try:
        path = data_path(root, name)
        if not path.is_file():
            raise ValueError("is not a file")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ValueError(f"is larger than {MAX_TOKENIZER_BYTES:,} bytes")
        tokenizer = _from_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{printable(name)}: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"{shown}: {error}") from None
    if (needed := num_ids(tokenizer)) > vocab_size:
        raise UsageError(f"{shown}: has {needed:,} tokens, more than model.vocab_size = {vocab_size:,}")
    try:
        end_id(tokenizer)
    except UsageError as error:
        raise UsageError(f"{shown}: {error}") from None
    return tokenizer


def _from_text(text: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # noqa: BLE001  the library raises nothing narrower
        why = printable(str(error).split("\n")[0])[:200]
        raise ValueError(f"is not a JSON file of the library `tokenizers`: {why}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def train_tokenizer(texts: list[str], vocab_size: int, *, note: Note = ignore) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens; token 0 separates documents. Reads and fills the cache."""
    file = cache_dir() / "tokenizers" / f"{digest([tokenizers.__version__, str(vocab_size), *texts])}.json"
    if (cached := _cached(file)) is not None:
        return cached
    if (characters := sum(map(len, texts))) >= LONG_CHARACTERS:
        note(f"training a tokenizer on {characters / 1e6:.1f} million characters")
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
