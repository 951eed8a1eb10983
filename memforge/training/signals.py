"""Ctrl-C, SIGTERM and a lost terminal: the first asks the run to save and stop, the second stops at once."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

from memforge.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ECHO_SECONDS = 1.0


class StopSignal:
    """While entered, remembers the signal that asked to stop. Until `arm` there is nothing to save, and a signal
    interrupts at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._armed = False
        self._came = 0.0
        self._before: dict[int, object] = {}

    def asked(self) -> list[int]:
        """For each signal, 1 if it came."""
        return [int(self.number == number) for number in SIGNALS]

    def arm(self) -> None:
        self._armed = True

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) == signal.SIG_IGN:  # nohup
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._armed and self.number is None:
            self.number, self._came = number, time.monotonic()
            return
        # What stops a whole job signals its ranks, and what has started the ranks passes the signal on to them.
        if number == self.number and "MEMFORGE_LAUNCHED" in os.environ and time.monotonic() - self._came < ECHO_SECONDS:
            return
        raise Stopped(number)
