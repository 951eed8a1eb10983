"""memforge kernels and tune."""

from pathlib import Path
from typing import Annotated

import typer

from memforge.cli.options import Json
from memforge.errors import DeviceError
from memforge.report.console import console, plain, print_json

Target = Annotated[
    str,
    typer.Option("--target", metavar="TARGET", help="A GPU, e.g. sm_80 or gfx942.", show_default=True),
]


def kernels(target: Target = "sm_90", json_: Json = False) -> None:
    """What the Triton kernels compile to, for a GPU that need not be there."""
    from memforge.export.kernels import compiling_for
    from memforge.report.kernels import show_kernels

    with compiling_for(target) as offline, console(stderr=True).status("compiling some 40 kernels"):
        records = offline.report(target)
    if json_:
        print_json({"target": target, "kernels": records})
    else:
        show_kernels(records)


def tune(
    target: Annotated[
        str | None, typer.Option("--target", metavar="TARGET", help="Rank by compiled code, for a GPU not here.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: the tables of the installed package.")
    ] = None,
    json_: Json = False,
) -> None:
    """Choose kernel configs: by the clock on this GPU, or with --target by what they compile to."""
    import torch

    from memforge.export.kernels import compiling_for
    from memforge_kernels import tuning

    working = console(stderr=True).status("trying every config of every kernel; this takes minutes")
    if target is not None:
        with compiling_for(target, ranked=True), working:
            tables = tuning.tune_static(target)
    elif torch.cuda.is_available():
        with working:
            tables = tuning.tune_measured(torch.device("cuda"))
    else:
        raise DeviceError("no CUDA device to time kernels on; --target sm_90 ranks them by what they compile to")
    files = tuning.write_tables(tables, out or tuning.TUNED)
    if json_:
        print_json({"files": [str(file) for file in files], "tables": tables})
    else:
        for file, table in zip(files, tables, strict=True):
            plain(f"wrote {file}: {sum(map(len, table['entries'].values()))} entries, {table['provenance']}")


COMMANDS = {"kernels": kernels, "tune": tune}
