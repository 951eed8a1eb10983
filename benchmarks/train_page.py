"""The results of train.py as a page of Markdown."""

from typing import Any

from memforge.machine import ENVIRONMENT


def page(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    at = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    lines = [
        "# memforge train beside plain loops",
        "",
        "Written by `python benchmarks/train.py`; its docstring says what an arm is. Do not edit.",
        "",
        f"{at['cpu']}, {at['threads']} threads, load {at['load']} before and {record['load_after']} after; {versions}; "
        f"commit {at['commit']}; {record['rounds']} rounds in turns, {record['minutes']} minutes.",
        "",
        f"`memforge` settings: {', '.join('='.join(item) for item in ENVIRONMENT.items())} and freed memory kept, as "
        "`memforge train` has it; `default`: torch as it comes. The models are the same functions: on the same weights "
        "in fp64 they differ by at most "
        + ", ".join(f"{worst(record, key):.0e} ({key})" for key in first(record["same"]))
        + ".",
        "",
        "| comparison, plain time over ours | found | range over rounds | target | holds |",
        "|---|---|---|---|---|",
        *(
            f"| {row['what']} | {row['found']} | {row['rounds']} | {row['target'] or ''} | {verdict(row['holds'])} |"
            for row in record["claims"]
        ),
        "",
        "Milliseconds of a step, logging included, p20 / p50 / p80 over blocks of 10 steps; `speed.jsonl` is what the "
        "run says of itself; peak is what the process held at most.",
        "",
        "| arm | torch set | step | speed.jsonl | peak |",
        "|---|---|---|---|---|",
        *(arm_line(row) for row in record["arms"]),
        "",
        "Milliseconds of a step by what they went to, mean over blocks. `work` is Stepper.backward and update.",
        "",
        *(line for row in record["arms"] if "parts" in row for line in parts_lines(row)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def first(same: dict[str, dict[str, float]]) -> list[str]:
    return [*next(iter(same.values()), {})]


def worst(record: dict[str, Any], key: str) -> float:
    return max(found[key] for found in record["same"].values())


def verdict(holds: bool | None) -> str:
    return "" if holds is None else "yes" if holds else "**no**"


def arm_line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"| {row['arm']} | {row['setting']} | not run: {row['failed']} | | |"
    cells = [" / ".join(f"{t:,.1f}" for t in row[key]) if key in row else "" for key in ("step", "told")]
    return f"| {row['arm']} | {row['setting']} | {cells[0]} | {cells[1]} | {row['peak_bytes'] / 1e9:.2f} GB |"


def parts_lines(row: dict[str, Any]) -> list[str]:
    parts = ", ".join(f"{name} {value:.2f}" for name, value in row["parts"].items())
    return [f"- {row['arm']}: {parts}"]
