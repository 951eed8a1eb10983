"""Errors of a spec as text: one line `path:line:col: message` each, with code frames while they fit on a screen."""

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from memforge.errors import Diagnostic, Position, dotted, printable
from memforge.report.console import console, plain

MAX_LINES = 25
MAX_CODE = 100
_GUTTER = "      |"


def render(diagnostics: Sequence[Diagnostic]) -> list[str]:
    """At most MAX_LINES lines: every error has its line, the first ones a frame, and the rest are counted."""
    lines: list[str] = []
    for i, diagnostic in enumerate(diagnostics):
        left = len(diagnostics) - i
        room = MAX_LINES - len(lines)
        framed = [_headline(diagnostic), *_frame(diagnostic)]
        # A frame is drawn while every later error still gets its line, and always for the first two.
        if len(framed) + left - 1 <= room or (i < 2 and len(framed) + 1 <= room):
            lines += framed
        elif left == 1 or room > 1:
            lines.append(_headline(diagnostic))
        else:
            lines.append(f"and {left} more")
            break
    return lines


def show(diagnostics: Sequence[Diagnostic]) -> None:
    """Print them on stderr: with colour on a terminal, as they are elsewhere."""
    screen = console(stderr=True)
    for line in render(diagnostics):
        if screen.is_terminal:
            style = "red" if line.startswith(_GUTTER) else "" if line.startswith(" ") else "bold"
            screen.print(Text(line, style=style), soft_wrap=True)
        else:
            plain(line, stderr=True)


def error_record(error: dict[str, Any]) -> dict[str, Any]:
    """An error of a JSON document: all have the same keys; those about no place in a file leave it null."""
    place = dict.fromkeys(("file", "line", "column", "end_column", "key", "help"))
    return {**place, "related": [], **error}


def _headline(d: Diagnostic) -> str:
    return f"{d.where}: {printable(d.message)}"


def _frame(d: Diagnostic) -> list[str]:
    notes = " - ".join(part for part in (dotted(d.key), printable(d.help or "")) if part)
    if not d.where.text:
        return [f"  = {notes}"] if notes else []
    lines = _code(d.where, notes)
    for position, label in d.related[:1]:
        if position.file != d.where.file:
            lines += _code(position, f"{label}, in {position}", mark="-")
        elif position.line != d.where.line:
            lines += _code(position, label, mark="-")
    return lines


def _code(where: Position, note: str, mark: str = "^") -> list[str]:
    begin, end = where.column - 1, where.end_column - 1
    start = max(0, begin - MAX_CODE // 2) if len(where.text) > MAX_CODE else 0
    before, marked, after = (
        printable(part.replace("\t", " "))
        for part in (where.text[start:begin], where.text[begin:end], where.text[end : start + MAX_CODE])
    )
    marked = marked[:MAX_CODE]
    carets = mark * max(1, cell_len(marked))
    return [
        f"{where.line:>5} | {before}{marked}{after}",
        f"{_GUTTER} {' ' * cell_len(before)}{carets} {note}".rstrip(),
    ]
