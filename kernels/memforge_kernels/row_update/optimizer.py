"""Optimizers of tables of which each batch reads a few rows: what a step costs follows the reads, not the table."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from memforge_kernels.row_update.gradient import Read, RowGradient, sorted_gradient
from memforge_kernels.row_update.op import adamw_, segment_sum, sgd_, squared_norm
from memforge_kernels.row_update.rules import RULES, Rule, Schedule

Rounding = Literal["master", "stochastic"]


class RowOptimizer(torch.optim.Optimizer):
    """What both optimizers share: they are given reads, not `.grad`, and all reads of a table make one update.

    Tables are parameters [m, v] that are read outside of autograd. Readers and micro-batches alike call `add`; a step
    uses up what was added. Tables that were not read are left alone; a read of no rows is a step of its table all the
    same: where rows are shared out among ranks, others have read some.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if defaults["rounding"] not in ("master", "stochastic"):
            raise ValueError(f"rounding must be master or stochastic, not {defaults['rounding']}")
        super().__init__(params, defaults)
        self._reads: dict[Tensor, list[Read]] = {}
        self._gradients: dict[Tensor, RowGradient] = {}

    def add(self, table: Tensor, read: Read) -> None:
        """Add a read to the gradient of a table. Raises ValueError for shapes that do not fit."""
        n, k = read.slots.shape
        if read.weights.shape != (n, k) or read.rows.shape != (n, table.shape[1]):
            shapes = f"{list(read.slots.shape)}, {list(read.weights.shape)} and {list(read.rows.shape)}"
            raise ValueError(f"slots, weights and rows {shapes} do not fit a table {list(table.shape)}")
        reads = self._reads.setdefault(table, [])
        if n * k == 0:
            return
        reads.append(read)
        self._gradients.pop(table, None)
        if len(reads) > 1 and sum(r.bytes for r in reads) > self._summed_bytes(table, reads):
            self._reads[table] = [self._folded(table)]

    @staticmethod
    def _summed_bytes(table: Tensor, reads: list[Read]) -> int:
        """At most what the gradient takes as summed rows, with a slot and a weight each."""
        num_rows = min(table.shape[0], sum(r.slots.numel() for r in reads))
        return num_rows * (4 * table.shape[1] + 8 + 4)

    def _folded(self, table: Tensor) -> Read:
        """All that was added so far as one read that names every touched row once."""
        grad = self._gradient(table)
        self._gradients.clear()
        rows = segment_sum(grad)
        return Read(grad.touched[:, None], rows.new_ones(len(rows), 1), rows)

    def _gradient(self, table: Tensor) -> RowGradient:
        if table not in self._gradients:
            self._gradients[table] = sorted_gradient(self._reads[table])
        return self._gradients[table]

    def touched(self, table: Tensor) -> Tensor:
        """The rows [u] of a table that were read since the last step, ascending."""
        if not self._reads.get(table):
            return torch.empty(0, dtype=torch.int64, device=table.device)
        return self._gradient(table).touched

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """The square of the norm of all gradients, rows summed over their reads, a scalar in fp64."""
        norms = [squared_norm(self._gradient(table)) for table, reads in self._reads.items() if reads]
        return torch.stack(norms).sum() if norms else torch.zeros((), dtype=torch.float64)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._reads, self._gradients = {}, {}

    @torch.no_grad()
    def step(self, closure: None = None, *, scale: float = 1.0) -> None:  # type: ignore[override]
        """One update of every table that was read, its gradient times `scale`."""
        assert closure is None, "reads are added before the step"
        for group in self.param_groups:
            for table in group["params"]:
                if table in self._reads:
                    self._update(table, group, self._gradient(table) if self._reads[table] else None, scale)
        self.zero_grad()

    def _update(self, table: Tensor, group: dict[str, Any], grad: RowGradient | None, scale: float) -> None:
        raise NotImplementedError

    def _state(self, table: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a table, made in its first step."""
        state = self.state[table]
        if not state:
            state["step"] = 0
            if table.dtype not in (torch.float32, torch.float64) and group["rounding"] == "master":
                state["master"] = table.detach().float()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but tensors keep the type they were saved in: moments of 16-bit tables are fp32."""
        super().load_state_dict(state_dict)
        tables = [table for group in self.param_groups for table in group["params"]]
        for idx, saved in state_dict["state"].items():
            kept = {name: value.to(tables[idx].device) for name, value in saved.items() if isinstance(value, Tensor)}
            self.state[tables[idx]].update({name: value.clone() for name, value in kept.items()})


class RowAdamW(RowOptimizer):
    """AdamW over the rows that were read; `rule` says what becomes of the others (see rules).

    Moments are fp32 (fp64 for fp64 tables), 8 bytes for each element of a table, and 4 bytes more for each slot unless
    the rule is lazy. bf16 and fp16 tables are rounded from an fp32 master, or bf16 stochastically.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rule: Rule = "lazy",
        rounding: Rounding = "master",
        seed: int = 0,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, not {rule}")
        if rule == "catch_up" and betas[0] >= betas[1] ** 0.5:
            raise ValueError(f"catch_up needs beta1 < sqrt(beta2), got betas = {betas}")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "rule": rule, "rounding": rounding, "seed": seed})

    def _update(self, table: Tensor, group: dict[str, Any], grad: RowGradient | None, scale: float) -> None:
        state, rule = self._state(table, group), group["rule"]
        schedule = Schedule(group["betas"], state["step"], state["missed"], state["shrunk"])
        if grad is not None:
            self._move(table, group, grad, schedule, scale)
        schedule.advance(rule, group["lr"], group["weight_decay"])
        state["step"], state["missed"], state["shrunk"] = schedule.step, schedule.missed, schedule.shrunk

    def _move(self, table: Tensor, group: dict[str, Any], grad: RowGradient, schedule: Schedule, scale: float) -> None:
        """Make the step that follows on the schedule."""
        state, rule = self.state[table], group["rule"]
        last = state["last"][grad.touched] if "last" in state else None
        adamw_(
            table,
            state["exp_avg"],
            state["exp_avg_sq"],
            grad,
            schedule.coefficients(rule, last, group["lr"], group["weight_decay"]),
            betas=group["betas"],
            eps=group["eps"],
            scale=scale,
            master=state.get("master"),
            seed=group["seed"] + state["step"],
        )
        if last is not None:
            state["last"][grad.touched] = schedule.step + 1 if rule == "catch_up" else last + 1

    def _state(self, table: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = super()._state(table, group)
        if "exp_avg" not in state:
            dtype = torch.promote_types(table.dtype, torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(table, dtype=dtype) for _ in range(2))
            state["missed"], state["shrunk"] = (torch.full((1,), x, dtype=torch.float64) for x in (0.0, 1.0))
            if group["rule"] != "lazy":
                state["last"] = torch.zeros(table.shape[0], dtype=torch.int32, device=table.device)
        return state


class RowSGD(RowOptimizer):
    """Gradient descent over the rows that were read; decay too touches only those."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        rounding: Rounding = "master",
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "rounding": rounding, "seed": seed})

    def _update(self, table: Tensor, group: dict[str, Any], grad: RowGradient | None, scale: float) -> None:
        state = self._state(table, group)
        if grad is not None:
            rates = {"lr": group["lr"], "weight_decay": group["weight_decay"], "scale": scale}
            sgd_(table, grad, **rates, master=state.get("master"), seed=group["seed"] + state["step"])
        state["step"] += 1
