"""How numbers are printed in the report of an experiment."""

import math
from collections.abc import Callable, Iterable, Sequence

from benchmarks.facts.experiment import Settings, Value
from benchmarks.facts.statistics import Estimate
from memforge.report.cost import si


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


# What a measure is called, and how it is printed.
MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "recall": ("recall", percent),
    "recall.rare": ("recall, rare phrasings", percent),
    "held_out_loss": ("NLL per answer token", lambda value: f"{value:.3f}"),
    "held_out_loss.rare": ("NLL, rare phrasings", lambda value: f"{value:.3f}"),
    "recall.unseen": ("recall, facts never trained", percent),
    "held_out_loss.unseen": ("NLL, facts never trained", lambda value: f"{value:.3f}"),
    "net_recall": ("recall beyond what names give", percent),
    "recalled_bits": ("bits recalled", lambda value: si(round(value))),
    "foretold_bits": ("bits by NLL", lambda value: si(round(value))),
    "bits_per_param": ("bits recalled per parameter", lambda value: f"{value:.4f}"),
    "bits_per_tflop": ("bits recalled per training TFLOP", lambda value: f"{value:,.0f}"),
    "slots_ever": ("slots ever read", percent),
    "slots_used": ("slots used", percent),
    "slots_top_1pct": ("reads that go to 1% of the slots", percent),
    "slots_effective": ("effective slots", lambda value: si(round(value))),
    "slots_per_fact": ("slots per fact", lambda value: f"{value:.2g}"),
    "flops_per_token": ("FLOPs per token", lambda value: si(round(value))),
    "tokens": ("tokens", lambda value: si(round(value))),
    "train_flops": ("training FLOPs", lambda value: si(round(value))),
    "slots": ("slots", lambda value: f"{value:,.0f}"),
    "data.num_facts": ("facts", lambda value: f"{value:,.0f}"),
    "data.num_unseen": ("facts never trained", lambda value: f"{value:,.0f}"),
}


def is_share(measure: str) -> bool:
    """Whether it is from 0 to 1."""
    return measure in MEASURES and MEASURES[measure][1] is percent


def name_of(measure: str) -> str:
    return MEASURES[measure][0] if measure in MEASURES else measure.rpartition(".")[2].replace("_", " ")


def shown(measure: str, value: float) -> str:
    return MEASURES[measure][1](value) if measure in MEASURES else f"{value:,.6g}"


def interval(measure: str, found: Estimate) -> str:
    """A mean and how far its interval reaches; nothing of no values."""
    if not found.count:
        return ""
    text = shown(measure, found.mean)
    return f"{text} ± {shown(measure, found.high - found.mean)}" if found.known else text


def points(value: float) -> str:
    return "?" if math.isnan(value) else f"{100 * value:+.1f}"


def change(measure: str, found: Estimate) -> str:
    """A difference and its interval: of shares in percentage points, of losses as they are."""

    def told(value: float) -> str:
        if is_share(measure):
            return points(value)
        return "?" if math.isnan(value) else f"{value:+.3f}"

    return told(found.mean) + (f" [{told(found.low)}, {told(found.high)}]" if found.known else "")


def number(value: float) -> str:
    return si(round(value)) if 1 <= value < 1e15 else f"{value:.1e}"


def told_settings(settings: Settings) -> str:
    """As `learning rate 0.003, steps 1,500`."""
    return ", ".join(f"{name_of(key)} {told_value(value)}" for key, value in settings.items())


def told_value(value: Value) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    kept = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    used = [i for i in range(len(head)) if any(row[i] for row in kept)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells[i] for i in used) + " |"

    return [line(head), "|" + "---|" * len(used), *map(line, kept), ""]
