"""Consoles: data on stdout, everything else on stderr, no colour and no folding off a terminal."""

import json
import sys
from typing import Any

from rich.console import Console

PIPED_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """A console that fits its stream; NO_COLOR and terminal width are respected by rich."""
    stream = sys.stderr if stderr else sys.stdout
    on_terminal = stream.isatty()
    return Console(file=stream, width=None if on_terminal else PIPED_WIDTH, highlight=False, emoji=False)


def print_json(record: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


def plain(text: str, *, stderr: bool = False) -> None:
    """One line, exactly as it is: never wrapped, never interpreted."""
    (sys.stderr if stderr else sys.stdout).write(text + "\n")
