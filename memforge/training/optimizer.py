"""One training step: gradients, their norm, the update; dense parameters by AdamW, value tables by their rows."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memforge.nn.decoder import Decoder, next_token_loss
from memforge.plan import ModelPlan, ParamRow, TrainPlan
from memforge.training.tables import RowTables, read_sites
from memforge_kernels import RowAdamW, RowOptimizer, RowSGD


class Stepper:
    """Makes the steps of a training run on one model.

    `forward` is the model's forward_taped; it may be replaced by a compiled one.
    """

    def __init__(self, model: Decoder, plan: ModelPlan, train: TrainPlan) -> None:
        self.model, self.train = model, train
        self.forward: Callable[..., Any] = model.forward_taped
        self.tables = _row_tables(model, plan, train)
        by_rows = self.tables.tables.keys() if self.tables else ()
        rows = [row for row in plan.params if row.path not in by_rows]
        first, second = train.betas
        self.dense = torch.optim.AdamW(
            _groups(model, rows, train), lr=train.learning_rate, betas=(first, second), eps=train.eps, fused=True
        )

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.dense] if self.tables is None else [self.dense, self.tables.optimizer]

    @property
    def learning_rate(self) -> float:
        """The rate of the dense parameters in the last update."""
        return float(self.dense.param_groups[0]["lr"])

    def backward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of a window [b, t + 1]: the cross-entropy, and the norm of all gradients before clipping."""
        taps = self.tables.new_taps() if self.tables else None
        loss, extra, records = next_token_loss(self.forward, window, taps)
        (loss + sum(extra.values())).backward()
        dense = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(dense)
        if self.tables is not None:
            self.tables.add(taps, records)
            norm = (norm.double().square() + self.tables.optimizer.squared_norm()).sqrt().to(norm.dtype)
        return loss.detach(), norm

    def update(self, norm: Tensor, share: float) -> None:
        """The update, at this share of the peak rates, with gradients of this norm clipped."""
        limit = self.train.clip_norm
        scale = 1.0 if limit == "none" else min(1.0, limit / (float(norm) + 1e-6))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        if scale < 1:
            torch._foreach_mul_([p.grad for p in self.model.parameters() if p.grad is not None], scale)
        self.dense.step()
        # Now, not before the next backward pass: gradients need not live beside the activations of a forward pass.
        self.dense.zero_grad(set_to_none=True)
        if self.tables is not None:
            self.tables.optimizer.step(scale=scale)


def _row_tables(model: Decoder, plan: ModelPlan, train: TrainPlan) -> RowTables | None:
    """None where no value table is updated by rows."""
    if train.value_update == "dense":
        return None
    values = {row.path: row for row in plan.params if row.group == "values"}
    sites = read_sites(plan, train.batch_size, train.seq_len)
    read = dict.fromkeys(site.table for layer in sites for site in layer)
    if not read:
        return None
    optimizer = _row_optimizer(_groups(model, [values[path] for path in read], train), train)
    return RowTables(model, sites, optimizer)


def _row_optimizer(groups: list[dict[str, Any]], train: TrainPlan) -> RowOptimizer:
    lr, rounding, seed = train.value_learning_rate, train.value_rounding, train.seed
    if train.value_optimizer == "sgd":
        return RowSGD(groups, lr=lr, rounding=rounding, seed=seed)
    assert train.value_update != "dense"
    first, second = train.betas
    rule = train.value_update
    return RowAdamW(groups, lr=lr, betas=(first, second), eps=train.eps, rule=rule, rounding=rounding, seed=seed)


def _groups(model: nn.Module, rows: list[ParamRow], train: TrainPlan) -> list[dict[str, Any]]:
    """One group for each (group, decay) of the rows; `peak` is the rate that the schedule scales."""
    peaks = {"dense": train.learning_rate, "values": train.value_learning_rate}
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for row in rows:
        members.setdefault((row.group, row.decay), []).append(model.get_parameter(row.path))
    return [
        {"params": params, "peak": peaks[group], "weight_decay": train.weight_decay if decay else 0.0}
        for (group, decay), params in members.items()
    ]


def rate_share(step: int, train: TrainPlan) -> float:
    """The rate of step 0, 1, .. as a share of the peak: linear warm-up, then the schedule down to `final_rate`."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = (step - train.warmup_steps) / max(1, train.steps - 1 - train.warmup_steps)
    left = 1 - progress if train.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return train.final_rate + (1 - train.final_rate) * left
