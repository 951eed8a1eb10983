"""What an update of touched rows alone means, and the coefficients of each row.

Dense AdamW moves every row in every step, since moments outlive the gradient. An update that visits only the rows that
a batch has read must say what becomes of the others:

    lazy           they rest: weights, moments and decay. Bias correction by the step of the optimizer.
    lazy_row_step  as lazy, but bias correction by the number of times that the row was updated.
    catch_up       they rest until they are read again; then all skipped steps are made up for, in closed form, before
                   the new gradient is used. Equal to dense AdamW at the moment of each update, up to eps; a row that is
                   read for the first time after a pause is read as it was.

All three equal dense AdamW where every row is touched in every step.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["lazy", "lazy_row_step", "catch_up"]
RULES: tuple[Rule, ...] = ("lazy", "lazy_row_step", "catch_up")


@dataclass
class Schedule:
    """The steps of one table so far: how many, and for catch_up what a row that rested since step i has missed.

    `missed[i]` and `shrunk[i]` are, after t steps, for a row last updated in step i (0: never):
        missed = sum over j of lr_j * sqrt(1 - beta2^j) / (1 - beta1^j) * (beta1 / sqrt(beta2))^(j - i) * decay after j
        shrunk = product over j of (1 - lr_j * weight_decay)                                      j = i + 1 .. t
    so that dense AdamW, with eps = 0, would have moved the row to shrunk * w - missed * exp_avg / sqrt(exp_avg_sq).
    """

    betas: tuple[float, float]
    step: int
    missed: Tensor
    shrunk: Tensor

    def coefficients(self, rule: Rule, last: Tensor | None, lr: float, weight_decay: float) -> Tensor:
        """Of the step that follows for rows whose counter in `last` [u] says when, or how often, they were updated.

        Shape: [u, 6] in fp64, or [1, 6] where all rows share them: step_size, inv_sqrt_bias2, decay1, decay2, shrink,
        drift. With g the gradient, m and s the moments, w the row:
            w = shrink*w - drift * m / (sqrt(s) + eps);  m = beta1*decay1*m + (1-beta1)*g;
            s = beta2*decay2*s + (1-beta2)*g*g;  w -= step_size * m / (sqrt(s)*inv_sqrt_bias2 + eps)
        """
        beta1, beta2 = self.betas
        shrink, step = 1 - lr * weight_decay, self.step + 1
        if rule == "lazy_row_step":
            assert last is not None
            count = last.double() + 1
            first, second = 1 - beta1**count, 1 - beta2**count
            rest = torch.tensor([1.0, 1.0, shrink, 0.0], dtype=torch.float64, device=last.device)
            return torch.cat((torch.stack((lr / first, second.rsqrt()), dim=1), rest.expand(len(last), 4)), dim=1)
        step_size, inv_sqrt_bias2 = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
        if rule == "lazy":
            return torch.tensor([[step_size, inv_sqrt_bias2, 1.0, 1.0, shrink, 0.0]], dtype=torch.float64)
        assert last is not None
        skipped = (step - 1 - last).double()
        since = last.long().to(self.missed.device)
        columns = (
            torch.full_like(skipped, step_size),
            torch.full_like(skipped, inv_sqrt_bias2),
            beta1**skipped,
            beta2**skipped,
            shrink * self.shrunk[since].to(last.device),
            shrink * self.missed[since].to(last.device),
        )
        return torch.stack(columns, dim=1)

    def advance(self, rule: Rule, lr: float, weight_decay: float) -> None:
        """One step more. catch_up costs 16 bytes for each step that was made."""
        self.step += 1
        if rule != "catch_up":
            return
        beta1, beta2 = self.betas
        t, shrink = self.step, 1 - lr * weight_decay
        size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        ago = torch.arange(t, 0, -1, dtype=torch.float64)  # steps since 0, 1, .., t - 1
        self.missed = torch.cat((self.missed * shrink + size * (beta1 / math.sqrt(beta2)) ** ago, torch.zeros(1)))
        self.shrunk = torch.cat((self.shrunk * shrink, torch.ones(1)))
