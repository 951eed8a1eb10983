"""Batches read ahead of the step that needs them."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from memforge.training.data.stream import Tokens, Windows

# Batches that each worker is ahead by: one in work and one that waits.
AHEAD = 2


class Prefetch:
    """Batches of consecutive steps from `first_step` on, the same for any number of `workers`.

    Workers are threads: what they do is copy from mapped files, for which they give up the interpreter's lock. With
    none, a batch is read when it is asked for.
    """

    def __init__(
        self, stream: Windows, batch_size: int, *, first_step: int, workers: int, part: range | None = None
    ) -> None:
        """With a `part`, only those of the windows of each batch."""
        self._stream, self._batch_size, self._next = stream, batch_size, first_step
        self._part = range(batch_size) if part is None else part
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data") if workers else None
        self._ahead: dict[int, Future[Tokens]] = {}
        self._depth = AHEAD * workers

    def batch(self, step: int) -> Tokens:
        """The windows of a step: [batch_size or part, window]. Steps follow each other.

        What went wrong in a worker is raised.

        Step s holds the windows from s * batch_size on.
        """
        assert step == self._next, f"step {step} was asked for, {self._next} is next"
        if self._pool is None:
            batch = self._read(step)
        else:
            for ahead in range(step, step + 1 + self._depth):
                if ahead not in self._ahead:
                    self._ahead[ahead] = self._pool.submit(self._read, ahead)
            batch = self._ahead.pop(step).result()
        self._next += 1
        return batch

    def _read(self, step: int) -> Tokens:
        return self._stream.windows(step * self._batch_size + self._part.start, len(self._part))

    def close(self) -> None:
        """End the workers once the batches in work are read; those that wait are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
