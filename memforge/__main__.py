"""The console script: streams and signals first, so that nothing that follows can end in a traceback."""

import atexit
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO, cast

from memforge.errors import MemforgeError, Stopped
from memforge.machine import set_environment


def main() -> NoReturn:
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
    # The interpreter is not taken down: a thread of gloo or of a save that comes back to it then aborts the process.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # there is nobody left to tell
            stream.flush()
    os._exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


if __name__ == "__main__":
    main()
