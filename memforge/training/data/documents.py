"""The text in files, in pieces of bounded size: .txt, .jsonl, .parquet and the arrow files of `datasets`."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from memforge.errors import DeviceError, UsageError, printable
from memforge.training.data.sources import BLOCK_BYTES, SourceFile, UnreadableError

# A document is read and tokenized in pieces of about so many characters, so that no document is too long; pieces eight
# times as long are tokenized a fifth slower.
PIECE_CHARS = 2**13
# A line of JSON must be held whole.
MAX_LINE_CHARS = 2**28
# Rows are decoded in batches of about so many bytes.
ROWS_BYTES = 2**22
# A byte-level BPE never joins a character with the whitespace after it, so that a cut between them changes no token.
# Greedy, so that it finds the last such place.
_CUT = re.compile(r".*\S(?=[ \n\r\t])", re.DOTALL)


class Piece(NamedTuple):
    """A stretch of a document. `bytes_read` is how far into its file the reader is, for reports of progress."""

    text: str
    starts_document: bool
    bytes_read: int


class Reader:
    """Reads the documents of files; `field` is the key or column of the text and `key` the spec's key in errors.

    Documents without text are left out. Raises UsageError naming file and place for what is not text, DeviceError when
    pyarrow is needed and absent, StorageError when a file cannot be read.
    """

    def __init__(self, field: str, key: str) -> None:
        self.field, self.key = field, key

    def pieces(self, file: SourceFile) -> Iterator[Piece]:
        """The documents of a file in pieces; a document's first piece is marked."""
        read = {"txt": self._txt, "jsonl": self._jsonl, "parquet": self._parquet, "arrow": self._arrow}[file.kind]
        try:
            yield from read(file)
        except UnicodeDecodeError as error:
            raise self._error(file, f"is not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            if error.errno is None:  # pyarrow's word for a file that contradicts itself
                raise self._error(file, f"is damaged: {_first_line(error)}") from None
            raise UnreadableError(f"{file.shown}: {error.strerror or error}") from None

    def _error(self, file: SourceFile, what: str) -> UsageError:
        return UsageError(f"{self.key}: {file.shown} {what}")

    def _txt(self, file: SourceFile) -> Iterator[Piece]:
        first = True
        with file.path.open(encoding="utf-8-sig") as opened:
            for text in cut_into_pieces(self._checked(_chunks(opened), file)):
                yield Piece(text, first, opened.buffer.tell())
                first = False

    def _checked(self, chunks: Iterator[str], file: SourceFile) -> Iterator[str]:
        for chunk in chunks:
            if "\0" in chunk:
                raise self._error(file, f"is binary, not text (byte {_first_nul(file)} is 0)")
            yield chunk

    def _jsonl(self, file: SourceFile) -> Iterator[Piece]:
        with file.path.open(encoding="utf-8-sig") as opened:
            for number, line in enumerate(_lines(opened), start=1):
                if len(line) > MAX_LINE_CHARS:
                    raise self._error(file, f"line {number} is longer than {MAX_LINE_CHARS:,} characters")
                if line.strip():
                    yield from _document(self._value(line, file, number), opened.buffer.tell())

    def _value(self, line: str, file: SourceFile, number: int) -> str:
        try:
            value = json.loads(line)[self.field]
        except (ValueError, KeyError, TypeError, RecursionError):
            what = f"line {number} is not a JSON object with `{printable(self.field)}`"
            raise self._error(file, what) from None
        if not isinstance(value, str) or not _can_be_encoded(value):
            raise self._error(file, f"line {number}: `{printable(self.field)}` is not text")
        return value

    def _parquet(self, file: SourceFile) -> Iterator[Piece]:
        arrow = _pyarrow(file)
        from pyarrow import parquet

        try:
            # With a buffer, pages are read one by one; without, a column of a whole row group is.
            with parquet.ParquetFile(file.path, buffer_size=BLOCK_BYTES, pre_buffer=False) as opened:
                self._require_text(file, opened.schema_arrow, arrow)
                total = max(1, opened.metadata.num_rows)
                size = sum(opened.metadata.row_group(i).total_byte_size for i in range(opened.num_row_groups))
                rows = max(1, min(1024, ROWS_BYTES * total // max(1, size)))
                batches = opened.iter_batches(batch_size=rows, columns=[self.field], use_threads=False)
                done = 0
                for batch in batches:
                    yield from self._rows(file, batch.column(0), done, file.size * done // total)
                    done += len(batch)
        except arrow.ArrowException as error:
            raise self._error(file, f"is not a parquet file that can be read: {_first_line(error)}") from None

    def _arrow(self, file: SourceFile) -> Iterator[Piece]:
        arrow = _pyarrow(file)
        try:
            # Not mapped: a file that is cut short while it is read must be an error, not a signal.
            with arrow.OSFile(str(file.path)) as opened, arrow.ipc.open_stream(opened) as reader:
                self._require_text(file, reader.schema, arrow)
                done = 0
                for column in _slices(reader, self.field):
                    yield from self._rows(file, column, done, opened.tell())
                    done += len(column)
        except arrow.ArrowException as error:
            raise self._error(file, f"is not an arrow stream that can be read: {_first_line(error)}") from None

    def _require_text(self, file: SourceFile, schema: Any, arrow: Any) -> None:
        """Raises UsageError unless the file has one column of the name, of strings."""
        named = [column for column in schema if column.name == self.field]
        if len(named) != 1:
            columns = ", ".join(printable(name) for name in schema.names[:20]) or "none"
            count = "no column" if not named else f"{len(named)} columns"
            raise self._error(file, f"has {count} `{printable(self.field)}`; its columns are {columns}")
        kind = named[0].type
        kind = kind.value_type if arrow.types.is_dictionary(kind) else kind
        known = (arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view)
        if not any(is_kind(kind) for is_kind in known):
            raise self._error(file, f"column `{printable(self.field)}` holds {printable(str(kind))}, not text")

    def _rows(self, file: SourceFile, column: Any, done: int, bytes_read: int) -> Iterator[Piece]:
        """Pieces of the rows of a column of which `done` precede; rows count from 1 in errors."""
        for row, scalar in enumerate(column, start=done + 1):
            try:
                value = scalar.as_py()
            except UnicodeDecodeError:
                raise self._error(file, f"row {row}: `{printable(self.field)}` is not UTF-8 text") from None
            if value is None:
                raise self._error(file, f"row {row}: `{printable(self.field)}` is null, not text")
            yield from _document(value, bytes_read)


def sample(reader: Reader, files: Sequence[SourceFile], characters: int) -> list[str]:
    """About `characters` of text, or all where there is less: of each file the start, in proportion to its size."""
    total = sum(file.size for file in files)
    texts = []
    for file in files:
        left = characters if total <= characters else -(-characters * file.size // total)
        document: list[str] = []
        for piece in reader.pieces(file) if left else ():
            if piece.starts_document and document:
                texts.append("".join(document))
                document = []
            document.append(piece.text[:left])
            left -= len(document[-1])
            if left <= 0:
                break
        if document:
            texts.append("".join(document))
    return texts


def cut_into_pieces(chunks: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of PIECE_CHARS or a little more, cut before whitespace where there is any."""
    kept = ""
    for chunk in chunks:
        kept, start = kept + chunk, 0
        while len(kept) - start > PIECE_CHARS:
            found = _CUT.match(kept, start, start + PIECE_CHARS + 1)
            end = found.end() if found else start + PIECE_CHARS
            yield kept[start:end]
            start = end
        kept = kept[start:]
    if kept:
        yield kept


def _document(text: str, bytes_read: int) -> Iterator[Piece]:
    for i, piece in enumerate(cut_into_pieces([text])):
        yield Piece(piece, i == 0, bytes_read)


def _chunks(opened: Any) -> Iterator[str]:
    with _absolute(opened):
        while chunk := opened.read(PIECE_CHARS):
            yield chunk


def _lines(opened: Any) -> Iterator[str]:
    with _absolute(opened):
        while line := opened.readline(MAX_LINE_CHARS + 1):
            yield line


@contextmanager
def _absolute(opened: Any) -> Iterator[None]:
    """Make the place in a UnicodeDecodeError that of the byte in the file, not in the block that was decoded."""
    try:
        yield
    except UnicodeDecodeError as error:
        error.start += opened.buffer.tell() - len(error.object)
        raise


def _can_be_encoded(text: str) -> bool:
    """False for lone surrogates, which JSON can spell; 60 times as fast as to look at each character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_nul(file: SourceFile) -> int:
    done = 0
    with file.path.open("rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            if (at := block.find(b"\0")) >= 0:
                return done + at
            done += len(block)
    return done


def _slices(reader: Any, field: str) -> Iterator[Any]:
    """The column in each record batch."""
    for batch in reader:
        yield batch.column(batch.schema.names.index(field))


def _pyarrow(file: SourceFile) -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError:
        raise DeviceError(f'{file.shown} is read with pyarrow: pip install "memforge[data]"') from None
    return pyarrow


def _first_line(error: BaseException) -> str:
    return printable(str(error).strip().split("\n")[0])[:200]
