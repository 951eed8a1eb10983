"""Whether two models are matched, axis by axis."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from memforge.cost import AXES, CostReport, as_number, estimate
from memforge.errors import CheckFailedError, UsageError
from memforge.plan import ModelPlan, Plan
from memforge.spec.schema import ToleranceSpec


@dataclass(frozen=True)
class Axis:
    """One figure of a model beside the baseline's. Without a tolerance it is shown, not judged."""

    name: str
    value: Fraction | int
    baseline: Fraction | int
    tolerance: float | None

    @property
    def ratio(self) -> float:
        return float(self.value / self.baseline)

    @property
    def ok(self) -> bool | None:
        if self.tolerance is None:
            return None
        # As it is written: the float nearest to 0.05 is not a twentieth, and large counts are not floats.
        return abs(Fraction(self.value) - self.baseline) <= Fraction(str(self.tolerance)) * self.baseline

    def __str__(self) -> str:
        """How far it is off."""
        return (
            f"{self.name} {as_number(self.value):,} is {self.ratio:.5f} times {as_number(self.baseline):,}, outside "
            f"1 +- {self.tolerance:g}"
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "value": as_number(self.value),
            "baseline": as_number(self.baseline),
            "ratio": self.ratio,
            "tolerance": self.tolerance,
            "ok": self.ok,
        }


@dataclass(frozen=True)
class Swap:
    """Layers whose blocks after the mixer differ: their kinds, and their FLOPs per token, ours and the baseline's."""

    layers: tuple[int, ...]
    kinds: tuple[str, str]
    forward: tuple[Fraction, Fraction]
    backward: tuple[Fraction, Fraction]

    def as_dict(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "kinds": list(self.kinds),
            "forward": [as_number(value) for value in self.forward],
            "backward": [as_number(value) for value in self.backward],
        }


@dataclass(frozen=True)
class Parity:
    """The verdict of one comparison: every axis with a tolerance lies within it.

    `caveats` are those of the baseline; every report repeats them beside the model's own. `fix` is the command that
    finds sizes at which the two match. `swaps` are the blocks that stand where a baseline of as many layers has others.
    """

    name: str
    baseline: str
    seq_len: int
    axes: tuple[Axis, ...]
    caveats: tuple[str, ...] = ()
    fix: str | None = None
    swaps: tuple[Swap, ...] = ()

    @property
    def ok(self) -> bool:
        return all(axis.ok is not False for axis in self.axes)

    def failures(self) -> list[str]:
        return [f"{self.name} against {self.baseline}: {axis}" for axis in self.axes if axis.ok is False]

    def as_dict(self) -> dict[str, Any]:
        return {
            "against": self.baseline,
            "seq_len": self.seq_len,
            "ok": self.ok,
            "axes": {axis.name: axis.as_dict() for axis in self.axes},
            "caveats": list(self.caveats),
            "fix": self.fix,
            "swaps": [swap.as_dict() for swap in self.swaps],
        }


def report_seq_len(plan: Plan, seq_len: int | None = None, baseline: ModelPlan | None = None) -> int:
    """Tokens in a sequence at which a plan is reported and compared, so that one report has one length.

    `seq_len` where it is given, that of [train], or the longest that the model and the baseline, by default that of its
    claim, can take.
    """
    if seq_len is not None:
        return seq_len
    if plan.run.train is not None:
        return plan.run.train.seq_len
    if baseline is None and plan.parity is not None:
        baseline = plan.parity.baseline
    return plan.model.max_seq_len if baseline is None else min(plan.model.max_seq_len, baseline.max_seq_len)


def compare(
    name: str,
    model: ModelPlan,
    baseline_name: str,
    baseline: ModelPlan,
    tolerance: ToleranceSpec,
    seq_len: int,
) -> Parity:
    """Every axis of `model` over that of `baseline`, both at `seq_len` tokens.

    Raises UsageError when one of them is shorter than `seq_len`.
    """
    for who, plan in ((name, model), (baseline_name, baseline)):
        if seq_len > plan.max_seq_len:
            raise UsageError(f"{who} takes at most {plan.max_seq_len} tokens (model.max_seq_len), not {seq_len}")
    reports = [estimate(plan, seq_len=seq_len, devices=()) for plan in (model, baseline)]
    ours, theirs = (report.exact_axes() for report in reports)
    axes = tuple(Axis(axis, ours[axis], theirs[axis], getattr(tolerance, axis)) for axis in AXES)
    caveats = tuple(f"{baseline_name}: {caveat}" for caveat in baseline.caveats())
    swaps = tuple(_swaps((model, baseline), reports))
    return Parity(name, baseline_name, seq_len, axes, caveats, swaps=swaps)


def _swaps(models: tuple[ModelPlan, ModelPlan], reports: list[CostReport]) -> Iterator[Swap]:
    if models[0].num_layers != models[1].num_layers:
        return
    spent: list[dict[str, tuple[int, int]]] = []
    for report in reports:
        by_path: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        for row in report.rows:
            forward, backward = by_path[row.path]
            by_path[row.path] = forward + row.cost.counted[0], backward + row.cost.counted[1]
        spent.append(by_path)
    groups: dict[Any, list[int]] = defaultdict(list)
    for idx, layers in enumerate(zip(models[0].layers, models[1].layers, strict=True)):
        kinds = tuple(" + ".join(block.kind for block in layer.blocks) or "nothing" for layer in layers)
        costs = [[by_path[block.path] for block in layer.blocks] for by_path, layer in zip(spent, layers, strict=True)]
        totals = [[Fraction(sum(cost[i] for cost in side), reports[0].tokens) for side in costs] for i in (0, 1)]
        if kinds[0] != kinds[1]:
            groups[kinds, tuple(totals[0]), tuple(totals[1])].append(idx)
    for (kinds, forward, backward), indices in groups.items():
        yield Swap(tuple(indices), kinds, forward, backward)


def claimed(plan: Plan, seq_len: int | None = None) -> Parity | None:
    """The verdict on the plan's own [parity] claim, at the length of its reports."""
    claim = plan.parity
    if claim is None:
        return None
    length = report_seq_len(plan, seq_len)
    return compare(plan.name, plan.model, claim.name, claim.baseline, claim.tolerance, length)


def require(*verdicts: Parity | None) -> None:
    """Raises CheckFailedError naming each failed axis, both numbers, the ratio, the tolerance and what would help."""
    failed = [parity for parity in verdicts if parity is not None and not parity.ok]
    whys = (
        "; ".join(parity.failures()) + (f"; to match them: {parity.fix}" if parity.fix else "") for parity in failed
    )
    if failed:
        raise CheckFailedError(f"parity fails: {'; '.join(whys)}")
