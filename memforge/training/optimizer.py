"""AdamW with the parameter groups of the plan, and the learning-rate schedule."""

import math

import torch
from torch import nn

from memforge.plan import ModelPlan, TrainPlan


def make_optimizer(model: nn.Module, plan: ModelPlan, train: TrainPlan) -> torch.optim.AdamW:
    """One group for each (group, decay) of the parameter rows; `peak` is the rate that the schedule scales."""
    peaks = {"dense": train.learning_rate, "values": train.value_learning_rate}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for row in plan.params:
        members.setdefault((row.group, row.decay), []).append(model.get_parameter(row.path))
    groups = [
        {"params": params, "peak": peaks[group], "weight_decay": train.weight_decay if decay else 0.0}
        for (group, decay), params in members.items()
    ]
    first, second = train.betas
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=(first, second), eps=train.eps, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def rate_share(step: int, train: TrainPlan) -> float:
    """The rate of step 0, 1, .. as a share of the peak: linear warm-up, then the schedule down to `final_rate`."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps) / max(1, train.steps - 1 - train.warmup_steps)
    left = 1 - progress if train.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return train.final_rate + (1 - train.final_rate) * left
