"""memforge kernels and tune."""

from pathlib import Path
from typing import Annotated

import typer

from memforge.cli.options import Json
from memforge.errors import DeviceError
from memforge.report.console import console, plain, print_json

Target = Annotated[
    str | None, typer.Option("--target", metavar="TARGET", help="A GPU's architecture, e.g. sm_90 or gfx942.")
]


def kernels(target: Target = None, json_: Json = False) -> None:
    """What the Triton kernels compile to for a GPU that need not be there; default: sm_90."""
    from memforge.export.kernels import offline_for
    from memforge.report.kernels import show_kernels

    offline = offline_for(target or "sm_90")
    with console(stderr=True).status("compiling some 40 kernels"):
        try:
            records = offline.report(target or "sm_90")
        except offline.ToolMissing as error:
            raise DeviceError(str(error)) from None
    if json_:
        print_json({"target": target or "sm_90", "kernels": records})
    else:
        show_kernels(records)


def tune(
    target: Target = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Default: the tables of the installed package.")
    ] = None,
    json_: Json = False,
) -> None:
    """Choose kernel configs: by the clock on this GPU, or with --target by compiled code, for one that is not there."""
    import torch

    from memforge.export.kernels import offline_for
    from memforge_kernels import tuning

    if target is None and not torch.cuda.is_available():
        raise DeviceError("no CUDA device to time kernels on; --target sm_90 ranks them by what they compile to")
    with console(stderr=True).status("trying every config of every kernel; this takes minutes"):
        if target is None:
            tables = tuning.tune_measured(torch.device("cuda"))
        else:
            offline = offline_for(target)
            try:
                tables = tuning.tune_static(target)
            except offline.ToolMissing as error:
                raise DeviceError(str(error)) from None
    files = tuning.write_tables(tables, out or tuning.TUNED)
    if json_:
        print_json({"files": [str(file) for file in files], "tables": tables})
    else:
        for file, table in zip(files, tables, strict=True):
            plain(f"wrote {file}: {sum(map(len, table['entries'].values()))} entries, {table['provenance']}")


COMMANDS = {"kernels": kernels, "tune": tune}
