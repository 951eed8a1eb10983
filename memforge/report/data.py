"""Data as tables: where the tokens of a corpus lie, and what it is made of."""

from types import TracebackType
from typing import Any

from rich.table import Table

from memforge.errors import printable
from memforge.report.console import console, plain, print_whole
from memforge.report.cost import si, titled_table


class NoteReporter:
    """Shows notes of long work: on a terminal the newest beside a spinner, elsewhere each on a line of stderr."""

    def __init__(self) -> None:
        self._screen = console(stderr=True)
        self._status = self._screen.status("reading") if self._screen.is_terminal else None

    def note(self, message: str) -> None:
        if self._status is not None:
            self._status.update(printable(message))
        else:
            plain(printable(message), stderr=True)

    def __enter__(self) -> "NoteReporter":
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()


def show_prepared(record: dict[str, Any]) -> None:
    """One row for each part: how much there is, and where it lies."""
    print_whole(console(), prepared_table(record))
    for part in record["parts"]:
        if part["temporary"]:
            why = "the cache cannot be written, so that training would make these again"
            plain(f"note: {_label(record, part)}: {why}", stderr=True)


def prepared_table(record: dict[str, Any]) -> Table:
    columns = ("part", "documents", "tokens", "trained", "shards", "on disk", "where")
    table = titled_table(f"{record['name']}: tokens of a vocabulary of {record['vocabulary']:,}", columns)
    for part in record["parts"]:
        counts = [f"{part[key]:,}" for key in ("documents", "tokens", "training_tokens", "shards")]
        where = printable(part["directory"]) if part["directory"] else "in memory"
        table.add_row(_label(record, part), *counts, si(part["bytes"], "B"), where)
    return table


def show_stats(record: dict[str, Any]) -> None:
    print_whole(console(), stats_table(record))


def stats_table(record: dict[str, Any]) -> Table:
    """One column for each part, one row for each number."""
    parts = record["parts"]
    table = titled_table(
        f"{record['name']}: {record['steps']:,} steps of [train] read {si(record['train_tokens'])} tokens",
        ("", *(_label(record, part) for part in parts)),
    )
    for label, cells in _rows(record):
        table.add_row(label, *(cells))
    return table


def _rows(record: dict[str, Any]) -> list[tuple[str, list[str]]]:
    parts, vocabulary = record["parts"], record["vocabulary"]

    def row(label: str, key: str, form: str) -> tuple[str, list[str]]:
        return label, ["" if part[key] is None else format(part[key], form) for part in parts]

    used = [f"{part['vocabulary_used']:,} of {vocabulary:,}" for part in parts]
    frequent = [
        ", ".join(f"{token['token']} {token['share']:.1%}" for token in part["most_frequent"][:3]) for part in parts
    ]
    rows = [
        row("share of the windows", "share", ".2%"),
        row("documents", "documents", ","),
        row("tokens", "tokens", ","),
        row("tokens per character", "tokens_per_character", ".3f"),
        row("tokens per byte", "tokens_per_byte", ".3f"),
        ("vocabulary used", used),
        row("median document, tokens", "median_document", ",.0f"),
        row("longest document, tokens", "longest_document", ","),
        row("100 most frequent tokens", "top_tokens_share", ".1%"),
        ("most frequent", frequent),
        row("tokens trained on", "training_tokens", ","),
        row("held out", "held_out_share", ".2%"),
        row("epochs of [train]", "epochs", ",.2f"),
        row("exposures per fact", "exposures_per_fact", ",.1f"),
    ]
    names = dict.fromkeys(name for part in parts for name in part["baselines"])
    for name in names:
        found = [part["baselines"].get(name) for part in parts]
        rows.append((f"{name.replace('_', ' ')} baseline", ["" if x is None else f"{x:.1%}" for x in found]))
    return [(label, cells) for label, cells in rows if any(cells)]


def _label(record: dict[str, Any], part: dict[str, Any]) -> str:
    return printable(part["part"] or record["name"])
