"""Whether two models are matched, axis by axis."""

from dataclasses import dataclass
from typing import Any

from memforge.cost import AXES, CostReport, estimate
from memforge.errors import CheckFailedError
from memforge.plan import ParityPlan, Plan
from memforge.spec.schema import ToleranceSpec

DEFAULT_TOLERANCE = ToleranceSpec(flops=0.05)


@dataclass(frozen=True)
class Axis:
    """One figure of a model beside the baseline's. Without a tolerance it is shown, not judged."""

    name: str
    value: int | float
    baseline: int | float
    tolerance: float | None

    @property
    def ratio(self) -> float:
        return self.value / self.baseline

    @property
    def ok(self) -> bool | None:
        return None if self.tolerance is None else abs(self.ratio - 1) <= self.tolerance


@dataclass(frozen=True)
class Parity:
    """The verdict of one comparison: every axis with a tolerance lies within it."""

    name: str
    baseline: str
    axes: tuple[Axis, ...]

    @property
    def ok(self) -> bool:
        return all(axis.ok is not False for axis in self.axes)

    def failures(self) -> list[str]:
        return [
            f"{self.name} against {self.baseline}: {a.name} {a.value:,} is {a.ratio:.4f} times {a.baseline:,}, "
            f"outside 1 +- {a.tolerance:g}"
            for a in self.axes
            if a.ok is False
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "against": self.baseline,
            "ok": self.ok,
            "axes": {
                a.name: {
                    "value": a.value,
                    "baseline": a.baseline,
                    "ratio": a.ratio,
                    "tolerance": a.tolerance,
                    "ok": a.ok,
                }
                for a in self.axes
            },
        }


def compare(name: str, cost: CostReport, baseline_name: str, baseline: CostReport, tolerance: ToleranceSpec) -> Parity:
    """Every axis of `cost` over that of `baseline`."""
    ours, theirs = cost.axes(), baseline.axes()
    axes = tuple(Axis(axis, ours[axis], theirs[axis], getattr(tolerance, axis)) for axis in AXES)
    return Parity(name, baseline_name, axes)


def claimed(plan: Plan, *, seq_len: int | None = None) -> Parity | None:
    """The verdict on the plan's own [parity] claim, at one sequence length for both models."""
    claim: ParityPlan | None = plan.parity
    if claim is None:
        return None
    t = seq_len or min(plan.model.max_seq_len, claim.baseline.max_seq_len)
    ours, theirs = estimate(plan.model, seq_len=t), estimate(claim.baseline, seq_len=t)
    return compare(plan.name, ours, claim.name, theirs, claim.tolerance)


def require(parity: Parity | None) -> None:
    """Raises CheckFailedError naming each failed axis, both numbers, the ratio and the tolerance."""
    if parity is not None and not parity.ok:
        raise CheckFailedError("parity fails: " + "; ".join(parity.failures()))
