"""Learning rates over a run."""

import math

from memforge.plan import TrainPlan
from memforge.spec.schema import ScheduleName

GROUPS = ("dense", "values")
PEAK = dict.fromkeys(GROUPS, 1.0)


def rate_shares(step: int, train: TrainPlan) -> dict[str, float]:
    """The rates of step 0, 1, .. of dense parameters and of value pools, as shares of their peaks."""
    return {
        "dense": rate_share(step, train, train.schedule),
        "values": rate_share(step, train, train.value_schedule),
    }


def rate_share(step: int, train: TrainPlan, schedule: ScheduleName) -> float:
    """Linear warm-up, then the schedule down to `final_rate` at the last step.

    wsd stays at the peak until the last `decay_steps` (Hu et al. 2024, 2404.06395, section 4).
    """
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if schedule == "constant":
        return 1.0
    stable = train.steps - train.decay_steps if schedule == "wsd" else train.warmup_steps
    falling = max(stable, train.warmup_steps)
    # In wsd the first step of the decay is already lower than the peak.
    first = falling - 1 if schedule == "wsd" else falling
    progress = max(0, step - first) / max(1, train.steps - 1 - first)
    if schedule == "exponential":
        return train.final_rate**progress
    left = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return train.final_rate + (1 - train.final_rate) * left
