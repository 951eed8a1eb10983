"""Documents as tokens, a batch at a time."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from memforge.training.data.documents import Piece, Reader
from memforge.training.data.progress import Note, Progress
from memforge.training.data.shards import Writer
from memforge.training.data.sources import SourceFile, require_unchanged

# Characters that are tokenized at once: enough for several threads. What the library returns takes up to 300 times as
# many bytes; four times as many characters are no faster.
BATCH_CHARS = 2**18
BATCH_PIECES = 2**14


def pack_documents(
    writer: Writer, reader: Reader, files: Sequence[SourceFile], tokenizer: Tokenizer, end: int, note: Note
) -> dict[str, int | str]:
    """Writes every document, each begun by the token `end`; returns how much there was, and its hash.

    Memory does not grow with the data. Raises StorageError when a file changes in the meantime.
    """
    sha, documents, characters, num_bytes = hashlib.sha256(), 0, 0, 0
    lengths = _Lengths(writer)
    for batch in _batches(_told(reader, files, note)):
        encodings = tokenizer.encode_batch([piece.text for piece in batch], add_special_tokens=False)
        flat: list[npt.NDArray[np.int64]] = []
        for piece, encoding in zip(batch, encodings, strict=True):
            raw = piece.text.encode()
            if piece.starts_document:
                sha.update(b"\0" if documents else b"")
                documents += 1
                flat.append(np.array([end]))
                lengths.start()
            flat.append(np.array(encoding.ids, dtype=np.int64))
            lengths.add(len(encoding.ids))
            sha.update(raw)
            characters, num_bytes = characters + len(piece.text), num_bytes + len(raw)
        writer.tokens(np.concatenate(flat))
        lengths.flush()
    sha.update(b"\0" if documents else b"")
    lengths.end()
    require_unchanged(files)
    return {"documents": documents, "characters": characters, "bytes": num_bytes, "corpus_sha256": sha.hexdigest()}


def encoded(texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[npt.NDArray[np.int32]]:
    """The tokens of each text."""
    for start in range(0, len(texts), BATCH_PIECES):
        for encoding in tokenizer.encode_batch(list(texts[start : start + BATCH_PIECES]), add_special_tokens=False):
            yield np.array(encoding.ids, dtype=np.int32)


class _Lengths:
    """Lengths of documents whose pieces may lie in several batches; the separating token counts."""

    def __init__(self, writer: Writer) -> None:
        self._writer, self._done, self._open = writer, [], 0

    def start(self) -> None:
        if self._open:
            self._done.append(self._open)
        self._open = 1

    def add(self, tokens: int) -> None:
        self._open += tokens

    def flush(self) -> None:
        self._writer.lengths(np.array(self._done, dtype=np.int64))
        self._done.clear()

    def end(self) -> None:
        if self._open:
            self._done.append(self._open)
        self.flush()


def _told(reader: Reader, files: Sequence[SourceFile], note: Note) -> Iterator[Piece]:
    """The pieces of all files, with notes of how far they are."""
    progress, before = Progress(note, "tokenizing", sum(file.size for file in files)), 0
    for file in files:
        for piece in reader.pieces(file):
            yield piece
            progress.at(before + min(piece.bytes_read, file.size))
        before += file.size


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARS or len(batch) >= BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
