"""Runs the jobs of an experiment through `memforge train`, one after the other, as far as the time goes."""

import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from benchmarks.facts.experiment import Experiment, Settings
from benchmarks.facts.jobs import Job, Jobs
from benchmarks.facts.records import Record, Records, StaleError, record_of
from memforge.errors import CheckFailedError, InterruptedRunError, MemforgeError, StorageError, UsageError
from memforge.machine import cpu_name
from memforge.plan import read_plan
from memforge.report.console import plain
from memforge.report.run import read_run

TRAIN = [sys.executable, "-m", "memforge", "train"]
NON_FINITE = 5


class TrainingFailedError(MemforgeError):
    """`memforge train` did not end as it should."""

    exit_code = 1


@dataclass(frozen=True)
class State:
    """What is done and what is left. `chosen` are the settings that were found for each tuned arm."""

    done: dict[str, Record]
    left: list[Job]
    chosen: dict[str, Settings]
    waiting: int


def state(jobs: Jobs, records: Records) -> State:
    """Where an experiment stands. Raises CheckFailedError naming every record that was made of another arm."""
    done, left, stale = dict[str, Record](), dict[str, Job](), list[str]()

    def look(job: Job) -> Record | None:
        if job.name in done:
            return done[job.name]
        try:
            record = records.read(job)
        except StaleError:
            stale.append(job.name)
            return None
        if record is None:
            left[job.name] = job
        else:
            done[job.name] = record
        return record

    chosen = {}
    for arm in jobs.tuned_arms():
        found = [(job, look(job)) for job in jobs.trials(arm)]
        if all(record is not None for _, record in found):
            chosen[arm] = best(jobs.experiment, arm, [record for _, record in found if record is not None])
    for job in jobs.all(chosen):
        look(job)
    # What a search has yet to choose is not in a name.
    untuned = dict.fromkeys(jobs.tuned_arms(), Settings())
    waiting = len({job.name for job in jobs.all(untuned)} - {*done, *left, *stale})
    if stale:
        files = " ".join(str(records.path(name)) for name in sorted(set(stale)))
        raise CheckFailedError(
            f"{len(set(stale))} finished runs are of an arm or settings that have changed since: "
            f"{', '.join(sorted(set(stale)))}; undo the change, or delete them to have them made again: rm {files}"
        )
    return State(done, list(left.values()), chosen, waiting)


def best(experiment: Experiment, arm: str, found: list[Record]) -> Settings:
    """The trial that the search chooses: of those that have its measure, the one with most or least of it."""
    measured = [(record.figure(experiment.search.measure), i) for i, record in enumerate(found)]
    sound = [(value, i) for value, i in measured if value is not None]
    if not sound:
        raise CheckFailedError(f"arm.{arm}: no trial of its search has a {experiment.search.measure}")
    sign = 1 if experiment.search.best == "least" else -1
    _, chosen = min((sign * value, i) for value, i in sound)
    return experiment.arm[arm].trials()[chosen]


@contextmanager
def only_one(*directories: Path) -> Iterator[None]:
    """Inside, no other process trains into these directories. Raises UsageError if one does."""
    with ExitStack() as stack:
        for directory in directories:
            directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((directory / ".lock").open("w"))
            os.set_inheritable(file.fileno(), True)  # a training that outlives this process holds it too
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{directory}: another process runs this experiment") from None
        yield


@dataclass
class Runner:
    """Trains jobs in directories below `scratch`, which hold what was interrupted; records are all that is kept."""

    jobs: Jobs
    records: Records
    scratch: Path
    minutes: float | None = None
    started: float = field(default_factory=time.monotonic)

    def minutes_left(self) -> float | None:
        return None if self.minutes is None else self.minutes - (time.monotonic() - self.started) / 60

    def run(self) -> State:
        """Every job that is left, until the time is over; where the experiment stands then."""
        while True:
            now = state(self.jobs, self.records)
            if not now.left or ((left := self.minutes_left()) is not None and left <= 0):
                return now
            job = now.left[0]
            plain(f"[{len(now.done)} done, {len(now.left) + now.waiting} left] {job.name}", stderr=True)
            record = self.train(job)
            if record is None:
                return state(self.jobs, self.records)
            self.records.write(record)
            self.forget(job)
            plain(f"  {told(record)}", stderr=True)

    def train(self, job: Job) -> Record | None:
        """The record of a job; None if the time was over before. Raises TrainingFailedError where it cannot be made."""
        out = self.scratch / job.name
        log = self.scratch / f"{job.name}.log"
        command = [*TRAIN, str(job.spec), "--out", str(out), "--overwrite"]
        command += [word for text in job.overrides for word in ("--set", text)]
        if self._is_begun(out, job):
            command = [*TRAIN, str(out), "--resume", "auto"]
        if (left := self.minutes_left()) is not None:
            command += ["--max-minutes", f"{max(left, 0.1):.2f}"]
        load = os.getloadavg()[0]
        with log.open("a") as file:
            code, stopped_by = watched(command, file, self.jobs.experiment.threads)
        if stopped_by is not None:
            raise InterruptedRunError(f"{job.name}: interrupted; the same command goes on with it", stopped_by)
        if code not in (0, NON_FINITE) or not (out / "summary.json").exists():
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise TrainingFailedError(f"{job.name}: memforge train ended with {code}: {''.join(last)} (see {log})")
        run = read_run(out)
        assert run.summary is not None
        if run.summary.ended == "budget":
            return None
        return record_of(job, run, made(self.jobs, run.summary.training_seconds or 0.0, load))

    def forget(self, job: Job) -> None:
        """Delete what a training has left, once there is a record of it."""
        shutil.rmtree(self.scratch / job.name, ignore_errors=True)
        (self.scratch / f"{job.name}.log").unlink(missing_ok=True)

    @staticmethod
    def _is_begun(out: Path, job: Job) -> bool:
        """Whether a directory holds a checkpoint of this very job; of another, it is left over from before a change."""
        try:
            same = read_plan(out / "plan.json") == job.plan()
        except StorageError:
            return False
        return same and any(out.glob("step-*"))


def watched(command: list[str], log: IO[str], threads: int) -> tuple[int, int | None]:
    """The exit code of a training, and the signal that this process was told to stop with: the training is told too,
    and waited for.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    stopped_by = None
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, _: object) -> None:
        nonlocal stopped_by
        stopped_by = number
        if process is not None:
            process.send_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        # In a session of its own, so that a Ctrl-C reaches it once.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True, close_fds=False
        )
        if stopped_by is not None:
            process.send_signal(stopped_by)
        return process.wait(), stopped_by
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def made(jobs: Jobs, seconds: float, load: float) -> dict[str, Any]:
    """Where, when and how fast a record was made; all that may differ between two of the same job."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=jobs.directory, capture_output=True, text=True, check=False
    )
    return {
        "cpu": cpu_name(),
        "threads": jobs.experiment.threads,
        "load": round(load, 2),
        "seconds": round(seconds, 1),
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("memforge", "torch", "numba", "numpy")},
    }


def told(record: Record) -> str:
    """One line on a finished run."""
    scores = ", ".join(f"{name} {value:.4f}" for name, value in record.final.items() if name != "loss")
    return f"{record.ended} at step {record.steps:,} in {record.made['seconds'] / 60:.1f} min: {scores}"
