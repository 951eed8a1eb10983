"""The console script: streams and signals first, so that nothing that follows can end in a traceback."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TextIO, cast

from memforge.errors import MemforgeError, Stopped
from memforge.machine import set_environment


def main() -> None:
    """Run the command line and leave with its exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the program started
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  open until the end
        else:  # what the stream's encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    set_environment()
    code = 130
    try:
        signal.signal(signal.SIGTERM, _stop)
        from memforge.cli import app

        app(prog_name="memforge")
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except KeyboardInterrupt:
        cast(TextIO, sys.stderr).write("interrupted\n")
    except Stopped as stopped:
        code = stopped.exit_code
        cast(TextIO, sys.stderr).write(f"{stopped}\n")
    except MemforgeError as error:  # a plug-in that cannot be loaded ends the import
        code = error.exit_code
        cast(TextIO, sys.stderr).write(f"error: {error}\n")
    except OSError as error:  # --help into a full disk
        code = 4
        cast(TextIO, sys.stderr).write(f"error: {error.strerror}\n")
    finally:
        # From here on a signal ends the process without a word.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the interpreter would flush again, fail again, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


if __name__ == "__main__":
    main()
