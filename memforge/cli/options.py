"""Options that several commands share, and how they become a spec."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.errors import DeviceError, UsageError, printable
from memforge.spec import Spec, load_spec

# Of every typer app; rich must not fold what it prints, and errors are ours to explain.
APP: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="A TOML spec.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec, e.g. train.steps=100."),
]
SpecRoot = Annotated[
    Path | None,
    typer.Option("--spec-root", metavar="DIR", help="Bounds what the spec may extend; its own directory by default."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="DIR",
        help="Where data.path starts: by default the spec root, for a build or a run the current directory.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="cpu, cuda or cuda:N; cuda where there is one."),
]

MeshOption = Annotated[
    str | None,
    typer.Option("--mesh", metavar="AXIS=N,..", help="Ranks, by the axes dp_replicate, dp_shard, memory."),
]
NoParity = Annotated[bool, typer.Option("--no-parity", help="Go on although the [parity] claim fails.")]


def is_other_rank() -> bool:
    """Whether this is a rank of a run that is not the first, which speaks for all."""
    return os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1"


def load(
    path: Path,
    overrides: list[str] | None,
    spec_root: Path | None,
    *,
    data_root: Path | None = None,
    require_data: bool = False,
) -> Spec:
    return load_spec(
        path, overrides=overrides or (), spec_root=spec_root, data_root=data_root, require_data=require_data
    )


def end_with(verdicts: Sequence[Any], *, as_json: bool) -> None:
    """Exit code 1 after the report of comparisons of which one fails. JSON has said why; else stderr does."""
    from memforge.parity import require

    if as_json and not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)
    require(*verdicts)


def tolerances(given: list[str] | None) -> dict[str, float]:
    """AXIS=X options by axis. Raises UsageError for an unknown axis, one given twice, or a number out of range."""
    found: dict[str, float] = {}
    for item in given or ():
        axis, number = _tolerance_of_axis(item)
        if axis in found:
            raise UsageError(f"--tolerance {printable(item)}: {axis} has a tolerance already")
        found[axis] = number
    return found


def _tolerance_of_axis(item: str) -> tuple[str, float]:
    from memforge.cost import AXES
    from memforge.spec.schema import MAX_TOLERANCE

    axis, equals, text = (part.strip() for part in item.partition("="))
    if not equals or axis not in AXES:
        raise UsageError(f"--tolerance {printable(item)}: expected AXIS=X with AXIS in {', '.join(AXES)}")
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number <= MAX_TOLERANCE:  # false for nan
        raise UsageError(f"--tolerance {printable(item)}: X must be a number from 0 to {MAX_TOLERANCE}")
    return axis, number


def torch_device(name: str | None) -> str:
    """A device that exists. Raises UsageError with the ones that are known."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"--device {printable(name)}: expected cpu, cuda or cuda:N")
    if name.startswith("cuda") and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return name
