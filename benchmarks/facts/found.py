"""The records of an experiment, study by study."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property

from benchmarks.facts.experiment import FIGURE, Settings
from benchmarks.facts.jobs import Job, Jobs
from benchmarks.facts.records import Record
from benchmarks.facts.runner import State
from benchmarks.facts.shown import interval
from benchmarks.facts.statistics import estimate
from memforge.errors import UsageError


class Found:
    """The records of an experiment, by study."""

    def __init__(self, jobs: Jobs, now: State) -> None:
        self.experiment, self.jobs, self.now = jobs.experiment, jobs, now

    def study(self, name: str) -> list[tuple[Settings, int, Record]]:
        """Point, seed and record of each finished run of a study."""
        return [
            (point, seed, self.now.done[job.name])
            for point, seed, job in self.jobs.of_study(name, self.now.chosen)
            if job.name in self.now.done
        ]

    def all_done(self) -> Iterator[Job]:
        """The jobs that have a record; some more than once."""
        return (job for job in self.jobs.all(self.now.chosen) if job.name in self.now.done)

    @property
    def main(self) -> str:
        """The study that arms are compared in."""
        return next(iter(self.experiment.study))

    def by_arm(self, study: str) -> dict[str, list[Record]]:
        groups: dict[str, list[Record]] = defaultdict(list)
        for _, _, record in self.study(study):
            groups[record.arm].append(record)
        return groups

    def baseline(self) -> list[Record]:
        """The runs of the baseline as it was tuned, for what they cost; none while there are none."""
        return self.as_tuned.get(self.experiment.baseline, [])

    @cached_property
    def as_tuned(self) -> dict[str, list[Record]]:
        """The runs of each arm with what was chosen for it and nothing else, over all studies: one for each seed."""
        return {arm: self.by_name[arm] for arm in self.experiment.arm if self.by_name.get(arm)}

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
