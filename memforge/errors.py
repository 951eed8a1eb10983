"""What can go wrong for a user, as data: every error has one exit code and prints on one screen."""

import signal
from collections.abc import Iterable
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]


def printable(text: str) -> str:
    """`text` with control and other unprintable characters escaped, safe to show on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_text(text: str) -> bool:
    """Whether the text can be encoded: bytes that are no text reach Python as lone surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def dotted(path: KeyPath) -> str:
    """A key path as it is written in `--set`: place.0.block.top_k."""
    return ".".join(printable(str(part)) for part in path)


@dataclass(frozen=True)
class Position:
    """A stretch of one source line. Lines and columns start at 1 and count characters."""

    file: str
    line: int
    column: int
    end_column: int
    text: str

    def __str__(self) -> str:
        return f"{printable(self.file)}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """Something a check found wrong, by key path.

    `related` and, by their dotted keys in the same table, `siblings` name the other ends of a conflict, which are shown
    where they stand; `depends` names what else the check read. If any of these is wrong itself, that is said instead.
    """

    key: KeyPath
    message: str
    help: str | None = None
    related: tuple[tuple[KeyPath, str], ...] = ()
    at_key: bool = False
    siblings: tuple[str, ...] = ()
    depends: tuple[KeyPath, ...] = ()

    def reads(self) -> tuple[KeyPath, ...]:
        """Every key the problem is about."""
        return (self.key, *(key for key, _ in self.related), *self.depends)


@dataclass(frozen=True)
class Diagnostic:
    """A problem and where it stands in the text."""

    message: str
    where: Position
    key: KeyPath = ()
    help: str | None = None
    related: tuple[tuple[Position, str], ...] = ()

    def as_dict(self) -> dict[str, object]:
        return {
            "file": self.where.file,
            "line": self.where.line,
            "column": self.where.column,
            "end_column": self.where.end_column,
            "key": dotted(self.key),
            "message": self.message,
            "help": self.help,
            "related": [
                {"file": p.file, "line": p.line, "column": p.column, "label": label} for p, label in self.related
            ],
        }


class MemforgeError(Exception):
    """Base of all errors meant for users; the message is the whole explanation.

    `of_all_ranks`: every rank of the run raises it, so that one tells of it.
    """

    exit_code = 3
    of_all_ranks = False


class CheckFailedError(MemforgeError):
    """A claim the user made does not hold: parity, coverage, budget."""

    exit_code = 1


class UsageError(MemforgeError):
    exit_code = 2


class SpecError(MemforgeError):
    """Every problem of one spec, in source order."""

    exit_code = 2

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        once = dict.fromkeys(diagnostics)
        self.diagnostics = sorted(once, key=lambda d: (d.where.file, d.where.line, d.where.column))
        assert self.diagnostics
        super().__init__("; ".join(f"{d.where}: {d.message}" for d in self.diagnostics))


class DeviceError(MemforgeError):
    """The environment lacks something: a device, a compiler, a package."""

    exit_code = 3


class StorageError(MemforgeError):
    """A directory, disk or checkpoint cannot be used."""

    exit_code = 4


class DamagedError(StorageError):
    """A file of a run is missing, or not what was written."""


class NonFiniteError(MemforgeError):
    """Training met a NaN or an infinity."""

    exit_code = 5


class Stopped(BaseException):
    """A signal that must end the process now."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class InterruptedRunError(MemforgeError):
    """A signal stopped the run after its state was saved; the exit code is 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
