"""TOML text as values and the place of every one of them.

Values come from tomli, the parser of record; positions come from tree-sitter-toml. A key that only one of the
two knows falls back to the nearest enclosing key that has a position.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tomli
from tree_sitter import Language, Node, Parser
from tree_sitter_toml import language

from memforge.errors import Diagnostic, KeyPath, Position, SpecError
from memforge.spec.limits import MAX_BYTES, oversteps


@dataclass(frozen=True)
class Source:
    """One text with a name to show: a file, or the `--set` options (which have no path)."""

    name: str
    text: str
    path: Path | None = None

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    def position(self, row: int, column: int, end_column: int | None = None) -> Position:
        """`row` and `column` count from 0, in characters."""
        line = self.lines[min(row, len(self.lines) - 1)].rstrip("\r")
        column = min(column, len(line))
        end = min(max(column + 1, end_column or 0), max(len(line), column + 1))
        return Position(self.name, row + 1, column + 1, end + 1, line)

    def fail(self, message: str, row: int = 0, column: int = 0, help_text: str | None = None) -> SpecError:
        return SpecError([Diagnostic(message, self.position(row, column), help=help_text)])


@dataclass(frozen=True)
class Span:
    """Where a key and its value stand. Ranges are (row, column, end row, end column) in UTF-8 bytes."""

    source: Source
    key: tuple[int, int, int, int]
    value: tuple[int, int, int, int]

    def position(self, *, at_key: bool) -> Position:
        row, column, end_row, end_column = self.key if at_key else self.value
        raw = self.source.lines[row].encode()
        start = len(raw[:column].decode(errors="replace"))
        end = len(raw[:end_column].decode(errors="replace")) if end_row == row else len(raw.decode())
        return self.source.position(row, start, end)


@dataclass
class Document:
    """Nested plain values, the span of each key path, and which tables were written inline."""

    source: Source
    values: dict[str, Any]
    spans: dict[KeyPath, Span] = field(default_factory=dict)
    inline: set[KeyPath] = field(default_factory=set)

    def span(self, path: KeyPath) -> tuple[Span | None, bool]:
        """The span at `path` or of the nearest enclosing key that has one, and whether it is that of `path`."""
        for cut in range(len(path), 0, -1):
            if span := self.spans.get(path[:cut]):
                return span, cut == len(path)
        return None, False

    def position(self, path: KeyPath, *, at_key: bool = False) -> Position:
        """Position of the value (or key) at `path`, or of the nearest enclosing key that has one."""
        span, exact = self.span(path)
        return span.position(at_key=at_key or not exact) if span else self.source.position(0, 0)

    def source_of(self, path: KeyPath) -> Source:
        """The text in which the value at `path` stands."""
        span, _ = self.span(path)
        return span.source if span else self.source

    def fail(self, path: KeyPath, message: str, help_text: str | None = None) -> SpecError:
        return SpecError([Diagnostic(message, self.position(path), path, help_text)])

    def replace(self, path: KeyPath, value: Any, other: "Document", other_path: KeyPath) -> None:
        """Put `other`'s value at `path`, with the spans of everything inside it."""
        for known in [p for p in self.spans if p[: len(path)] == path]:
            del self.spans[known]
            self.inline.discard(known)
        table = self.values
        for part in path[:-1]:
            table = table[part]  # type: ignore[index]
        table[path[-1]] = value  # type: ignore[index]
        depth = len(other_path)
        for inner, span in other.spans.items():
            if inner[:depth] == other_path:
                self.spans[path + inner[depth:]] = span
                if inner in other.inline:
                    self.inline.add(path + inner[depth:])


def read_source(file: Path, shown: str) -> Source:
    """The text of a spec file. Raises SpecError when it is absent, special, too large or not text."""
    nowhere = Source(shown, "")
    try:
        if not file.exists():
            raise nowhere.fail("no such file")
        if not file.is_file():
            raise nowhere.fail("not a regular file")
        if file.stat().st_size > MAX_BYTES:
            raise nowhere.fail(f"the file is larger than {MAX_BYTES:,} bytes")
        raw = file.read_bytes()
    except OSError as error:
        raise nowhere.fail(f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the path
        raise nowhere.fail(f"not a path: {error}") from None
    try:
        return Source(shown, raw.decode("utf-8").replace("\r\n", "\n"), file)
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        row, column = before.count("\n"), len(before) - before.rfind("\n") - 1
        text = Source(shown, raw.decode("utf-8", errors="replace"))
        raise text.fail(
            f"not a UTF-8 text file (byte {error.start} is 0x{raw[error.start]:02x})", row, column
        ) from None


def parse(source: Source) -> Document:
    """Values and spans of one TOML text. Raises SpecError with line and column on a syntax error."""
    for offset, message in oversteps(source.text):
        row = source.text.count("\n", 0, offset)
        raise source.fail(message, row, offset - source.text.rfind("\n", 0, offset) - 1)
    try:
        values = tomli.loads(source.text)
    except tomli.TOMLDecodeError as error:
        row, column = error.lineno - 1, error.colno - 1
        raise source.fail(f"not valid TOML: {error.msg[:1].lower()}{error.msg[1:]}", row, column) from None
    except (RecursionError, ValueError) as error:
        raise source.fail(f"not TOML that can be read: {error}") from None
    document = Document(source, values)
    _Walker(document).document(_parser().parse(source.text.encode()).root_node)
    return document


@cache
def _parser() -> Parser:
    return Parser(Language(language()))


@dataclass
class _Walker:
    out: Document
    counts: dict[KeyPath, int] = field(default_factory=dict)

    def document(self, root: Node) -> None:
        for node in root.children:
            if node.type == "pair":
                self.pair(node, ())
            elif node.type in ("table", "table_array_element"):
                self.table(node)

    def table(self, node: Node) -> None:
        header = [c for c in node.children if c.type in ("bare_key", "quoted_key", "dotted_key")]
        path: KeyPath = ()
        keys = list(_key_parts(header[0])) if header else []
        for i, (name, key_node) in enumerate(keys):
            path = (*path, name)
            last = i == len(keys) - 1
            self.record(path, key_node, key_node, keep=not last or node.type == "table_array_element")
            if last and node.type == "table_array_element":
                self.counts[path] = self.counts.get(path, -1) + 1
            if path in self.counts:
                path = (*path, self.counts[path])
                self.record(path, key_node, key_node, keep=not last)
        for child in node.children:
            if child.type == "pair":
                self.pair(child, path)

    def pair(self, node: Node, prefix: KeyPath) -> None:
        key_node, value = node.children[0], node.children[-1]
        named = [c for c in node.children if c.is_named and c.type != "comment"]
        if len(named) >= 2:
            key_node, value = named[0], named[1]
        path, parts = prefix, list(_key_parts(key_node))
        for i, (name, part) in enumerate(parts):
            path = (*path, name)
            self.record(path, part, value, keep=i < len(parts) - 1)
        self.value(value, path)

    def value(self, node: Node, path: KeyPath) -> None:
        if node.type == "inline_table":
            self.out.inline.add(path)
            for child in node.children:
                if child.type == "pair":
                    self.pair(child, path)
        elif node.type == "array":
            items = [c for c in node.children if c.is_named and c.type != "comment"]
            for i, item in enumerate(items):
                self.record((*path, i), item, item)
                self.value(item, (*path, i))

    def record(self, path: KeyPath, key: Node, value: Node, *, keep: bool = False) -> None:
        if not (keep and path in self.out.spans):
            self.out.spans[path] = Span(self.out.source, _range(key), _range(value))


def _range(node: Node) -> tuple[int, int, int, int]:
    return (*node.start_point, *node.end_point)


def _key_parts(node: Node) -> Iterator[tuple[str, Node]]:
    if node.type == "dotted_key":
        for child in node.children:
            yield from _key_parts(child)
    elif node.type in ("bare_key", "quoted_key"):
        text = node.text.decode() if node.text else ""
        yield (text if node.type == "bare_key" else next(iter(tomli.loads(f"{text} = 0"))), node)
