"""Which trainings an experiment needs, and in which order: first those that tune an arm, then those of its studies."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.facts.experiment import SEED, Experiment, Settings, Study, Value
from memforge.cost import CostReport, estimate
from memforge.errors import CheckFailedError, SpecError, UsageError
from memforge.parity import Axis, claimed, report_seq_len, require
from memforge.plan import Plan, make_plan
from memforge.spec import load_spec

# Settings of [train] that say how a run is kept and not what it finds.
KEEPING = frozenset(
    ("checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "async_checkpoints", "data_workers", "tensorboard")
)


@dataclass(frozen=True)
class Job:
    """One training: the spec of an arm, all that is set in it, in order, and what sources of facts are pinned to."""

    name: str
    arm: str
    spec: Path
    settings: Mapping[str, Value]
    corpora: Mapping[str, str]
    threads: int

    @property
    def overrides(self) -> list[str]:
        """As --set takes them."""
        return [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]

    def plan(self) -> Plan:
        return plan_of(self.spec, tuple(self.overrides))

    @property
    def steps(self) -> int:
        train = self.plan().run.train
        return 0 if train is None else train.steps

    @property
    def fingerprint(self) -> str:
        return self.fingerprint_of(self.plan())

    def fingerprint_of(self, plan: Plan) -> str:
        """SHA-256 of all that decides what a training by this plan finds: that of the job, or of what was trained in
        its name. What has its default is left out, as new keys will.
        """
        run = plan.run.model_dump(mode="json", exclude_defaults=True)
        run["train"] = {key: value for key, value in run["train"].items() if key not in KEEPING}
        decides = [plan.model.model_hash, run, self.corpora.get(source_of(plan), ""), self.threads]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


@cache
def plan_of(spec: Path, overrides: tuple[str, ...]) -> Plan:
    """The plan of a spec; a process reads each once."""
    return make_plan(load_spec(spec, overrides=list(overrides)))


def source_of(plan: Plan) -> str:
    """The source of the facts that a plan trains on; empty where it trains on none."""
    return str(getattr(plan.run.data, "source", ""))


class Jobs:
    """The jobs of an experiment whose file lies in `directory`."""

    def __init__(self, experiment: Experiment, directory: Path) -> None:
        self.experiment, self.directory = experiment, directory

    def _job(self, name: str, arm: str, *settings: Settings) -> Job:
        given = self.experiment.arm[arm]
        merged: Settings = dict(self.experiment.set)
        for more in (given.set, *settings):
            merged |= more
        corpora, threads = self.experiment.corpora, self.experiment.threads
        return Job(name, arm, self.directory / given.spec, merged, corpora, threads)

    def trials(self, arm: str) -> list[Job]:
        """Those that tune an arm."""
        search = self.experiment.search
        return [
            self._job(f"search.{arm}.{i}", arm, search.set, trial, {SEED: search.seed})
            for i, trial in enumerate(self.experiment.arm[arm].trials())
        ]

    def of_study(self, name: str, chosen: Mapping[str, Settings]) -> Iterator[tuple[Settings, int, Job]]:
        """Each point, seed and job of a study, for arms whose settings were `chosen`; all arms of a seed together."""
        study = self.experiment.study[name]
        for seed in study.seeds:
            for point in study.points():
                for arm in study.arms:
                    if (tuned := self.tuned_as(arm)) in chosen:
                        yield point, seed, self._of_study(study, arm, point, chosen[tuned], seed)

    def _of_study(self, study: Study, arm: str, point: Settings, chosen: Settings, seed: int) -> Job:
        """What differs from what the arm has anyway is in the name, so that studies share what they have in common."""
        given = study.set | point
        usual = self.experiment.set | chosen
        parts = [f"{key}-{value}" for key, value in given.items() if usual.get(key) != value]
        return self._job(".".join([arm, *sorted(parts), f"seed-{seed}"]), arm, chosen, given, {SEED: seed})

    def all(self, chosen: Mapping[str, Settings]) -> Iterator[Job]:
        """Every job that is known by now; some more than once."""
        for arm in self.tuned_arms():
            yield from self.trials(arm)
        for name in self.experiment.study:
            yield from (job for _, _, job in self.of_study(name, chosen))

    def tuned_as(self, arm: str) -> str:
        return self.experiment.arm[arm].tuned_as or arm

    def tuned_arms(self) -> list[str]:
        """Those that some study needs, in the order of the file."""
        used = {self.tuned_as(arm) for study in self.experiment.study.values() for arm in study.arms}
        return [arm for arm in self.experiment.arm if arm in used]

    def require_parity(self) -> dict[str, Axis]:
        """FLOPs of each arm beside those of the baseline. Raises CheckFailedError where one is not what it claims, and
        UsageError where a setting of any job is a mistake or its facts are not pinned as others are.
        """
        pinned = self.experiment.corpora
        for job in self.all({arm: self.experiment.arm[arm].trials()[0] for arm in self.tuned_arms()}):
            try:
                plan = job.plan()
            except SpecError as error:
                raise UsageError(f"{job.name}: {error}") from None
            if pinned and source_of(plan) not in pinned:
                raise UsageError(
                    f"{job.name}: its facts are of `{source_of(plan)}`, and corpora pins {', '.join(pinned)}"
                )
            require(claimed(plan))
        baseline = self._costs(self.experiment.baseline)
        found = {}
        for name, arm in self.experiment.arm.items():
            axis = Axis("flops", self._costs(name), baseline, None)
            if abs(axis.ratio / arm.times - 1) > self.experiment.tolerance:
                raise CheckFailedError(
                    f"arm.{name}: {axis.ratio:.4f} times the FLOPs of {self.experiment.baseline}, and times = "
                    f"{arm.times:g} +- {self.experiment.tolerance:.0%}"
                )
            found[name] = axis
        return found

    def flops_by_kind(self, arm: str) -> dict[str, float]:
        """FLOPs per token of an arm, forward and backward, by kind of block."""
        found: dict[str, float] = self._cost(arm).as_dict()["flops_per_token"]["by_kind"]
        return found

    def _costs(self, arm: str) -> Any:
        return self._cost(arm).exact_axes()["flops"]

    def _cost(self, arm: str) -> CostReport:
        plan = self._job(arm, arm).plan()
        return estimate(plan.model, seq_len=report_seq_len(plan), devices=())
