"""Runs the jobs of an experiment through `memforge train`, some at a time, as far as the time goes."""

import fcntl
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

from benchmarks.facts.experiment import Experiment, Settings
from benchmarks.facts.jobs import Job, Jobs
from benchmarks.facts.records import Made, Record, Records, StaleError, changed, read_record, record_of
from memforge.errors import CheckFailedError, InterruptedRunError, MemforgeError, NonFiniteError, UsageError
from memforge.machine import cpu_name
from memforge.report.console import plain
from memforge.report.run import read_run
from memforge.storage import json_text, replace_file

TRAIN = [sys.executable, "-m", "memforge", "train"]
SECONDS_BETWEEN_LOOKS = 0.2
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class TrainingFailedError(MemforgeError):
    """`memforge train` did not end as it should."""

    exit_code = 1


@dataclass(frozen=True)
class State:
    """What is done and what is left. `chosen` are the settings that were found for each tuned arm, `others` the records
    that no run has: of an arm, a study or a trial that was renamed or taken out.
    """

    done: dict[str, Record]
    left: list[Job]
    chosen: dict[str, Settings]
    waiting: int
    others: list[str]

    def how_far(self, at_once: int) -> str:
        """In words, with about how long the rest takes with so many trainings at a time."""
        seconds = self.seconds_left()
        about = f", about {seconds / at_once / 3600:.1f} hours" if seconds else ""
        others = f"; {len(self.others)} records are of no run of this experiment" if self.others else ""
        return f"{len(self.done)} done, {len(self.left) + self.waiting} left{about}{others}"

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
        return sum(fmean(paces.get(job.arm, [usual])) * job.steps for job in self.left)


def state(jobs: Jobs, records: Records) -> State:
    """Where an experiment stands. Raises CheckFailedError naming every record that was made of another arm."""
    done, left, stale = dict[str, Record](), dict[str, Job](), dict[str, str]()

    def look(job: Job) -> Record | None:
        if job.name in done:
            return done[job.name]
        try:
            record = records.read(job)
        except StaleError as error:
            stale[job.name] = str(error)
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
    if untuned:
        stale |= stale_of(jobs, records, untuned)
    if stale:
        by_change = defaultdict(list)
        for name, change in sorted(stale.items()):
            by_change[change].append(name)
        told = "; ".join(f"{', '.join(names)}: {change}" for change, names in by_change.items())
        files = shlex.join(str(records.path(name)) for name in sorted(stale))
        raise CheckFailedError(
            f"{len(stale)} finished runs are of an arm or settings that have changed since: {told}; undo the change, "
            f"or delete them to have them made again: rm {files}"
        )
    # While a search goes on it is not known which runs the arms that it tunes have.
    told_later = {name for name in jobs.experiment.arm if jobs.tuned_as(name) in untuned}
    unknown = sorted(records.names() - done.keys() - left.keys())
    others = [name for name in unknown if read_record(records.path(name)).arm not in told_later]
    return State(done, list(left.values()), chosen, waiting, others)


def stale_of(jobs: Jobs, records: Records, untuned: Container[str]) -> dict[str, str]:
    """What has changed, by name, since runs of studies were made of arms whose search is not whole any more. They say
    themselves what it had chosen.
    """
    found = {}
    for record in records.all():
        arm = jobs.experiment.arm.get(record.arm)
        if arm is None or (tuned := arm.tuned_as or record.arm) not in untuned:
            continue
        searched = jobs.experiment.arm[tuned].searched & record.settings.keys()
        for job in jobs.all({tuned: {key: record.settings[key] for key in searched}}):
            if job.name == record.name and job.fingerprint != record.fingerprint:
                found[job.name] = changed(record, job)
    return found


def best(experiment: Experiment, arm: str, found: list[Record]) -> Settings:
    """The trial that the search chooses: of those that have its measure, the one with most or least of it. Raises
    CheckFailedError where all have diverged.
    """
    measured = [(record.figure(experiment.search.measure), i) for i, record in enumerate(found)]
    sound = [(value, i) for value, i in measured if value is not None]
    if not sound:
        raise CheckFailedError(
            f"arm.{arm}: no trial of its search has a {experiment.search.measure}: all have diverged; give it others"
        )
    sign = 1 if experiment.search.best == "least" else -1
    _, chosen = min((sign * value, i) for value, i in sound)
    return experiment.arm[arm].trials()[chosen]


@contextmanager
def only_one(*directories: Path) -> Iterator[None]:
    """Inside, no other process trains into these directories. Raises UsageError if one does."""
    with ExitStack() as stack:
        for directory in directories:
            directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((directory / ".lock").open("a+"))
            os.set_inheritable(file.fileno(), True)  # a training that outlives this process holds it too
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise UsageError(
                    f"{directory}: another process runs this experiment: {file.read()}, or trainings that it has left, "
                    "which end by themselves"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


@dataclass(frozen=True)
class Training:
    """A job under way: where it trains and what it says go, how busy the machine was before it, and by what code, one
    commit for each it was gone on with.
    """

    job: Job
    out: Path
    log: Path
    load: float
    commits: list[str]


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

    def time_is_over(self) -> bool:
        return (left := self.minutes_left()) is not None and left <= 0

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
        over = False  # or one has stopped for it
        with Processes(self.jobs.experiment.threads) as processes:
            under_way: dict[str, Training] = {}
            while True:
                how_far, jobs = left()
                processes.require_going()
                over = over or self.time_is_over()
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
        """Begin a training, or go on with what was begun of this very job with this processor and these packages."""
        out, log, note = self.left_by(job)
        ours, commits = {"fingerprint": job.fingerprint, **environment()}, [commit_of(Path(__file__).parent)]
        begun = read_note(note)
        if begun.get("with") == ours and any(out.glob("step-*")):
            commits = list(dict.fromkeys([*begun["commits"], *commits]))
            command = [*TRAIN, str(out), "--resume", "auto"]
        else:
            shutil.rmtree(out, ignore_errors=True)
            command = [*TRAIN, str(job.spec), "--out", str(out)]
            command += [word for text in job.overrides for word in ("--set", text)]
        replace_file(note, json_text({"with": ours, "commits": commits}))
        if (left := self.minutes_left()) is not None:
            command += ["--max-minutes", f"{max(left, 0.1):.2f}"]
        load = os.getloadavg()[0]
        processes.start(job.name, command, log)
        return Training(job, out, log, load, commits)

    def record(self, training: Training, code: int) -> Record | None:
        """That of a training that has ended; None if its time was over before. Raises TrainingFailedError where there
        is none.
        """
        job, out, log = training.job, training.out, training.log
        if code not in (0, NonFiniteError.exit_code) or not (out / "summary.json").exists():
            said = [line for line in log.read_text(errors="replace").splitlines() if line[:1].strip()]
            raise TrainingFailedError(f"{job.name}: memforge train ended with {code}: {''.join(said[-1:])} (see {log})")
        run = read_run(out)
        assert run.summary is not None
        if run.summary.ended == "budget":
            return None
        seconds = run.summary.training_seconds or 0.0
        return record_of(job, run, self.made(training, seconds))

    def made(self, training: Training, seconds: float) -> Made:
        return {
            "threads": self.jobs.experiment.threads,
            "at_once": self.at_once,
            "load": round(training.load, 2),
            "seconds": round(seconds, 3),
            "commit": ", ".join(training.commits),
            "date": datetime.now(UTC).date().isoformat(),
            **environment(),
        }

    def left_by(self, job: Job) -> tuple[Path, Path, Path]:
        """Where a training of a job leaves its run, what it says, and what it was begun with."""
        return self.scratch / job.name, self.scratch / f"{job.name}.log", self.scratch / f"{job.name}.json"

    def forget(self, job: Job) -> None:
        """Delete what a training has left, once there is a record of it."""
        out, *files = self.left_by(job)
        shutil.rmtree(out, ignore_errors=True)
        for file in files:
            file.unlink(missing_ok=True)


def read_note(path: Path) -> dict[str, Any]:
    """What a training was begun with; nothing where that is not known."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Processes:
    """Trainings under way, each with so many threads. Each signal that this process is told to stop with they are told
    once, which is why it is passed on where they are waited for; those left where the `with` ends are stopped.
    """

    def __init__(self, threads: int) -> None:
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.received: list[int] = []
        self._passed_on = 0

    def __enter__(self) -> "Processes":
        # What is ignored stays so, as under nohup.
        self._before = {
            number: signal.signal(number, lambda number, _: self.received.append(number))
            for number in STOPS
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(signal.SIGTERM)
        while any(process.poll() is None for process in self.running.values()):
            self._pass_on()
            time.sleep(SECONDS_BETWEEN_LOOKS)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def require_going(self) -> None:
        """Raises InterruptedRunError if this process was told to stop."""
        if self.received:
            raise InterruptedRunError("interrupted; the same command goes on", self.received[0])

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
        names = ", ".join(self.running)
        while True:
            self._pass_on()
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            if self._passed_on and len(ended) == len(self.running):
                raise InterruptedRunError(f"{names}: interrupted; the same command goes on with them", self.received[0])
            if ended and not self._passed_on:
                return ended[0], self.running.pop(ended[0]).returncode
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _pass_on(self) -> None:
        for number in self.received[self._passed_on :]:
            self._tell(number)
            self._passed_on += 1

    def _tell(self, number: int) -> None:
        for process in self.running.values():
            process.send_signal(number)


def commit_of(directory: Path) -> str:
    """The commit that is checked out, marked where what git tracks is not as in it; empty where there is none."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, cwd=directory, capture_output=True, text=True, check=False).stdout.strip()


class Environment(TypedDict):
    cpu: str
    python: str
    versions: dict[str, str]


def environment() -> Environment:
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
