"""The command line: a thin shell over the Python API. It parses arguments, prints, and picks exit codes."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from memforge import __version__
from memforge.cli import model, runs, specs
from memforge.errors import MemforgeError, SpecError, printable
from memforge.report.console import plain, print_json
from memforge.report.diagnostics import render

INTERNAL_ERROR = 70


class _Group(TyperGroup):
    """Turns every error into text and an exit code; no traceback reaches a user."""

    def invoke(self, ctx: Any) -> Any:
        as_json = "--json" in [*getattr(ctx, "_protected_args", []), *ctx.args]
        try:
            return super().invoke(ctx)
        except MemforgeError as error:
            _show(error, as_json=as_json)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            plain("interrupted", stderr=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            _forget_stdout()
            raise typer.Exit(0) from None
        except MemoryError:
            plain("out of memory", stderr=True)
            raise typer.Exit(3) from None
        except OSError as error:
            plain(f"{printable(str(error.filename or 'storage'))}: {error.strerror or error}", stderr=True)
            raise typer.Exit(4) from None
        except BaseException as error:
            if number := getattr(error, "stop_signal", None):
                plain(str(error), stderr=True)
                raise typer.Exit(128 + number) from None
            if not isinstance(error, Exception) or isinstance(error, typer.Exit) or hasattr(error, "exit_code"):
                raise
            _internal(error)
            raise typer.Exit(INTERNAL_ERROR) from None


def _show(error: MemforgeError, *, as_json: bool) -> None:
    if isinstance(error, SpecError):
        if as_json:
            print_json({"ok": False, "errors": [d.as_dict() for d in error.diagnostics]})
            return
        for line in render(error.diagnostics):
            plain(line, stderr=True)
        return
    if as_json:
        print_json({"ok": False, "errors": [{"message": str(error)}]})
        return
    plain(f"error: {printable(str(error))}", stderr=True)


def _internal(error: Exception) -> None:
    """A bug of memforge's own: one line, and the traceback only for those who ask for it."""
    plain(
        f"internal error: {type(error).__name__}: {printable(str(error).splitlines()[0] if str(error) else '')}",
        stderr=True,
    )
    if os.environ.get("MEMFORGE_TRACEBACK"):
        traceback.print_exc()
    else:
        plain("this is a bug in memforge; MEMFORGE_TRACEBACK=1 shows where", stderr=True)


app = typer.Typer(
    name="memforge",
    cls=_Group,
    help="Compile a TOML spec of a language model with memory layers; prove its budget; train it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
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


for _module in (specs, model, runs):
    for _name, _command in _module.COMMANDS.items():
        app.command(_name)(_command)


def main() -> None:
    """The console script. A reader that closes the pipe early ends the program quietly."""
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    try:
        app()
    finally:
        try:
            sys.stdout.flush()
        except (OSError, ValueError):
            _forget_stdout()


def _nowhere() -> TextIO:
    """Where output goes when the stream was closed before the program started."""
    return Path(os.devnull).open("w")


def _forget_stdout() -> None:
    """Let the interpreter's own flush at exit go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
