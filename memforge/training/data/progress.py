"""Lines about work that takes long."""

import time
from collections.abc import Callable
from typing import TypeAlias

Note: TypeAlias = Callable[[str], None]
# Work that is done sooner is not worth a line.
SECONDS_BETWEEN_NOTES = 2.0


def ignore(_: str) -> None:
    """Tell nobody."""


class Progress:
    """Says how many of `total` bytes are done, at most every SECONDS_BETWEEN_NOTES: "tokenizing 1.2 of 5.0 GB"."""

    def __init__(self, note: Note, verb: str, total: int) -> None:
        self._note, self._verb, self._total = note, verb, total
        self._unit, self._scale = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
        self._told = time.monotonic()

    def at(self, done: int) -> None:
        now = time.monotonic()
        if now - self._told >= SECONDS_BETWEEN_NOTES:
            self._told = now
            self._note(f"{self._verb} {done / self._scale:.1f} of {self._total / self._scale:.1f} {self._unit}")
