"""The logs of a run: metrics and samples, which a resumed run writes again to the byte, and what else takes them.

What a run learned is a function of its plan and goes into metrics.jsonl and samples.jsonl; how fast it went is not, and
goes into speed.jsonl. Checkpoints hold how far the first two had been written; what came after is cut off when a run is
taken up again.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from memforge.errors import DeviceError, StorageError
from memforge.plan import Plan
from memforge.storage import storage_errors, sync
from memforge.training.checkpoint import LogMark
from memforge.training.run_directory import METRICS, SAMPLES, SPEED

START = LogMark(bytes=0, sha256=hashlib.sha256().hexdigest())


class Log:
    """A file of JSON lines that is only ever appended to."""

    def __init__(self, path: Path) -> None:
        self.path, self.size, self._sha = path, 0, hashlib.sha256()

    def append(self, row: Mapping[str, Any]) -> None:
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with storage_errors(self.path), self.path.open("ab") as file:
            file.write(line)
        self.size += len(line)
        self._sha.update(line)

    def mark(self) -> LogMark:
        """How far the log goes, with that much of it on the disk."""
        if self.size:
            with storage_errors(self.path):
                sync(self.path)
        return LogMark(bytes=self.size, sha256=self._sha.hexdigest())

    def cut_back(self, mark: LogMark, note: Callable[[str], None]) -> None:
        """Go on behind a mark. A log that is gone begins anew; one that is not what was written is an error."""
        if not self.path.exists():
            if mark.bytes:
                note(f"warning: {self.path} is gone: its rows before this step are lost")
            return
        with storage_errors(self.path), self.path.open("r+b") as file:
            kept = file.read(mark.bytes)
            if len(kept) != mark.bytes or hashlib.sha256(kept).hexdigest() != mark.sha256:
                raise StorageError(
                    f"{self.path}: is not what it was at the checkpoint; restore it, or delete it to go on without"
                )
            file.truncate(mark.bytes)
        self.size, self._sha = len(kept), hashlib.sha256(kept)

    def drop_unfinished_line(self) -> None:
        """Of a process that was killed while it wrote."""
        if not self.path.exists():
            return
        with storage_errors(self.path), self.path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


class Sink(Protocol):
    """Another place for rows of metrics."""

    def row(self, step: int, row: Mapping[str, float]) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


class Logs:
    """All logs of a run, and the sinks that its plan asks for."""

    def __init__(self, run_dir: Path, plan: Plan, run_id: str, note: Callable[[str], None]) -> None:
        self.metrics, self.samples, self.speed = (Log(run_dir / name) for name in (METRICS, SAMPLES, SPEED))
        self.note, self.sinks = note, _sinks(run_dir, plan, run_id)

    def marks(self) -> dict[str, LogMark]:
        return {log.path.name: log.mark() for log in (self.metrics, self.samples)}

    def cut_back(self, marks: Mapping[str, LogMark], note: Callable[[str], None]) -> None:
        """Go on behind these marks; behind none, from the start."""
        for log in (self.metrics, self.samples):
            log.cut_back(marks.get(log.path.name, START), note)
        self.speed.drop_unfinished_line()

    def row(self, metrics: Mapping[str, Any], speed: Mapping[str, Any]) -> None:
        self.metrics.append(metrics)
        if speed:
            self.speed.append(speed)
        numbers = {k: v for k, v in {**metrics, **speed}.items() if not isinstance(v, bool) and k != "step"}
        self._tell(lambda sink: sink.row(metrics["step"], numbers))

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.samples.append({"step": step, "prompt": prompt, "text": text})
        self._tell(lambda sink: sink.text(step, "sample", prompt + text))

    def close(self) -> None:
        self._tell(lambda sink: sink.close())

    def _tell(self, what: Callable[[Sink], None]) -> None:
        """A sink that fails, as what needs a network may, is told of and left out: the logs have it all."""
        for sink in list(self.sinks):
            try:
                what(sink)
            except Exception as error:  # noqa: BLE001  whatever a package of others raises
                self.sinks.remove(sink)
                self.note(f"warning: {type(sink).__name__.strip('_')} gets no more metrics: {error}")


class NoLogs(Logs):
    """Those of a rank that is not the first: nobody keeps them."""

    def __init__(self) -> None: ...

    def marks(self) -> dict[str, LogMark]:
        return {}

    def cut_back(self, marks: Mapping[str, LogMark], note: Callable[[str], None]) -> None: ...
    def row(self, metrics: Mapping[str, Any], speed: Mapping[str, Any]) -> None: ...
    def sample(self, step: int, prompt: str, text: str) -> None: ...
    def close(self) -> None: ...


def _sinks(run_dir: Path, plan: Plan, run_id: str) -> list[Sink]:
    """Raises DeviceError when a package is not installed."""
    assert plan.run.train is not None
    sinks: list[Sink] = []
    if plan.run.train.tensorboard:
        sinks.append(_TensorBoard(run_dir))
    if plan.run.train.wandb is not None:
        sinks.append(_Wandb(run_dir, plan, plan.run.train.wandb, run_id))
    return sinks


class _TensorBoard:
    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise DeviceError('train.tensorboard needs tensorboard: pip install "memforge[tb]"') from None
        with storage_errors(run_dir):
            self.writer = SummaryWriter(str(run_dir / "tensorboard"))

    def row(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, plan: Plan, project: str, run_id: str) -> None:
        try:
            import wandb
        except ImportError:
            raise DeviceError("train.wandb needs wandb: pip install wandb") from None
        given = {"project": project, "name": plan.name, "config": plan.model_dump(mode="json")}
        self.run = wandb.init(**given, dir=str(run_dir), id=run_id, resume="allow")

    def row(self, step: int, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self.run.log({name: text}, step=step)

    def close(self) -> None:
        self.run.finish()
