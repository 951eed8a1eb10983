"""Whether two models are matched, axis by axis."""

from dataclasses import dataclass
from typing import Any

from memforge.cost import AXES, estimate
from memforge.errors import CheckFailedError, UsageError
from memforge.plan import ModelPlan, Plan
from memforge.spec.schema import ToleranceSpec


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
    seq_len: int
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
            "seq_len": self.seq_len,
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


def compare(
    name: str,
    model: ModelPlan,
    baseline_name: str,
    baseline: ModelPlan,
    tolerance: ToleranceSpec,
    seq_len: int | None = None,
) -> Parity:
    """Every axis of `model` over that of `baseline`, both at `seq_len` tokens (by default the longest both can take).

    Raises UsageError when one of them is shorter than `seq_len`.
    """
    t = seq_len or min(model.max_seq_len, baseline.max_seq_len)
    for who, plan in ((name, model), (baseline_name, baseline)):
        if t > plan.max_seq_len:
            raise UsageError(f"{who} takes at most {plan.max_seq_len} tokens (model.max_seq_len), not {t}")
    ours, theirs = estimate(model, seq_len=t).axes(), estimate(baseline, seq_len=t).axes()
    axes = tuple(Axis(axis, ours[axis], theirs[axis], getattr(tolerance, axis)) for axis in AXES)
    return Parity(name, baseline_name, t, axes)


def claimed(plan: Plan, seq_len: int | None = None) -> Parity | None:
    """The verdict on the plan's own [parity] claim."""
    claim = plan.parity
    if claim is None:
        return None
    return compare(plan.name, plan.model, claim.name, claim.baseline, claim.tolerance, seq_len)


def require(parity: Parity | None) -> None:
    """Raises CheckFailedError naming each failed axis, both numbers, the ratio and the tolerance."""
    if parity is not None and not parity.ok:
        raise CheckFailedError("parity fails: " + "; ".join(parity.failures()))
