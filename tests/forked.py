"""The command line in processes of its own that need not load torch again: a server loads it once, and forks for each.

A child has the directory, environment and streams that it was asked to have, as `python -m memforge` would.
What happens before `main` (the options of the interpreter, what is loaded when) is not seen this way.
"""

import atexit
import gc
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

# What most commands that train, build or measure load, and all commands do.
LOADED = (
    "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.fsdp", "memforge.__main__", "memforge.cli",
    "memforge.export", "memforge.export.kernels", "memforge.profile.measure", "memforge.profile.dry_run",
    "memforge.report.html", "memforge.report.progress", "memforge.training", "memforge_kernels.product_key_topk.cpu",
)  # fmt: skip


class Server:
    """A process that has loaded what commands use, and runs one of them at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.told = b""
        atexit.register(self.process.kill)

    def run(self, args: list[str], cwd: Path | None, timeout: float) -> subprocess.CompletedProcess[str]:
        """As subprocess.run with captured text does. Raises TimeoutExpired."""
        with tempfile.TemporaryDirectory() as room:
            streams = [str(Path(room) / name) for name in ("out", "err")]
            asked = {"args": args, "cwd": str(cwd or Path.cwd()), "env": dict(os.environ), "streams": streams}
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
            self.process.stdin.flush()
            child = self._line(timeout)
            try:
                code = self._line(timeout)
            except TimeoutError:
                os.kill(child, signal.SIGKILL)
                self._line(timeout)
                raise subprocess.TimeoutExpired(args, timeout) from None
            out, err = (Path(path).read_text(encoding="utf-8", errors="strict") for path in streams)
        return subprocess.CompletedProcess(args, code, out, err)

    def _line(self, timeout: float) -> int:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            # Not readline: of two lines that came together it would keep the second where no selector sees it.
            while b"\n" not in self.told:
                if not selector.select(timeout):
                    raise TimeoutError
                self.told += os.read(self.process.stdout.fileno(), 4096)
        line, _, self.told = self.told.partition(b"\n")
        return int(line)


@cache
def server() -> Server:
    """That of this process."""
    return Server()


def _serve() -> None:
    from memforge.machine import set_environment

    set_environment()
    for name in LOADED:
        import_module(name)
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(asked)
        answers.write(f"{child}\n")
        answers.flush()
        _, status = os.waitpid(child, 0)
        answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
        answers.flush()


def _become(asked: dict[str, Any]) -> NoReturn:
    from memforge.__main__ import main

    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    for number, path in ((0, os.devnull), *zip((1, 2), asked["streams"], strict=True)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = ["memforge", *asked["args"]]
    try:
        main()
    finally:  # an error that it let through
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    _serve()
