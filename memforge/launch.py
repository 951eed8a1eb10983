"""`--nproc N`: the same command in N ranks on this machine, with the variables and the store that torchrun gives them.

The ranks are watched here and not by torch's elastic agent, whose store listens on every interface, which sends SIGTERM
to rank 0, at work on a message or a checkpoint, as soon as another rank has left, and kills it after 30 s that nothing
changes. To a second signal it answers with SIGTERM, whichever it was, and the whole wait once more.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import NamedTuple

from memforge.errors import DeviceError

LOOPBACK, INTERFACE = "127.0.0.1", "lo"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# The exit codes that memforge's ranks leave with together, each when its work is done. With 1 and 3 there is no work: a
# claim failed before the run began, a traceback, or a rank that waited for another for as long as it was told to.
AGREED = frozenset({1, 2, 3, 4, 5, *(128 + number for number in STOPS)})
AT_WORK = AGREED - {1, 3}

RESUME = "--resume auto goes on from the last checkpoint"

# Seconds from the last signal that can be handled to SIGKILL, and from that until a rank is left to the system.
LAST_WORD = 5.0

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class _Left(NamedTuple):
    """A rank has ended; codes below zero are signals."""

    rank: int
    code: int


class _Stop(NamedTuple):
    """This process was asked to stop."""

    number: int


_Events = SimpleQueue[_Left | _Stop]


def launch(
    arguments: Sequence[str],
    nproc: int,
    *,
    module: str = "memforge",
    grace: float = 600.0,
    lost_grace: float = 30.0,
) -> int:
    """The exit code of `python -m MODULE ARGUMENTS` in `nproc` ranks: that of the first one that failed, and 3, with a
    line on stderr, if a signal killed it.

    Ranks get signals from here, each once. After the first they have `grace` seconds to save, and as long after one of
    them has left with a code that the others know of; `lost_grace` after any other failure. A second signal ends them.

    Raises DeviceError if a rank cannot be started.
    """
    assert nproc >= 1
    events: _Events = SimpleQueue()
    with socket.create_server((LOOPBACK, 0)) as listener, _stops_put_in(events):
        ranks = _Ranks(events, grace, lost_grace)
        try:
            ranks.start(_command(module, arguments), _environments(nproc, listener.getsockname()[1]))
            store = _store(listener)  # after the ranks, which load torch at the same time, and wait for it
            ranks.watch()
            del store
        finally:
            ranks.send(signal.SIGKILL)
    code, message = ranks.verdict()
    if message:
        sys.stderr.write(f"error: {message}\n")
    return code


def _command(module: str, arguments: Sequence[str]) -> list[str]:
    """The command of a rank, which finds modules in the working directory only if this process does: `-m` would look
    there first, a console script does not look there."""
    safe = [] if {"", str(Path.cwd())} & set(sys.path) else ["-P"]
    return [sys.executable, *safe, "-m", module, *arguments]


def _environments(nproc: int, port: int) -> list[dict[str, str]]:
    """The variables of each rank. All that the ranks open for each other is on the loopback interface."""
    shared = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc)),
        **os.environ,
        "MEMFORGE_LAUNCHED": "1",
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "GROUP_RANK": "0",
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 would open one on every interface
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]


def _store(listener: socket.socket) -> object:
    """The store by which the ranks find each other, on a socket that it takes over."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    port = listener.getsockname()[1]
    return TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


@contextmanager
def _stops_put_in(events: _Events) -> Iterator[None]:
    """While entered, signals that ask to stop are events."""

    def put(number: int, frame: FrameType | None) -> None:
        events.put(_Stop(number))  # the one queue that a signal handler may use

    before = {number: signal.getsignal(number) for number in STOPS}
    caught = [number for number in STOPS if before[number] != signal.SIG_IGN]  # nohup; the ranks inherit it
    for number in caught:
        signal.signal(number, put)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number] or signal.SIG_DFL)


class _Ranks:
    """The processes of a run, what has become of them, and how long the rest may still take."""

    def __init__(self, events: _Events, grace: float, lost_grace: float) -> None:
        self._events, self._grace, self._lost_grace = events, grace, lost_grace
        self._processes: list[subprocess.Popen[bytes]] = []
        self._codes: dict[int, int] = {}  # in the order in which the ranks left
        self._stops: list[int] = []
        self._late: set[int] = set()  # ranks that had to be killed
        self._deadline: float | None = None
        self._at_deadline = signal.SIGTERM

    def start(self, command: list[str], environments: list[dict[str, str]]) -> None:
        """Each rank in a session of its own, so that Ctrl-C in a terminal reaches this process alone; should it be
        killed, the system sends SIGTERM to the ranks."""
        prctl = ctypes.CDLL(None).prctl
        for rank, environment in enumerate(environments):
            try:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
                )
            except OSError as error:
                raise DeviceError(f"rank {rank} of {len(environments)} cannot be started: {error.strerror}") from None
            self._processes.append(process)
        for rank in range(len(environments)):
            threading.Thread(target=self._await, args=(rank,), daemon=True).start()

    def _await(self, rank: int) -> None:
        self._events.put(_Left(rank, self._processes[rank].wait()))

    def watch(self) -> None:
        """Returns when all ranks have ended, or cannot be."""
        while self._running():
            try:
                event = self._events.get(timeout=self._remaining())
            except Empty:
                if self._late:
                    return
                self._out_of_time()
                continue
            if isinstance(event, _Left):
                self._left(event.rank, event.code)
            else:
                self._stop(event.number)

    def _running(self) -> list[int]:
        return [rank for rank in range(len(self._processes)) if rank not in self._codes]

    def _remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _allow(self, seconds: float) -> None:
        """The ranks have so long at most; what they were allowed before is not extended."""
        end = time.monotonic() + seconds
        self._deadline = end if self._deadline is None else min(end, self._deadline)

    def _left(self, rank: int, code: int) -> None:
        code = 128 - code if -code in self._stops else code
        self._codes[rank] = code
        if code:
            self._allow(self._grace if code in AT_WORK else self._lost_grace)

    def _stop(self, number: int) -> None:
        self._stops.append(number)
        self._at_deadline = signal.SIGKILL
        self._allow((self._grace, LAST_WORD, 0.0)[min(len(self._stops), 3) - 1])
        self.send(number)

    def _out_of_time(self) -> None:
        number, self._at_deadline = self._at_deadline, signal.SIGKILL
        if number == signal.SIGKILL:
            self._late.update(self._running())
        self.send(number)
        self._deadline = time.monotonic() + LAST_WORD

    def send(self, number: int) -> None:
        """A signal for every rank that runs; SIGKILL, which none can pass on, also for the processes it has started."""
        for rank in self._running():
            with suppress(ProcessLookupError):
                (os.killpg if number == signal.SIGKILL else os.kill)(self._processes[rank].pid, number)

    def verdict(self) -> tuple[int, str | None]:
        """The exit code for all, and what is to be said that no rank could say."""
        codes = self._codes
        late = [rank for rank in sorted(self._late) if codes.get(rank, -signal.SIGKILL) == -signal.SIGKILL]
        first = next((rank for rank, code in codes.items() if code), None)
        if self._stops and late and (first is None or first in late or codes[first] > 0):
            return 128 + self._stops[-1], f"{self._name(late[0])} did not stop in time and was killed"
        if first is None:
            return 0, None
        code = codes[first]
        if code < 0:
            message = f"{self._name(first)} was killed by {_signal_name(-code)}{self._others(first)}"
            return DeviceError.exit_code, f"{message}; {RESUME}"
        asked = {0, *(128 + number for number in self._stops)}
        agreed = code in AGREED and len(codes) == len(self._processes) and set(codes.values()) == {code}
        if agreed or set(codes.values()) <= asked:
            return code, None
        if late:
            return code, f"{self._name(late[0])} did not answer and was killed; {RESUME}"
        return code, f"{self._name(first)} left with exit code {code}{self._others(first)}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} (process {self._processes[rank].pid})"

    def _others(self, rank: int) -> str:
        """That the others have not come to their own end either, if so."""
        others = [self._codes.get(other) != 0 for other in range(len(self._processes)) if other != rank]
        return "; the other ranks were ended" if any(others) else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"
