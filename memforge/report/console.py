"""Consoles: data on stdout, everything else on stderr, no colour and no folding off a terminal."""

import json
import os
import sys
from contextlib import nullcontext, suppress
from typing import Any

from rich.console import Console
from rich.table import Table

# Tables are never narrower than their numbers: a terminal folds long lines, a file has no width at all.
MIN_WIDTH, PIPED_WIDTH = 110, 10_000


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """A reader that went away must not stop the work: go on in silence."""
        self.quiet = True


class _Forgiving:
    """For what is said beside the work: a log on a full disk or a terminal that is gone is no reason to stop."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def console(*, stderr: bool = False) -> Console:
    """A console that fits its stream; NO_COLOR and terminal width are respected by rich."""
    stream = sys.stderr if stderr else sys.stdout
    screen = Console(file=stream)
    width = max(MIN_WIDTH, screen.width) if screen.is_terminal else PIPED_WIDTH
    target: Any = _Forgiving(stream) if stderr else stream
    # Without a height, rich takes a dumb terminal to be 80 columns wide, whatever it is told.
    return _Console(file=target, width=width, height=screen.height, highlight=False, emoji=False, markup=False)


def print_whole(page: Console, table: Table) -> None:
    """A table wider than the screen runs over its edge: a number that is cut is another number."""
    wanted = page.measure(table, options=page.options.update(max_width=PIPED_WIDTH)).maximum
    page.width = max(page.width, wanted)
    page.print(table)


def print_json(record: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


def plain(text: str, *, stderr: bool = False) -> None:
    """One line, exactly as it is: never wrapped, never interpreted."""
    with suppress(OSError) if stderr else nullcontext():  # an error that cannot be told still has its exit code
        (sys.stderr if stderr else sys.stdout).write(text + "\n")


def forget_stdout() -> None:
    """Let the interpreter's own flush at exit go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
