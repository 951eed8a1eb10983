"""Runs the jobs of an experiment through `memforge train`, some at a time, as far as the time goes."""

import fcntl
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

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
SECONDS_BETWEEN_LOOKS = 0.2


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

    def how_far(self, at_once: int) -> str:
        """In words, with about how long the rest takes with so many trainings at a time."""
        seconds = self.seconds_left()
        about = f", about {seconds / at_once / 3600:.1f} hours" if seconds else ""
        return f"{len(self.done)} done, {len(self.left) + self.waiting} left{about}"

    def seconds_left(self) -> float | None:
        """Of all trainings that are left: an arm's take as long a step as those of it that are done, or as all of
        them. None while it is not known which, or none is done.
        """
        if self.waiting or not self.done:
            return None
        paces: dict[str, list[float]] = defaultdict(list)
        for record in self.done.values():
            paces[record.arm].append(record.made["seconds"] / record.steps)
        usual = fmean(pace for arm in paces.values() for pace in arm)
        return sum(fmean(paces.get(job.arm, [usual])) * job.plan().run.train.steps for job in self.left)


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
    # What a search has yet to choose is not in a name, so that studies may come to share more of these.
    untuned = {arm: Settings() for arm in jobs.tuned_arms() if arm not in chosen}
    waiting = len({job.name for name in jobs.experiment.study for _, _, job in jobs.of_study(name, untuned)})
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


@dataclass(frozen=True)
class Training:
    """A job under way: where it trains and what it says go, how busy the machine was before it, and by what code."""

    job: Job
    out: Path
    log: Path
    load: float
    commit: str


@dataclass
class Runner:
    """Trains jobs, `at_once` at a time, in directories below `scratch`, which hold what was interrupted; records are
    all that is kept.
    """

    jobs: Jobs
    records: Records
    scratch: Path
    minutes: float | None = None
    at_once: int = 1
    started: float = field(default_factory=time.monotonic)

    def minutes_left(self) -> float | None:
        return None if self.minutes is None else self.minutes - (time.monotonic() - self.started) / 60

    def run(self) -> State:
        """Every job that is left, until the time is over; where the experiment stands then."""

        def left() -> tuple[str, list[Job]]:
            now = state(self.jobs, self.records)
            return now.how_far(self.at_once), now.left

        for record in self.train(left):
            self.records.write(record)
            plain(f"  {record.name} {told(record)}", stderr=True)
        return state(self.jobs, self.records)

    def train(self, left: Callable[[], tuple[str, list[Job]]]) -> Iterator[Record]:
        """The record of each job that is left, as its training ends, until the time is over. `left` says how far it
        is, and the jobs that have no record yet. What a training leaves is deleted once its record has been taken.

        Raises TrainingFailedError where a record cannot be made.
        """
        over = False
        with Processes(self.jobs.experiment.threads) as processes:
            under_way: dict[str, Training] = {}
            while True:
                how_far, jobs = left()
                over = over or ((minutes := self.minutes_left()) is not None and minutes <= 0)
                free = 0 if over else self.at_once - len(under_way)
                for job in [job for job in jobs if job.name not in under_way][:free]:
                    plain(f"[{how_far}] {job.name}", stderr=True)
                    under_way[job.name] = self.start(job, processes)
                if not under_way:
                    return
                name, code = processes.next_to_end()
                training = under_way.pop(name)
                if (record := self.record(training, code)) is None:
                    over = True
                else:
                    yield record
                    self.forget(training.job)

    def start(self, job: Job, processes: "Processes") -> Training:
        """Begin a training, or go on with it."""
        out, log = self.scratch / job.name, self.scratch / f"{job.name}.log"
        training = Training(job, out, log, os.getloadavg()[0], commit_of(self.jobs.directory))
        command = [*TRAIN, str(job.spec), "--out", str(training.out), "--overwrite"]
        command += [word for text in job.overrides for word in ("--set", text)]
        if self._is_begun(training.out, job):
            command = [*TRAIN, str(training.out), "--resume", "auto"]
        if (left := self.minutes_left()) is not None:
            command += ["--max-minutes", f"{max(left, 0.1):.2f}"]
        processes.start(job.name, command, training.log)
        return training

    def record(self, training: Training, code: int) -> Record | None:
        """That of a training that has ended; None if its time was over before."""
        job, out, log = training.job, training.out, training.log
        if code not in (0, NON_FINITE) or not (out / "summary.json").exists():
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise TrainingFailedError(f"{job.name}: memforge train ended with {code}: {''.join(last)} (see {log})")
        run = read_run(out)
        assert run.summary is not None
        if run.summary.ended == "budget":
            return None
        seconds = run.summary.training_seconds or 0.0
        return record_of(job, run, self.made(training, seconds))

    def made(self, training: Training, seconds: float) -> dict[str, Any]:
        """Where, when and how fast a record was made; all that may differ between two of the same job."""
        return {
            "threads": self.jobs.experiment.threads,
            "at_once": self.at_once,
            "load": round(training.load, 2),
            "seconds": round(seconds, 1),
            "commit": training.commit,
            "date": datetime.now(UTC).date().isoformat(),
            **environment(),
        }

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


class Processes:
    """Trainings under way, each with so many threads. Each signal that this process is told to stop with they are told
    once, which is why it is passed on where they are waited for; those left where the `with` ends are stopped.
    """

    def __init__(self, threads: int) -> None:
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.received: list[int] = []

    def __enter__(self) -> "Processes":
        stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {
            number: signal.signal(number, lambda number, _: self.received.append(number)) for number in stops
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(signal.SIGTERM)
        for process in self.running.values():
            process.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, name: str, command: list[str], log: Path) -> None:
        """Run a command, with what it says added to a file."""
        with log.open("a") as file:
            # In a session of its own, so that a Ctrl-C reaches it once.
            self.running[name] = subprocess.Popen(
                command, stdout=file, stderr=file, env=self.environment, start_new_session=True, close_fds=False
            )

    def next_to_end(self) -> tuple[str, int]:
        """Wait for the next that ends: its name and its exit code. Raises InterruptedRunError, once all have ended, if
        this process is told to stop.
        """
        names, told = ", ".join(self.running), 0
        while True:
            for number in self.received[told:]:
                self._tell(number)
                told += 1
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            if told and len(ended) == len(self.running):
                raise InterruptedRunError(f"{names}: interrupted; the same command goes on with them", self.received[0])
            if ended and not told:
                return ended[0], self.running.pop(ended[0]).returncode
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _tell(self, number: int) -> None:
        for process in self.running.values():
            process.send_signal(number)


def commit_of(directory: Path) -> str:
    """The commit that is checked out, marked where what git tracks is not as in it; empty where there is none."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, cwd=directory, capture_output=True, text=True, check=False).stdout.strip()


def environment() -> dict[str, Any]:
    """What two runs need to have in common to come out the same to the byte."""
    return {
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("memforge", "torch", "numba", "numpy")},
    }


def told(record: Record) -> str:
    """One line on a finished run."""
    scores = ", ".join(f"{name} {value:.4f}" for name, value in record.final.items() if name != "loss")
    return f"{record.ended} at step {record.steps:,} in {record.made['seconds'] / 60:.1f} min: {scores}"
