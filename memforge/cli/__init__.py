"""The command line: a thin shell over the Python API. It parses arguments, prints, and picks exit codes."""

import os
import re
import time
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from memforge import __version__
from memforge.cli import build, data, doctor, explain, inspect, kernels, match, profile, runs, specs
from memforge.cli.options import APP, is_other_rank
from memforge.errors import (
    CheckFailedError,
    InterruptedRunError,
    MemforgeError,
    SpecError,
    Stopped,
    UsageError,
    printable,
)
from memforge.report.console import forget_stdout, plain, print_json
from memforge.report.diagnostics import error_record, show

INTERNAL_ERROR = 70
SECONDS_TO_TELL = 1.0
# What only some commands import, and only when they run.
PACKAGES = frozenset(("torch", "triton", "numpy", "numba", "safetensors", "tokenizers"))


class _Group(TyperGroup):
    """Turns every error into text and an exit code; no traceback reaches a user."""

    def invoke(self, ctx: Any) -> Any:
        as_json = "--json" in [*getattr(ctx, "_protected_args", []), *ctx.args]
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            forget_stdout()
            raise typer.Exit(0) from None
        except (Stopped, KeyboardInterrupt, Exception) as error:
            if isinstance(error, typer.Exit):
                raise
            if hasattr(error, "format_message"):  # a usage error, which typer prints
                if as_json:
                    _print_errors([{"message": error.format_message()}])
                raise
            code, message = _explained(error)
            if is_other_rank() and _concerns_all(error):
                # torchrun ends the first rank, which is about to say it, as soon as it sees another leave.
                time.sleep(SECONDS_TO_TELL)
                raise typer.Exit(code) from None
            if as_json:
                _print_errors(
                    [d.as_dict() for d in error.diagnostics] if isinstance(error, SpecError) else [{"message": message}]
                )
            elif isinstance(error, SpecError):
                show(error.diagnostics)
            else:
                plain(printable(message), stderr=True)
            if code == INTERNAL_ERROR and os.environ.get("MEMFORGE_TRACEBACK"):
                traceback.print_exc()
            raise typer.Exit(code) from None


def _print_errors(errors: list[dict[str, Any]]) -> None:
    print_json({"ok": False, "errors": [error_record(error) for error in errors]})


def _concerns_all(error: BaseException) -> bool:
    """Whether the first rank says the same: what all have agreed on, or what they have all been given."""
    same = isinstance(error, (SpecError, UsageError, CheckFailedError))
    return same or (isinstance(error, MemforgeError) and error.of_all_ranks)


def _explained(error: BaseException) -> tuple[int, str]:
    """The exit code and the one line that a user reads."""
    if isinstance(error, Stopped):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, InterruptedRunError):
        return error.exit_code, str(error)
    if isinstance(error, MemforgeError):
        return error.exit_code, f"error: {error}"
    text = str(error).strip().split("\n")[0]
    # torch reports an allocation that failed as a RuntimeError on a CPU and as OutOfMemoryError on a GPU.
    if isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text:
        return 3, f"error: out of memory: {text}"
    if isinstance(error, ImportError) and (package := _unimportable(error)) is not None:
        why = "" if isinstance(error, ModuleNotFoundError) and error.name == package else f" properly: {text}"
        return 3, f"error: this command needs {package}, which is not installed{why}"
    if isinstance(error, OSError):
        return 4, f"error: {error.filename or 'storage'}: {error.strerror or error}"
    hint = "this is a bug in memforge; MEMFORGE_TRACEBACK=1 shows where"
    return INTERNAL_ERROR, f"internal error: {type(error).__name__}: {text} ({hint})"


def _unimportable(error: ImportError) -> str | None:
    """The package whose import failed, if it is one of PACKAGES: the one that is named or the innermost imported."""
    lines = reversed(traceback.extract_tb(error.__traceback__))
    found = (re.match(r"(?:from|import)\s+(\w+)", line.line or "") for line in lines)
    names = [error.name or "", *(match[1] for match in found if match)]
    return next((top for name in names if (top := name.partition(".")[0]) in PACKAGES), None)


app = typer.Typer(
    name="memforge",
    cls=_Group,
    help="Compile a TOML spec of a language model with memory layers; prove its budget; train it.",
    **APP,
)


def _version(wanted: bool) -> None:
    if wanted:
        plain(f"memforge {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


for _module in (specs, explain, build, profile, match, runs, inspect, kernels, doctor):
    for _name, _command in _module.COMMANDS.items():
        app.command(_name)(_command)
app.add_typer(data.data_app)
