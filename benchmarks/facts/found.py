"""The records of an experiment, study by study."""

import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property

from benchmarks.facts.experiment import FIGURE, Experiment, Settings
from benchmarks.facts.jobs import Jobs
from benchmarks.facts.records import Record
from benchmarks.facts.runner import State
from benchmarks.facts.shown import interval
from benchmarks.facts.statistics import estimate
from memforge.errors import UsageError


class Found:
    """The records of an experiment, by study."""

    def __init__(self, experiment: Experiment, jobs: Jobs, now: State) -> None:
        self.experiment, self.jobs, self.now = experiment, jobs, now

    def study(self, name: str) -> list[tuple[Settings, int, Record]]:
        """Point, seed and record of each finished run of a study."""
        return [
            (point, seed, self.now.done[job.name])
            for point, seed, job in self.jobs.of_study(name, self.now.chosen)
            if job.name in self.now.done
        ]

    @property
    def main(self) -> str:
        """The study that arms are compared in."""
        return next(iter(self.experiment.study))

    def by_arm(self, study: str) -> dict[str, list[Record]]:
        groups: dict[str, list[Record]] = defaultdict(list)
        for _, _, record in self.study(study):
            groups[record.arm].append(record)
        return groups

    def baseline(self) -> Record | None:
        """A run of the baseline, for what it costs; None while there is none."""
        runs = (self.by_arm(name)[self.experiment.baseline] for name in self.experiment.study)
        return next((run for found in runs for run in found), None)

    @cached_property
    def as_tuned(self) -> dict[str, list[Record]]:
        """The runs of each arm with what was chosen for it and nothing else, over all studies: one for each seed."""
        plain = [name for name, study in self.experiment.study.items() if not study.vary and not study.set]
        groups: dict[str, dict[int, Record]] = defaultdict(dict)
        for name in plain:
            for _, seed, record in self.study(name):
                groups[record.arm][seed] = record
        return {arm: list(records.values()) for arm, records in groups.items()}

    def label(self, arm: str) -> str:
        return self.experiment.arm[arm].label

    @cached_property
    def by_name(self) -> dict[str, list[Record]]:
        """The records of each job by its name without the seed; none of those that are left."""
        runs: dict[str, list[Record]] = {stem_of(job.name): [] for job in self.jobs.all(self.now.chosen)}
        for record in self.now.done.values():
            runs[stem_of(record.name)].append(record)
        return runs

    def told(self, text: str) -> str:
        """A finding with its figures. Raises UsageError where it names no run."""
        runs = self.by_name

        def figure(match: re.Match[str]) -> str:
            if match["run"] not in runs and not self.now.waiting:
                raise UsageError(f"findings: {match[0]}: {match['run']} is no run, but for its seed")
            return over(runs.get(match["run"], ()), match["measure"]) or "(not trained yet)"

        return FIGURE.sub(figure, text)


def stem_of(name: str) -> str:
    """The name of a job without its seed."""
    return name.partition(".seed-")[0]


def scores_of(records: Iterable[Record], measure: str) -> dict[int, float]:
    """Of the runs that have it, by seed."""
    return {record.seed: value for record in records if (value := record.figure(measure)) is not None}


def over(records: Iterable[Record], measure: str) -> str:
    """The mean of a measure over the runs that have it."""
    scores = scores_of(records, measure)
    return interval(measure, estimate([*scores.values()])) if scores else ""
