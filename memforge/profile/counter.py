"""The ledger against the built model: parameters, executed FLOPs, and no op that nobody counts."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from memforge.build import build_model
from memforge.cost import estimate
from memforge.errors import CheckFailedError
from memforge.plan import ModelPlan
from memforge.profile.coverage import CoverageGate
from memforge_kernels import FLOP_FORMULAS

COUNTED_BATCH, COUNTED_SEQ_LEN = 2, 32


def count_flops(plan: ModelPlan, batch: int, seq_len: int) -> tuple[int, int]:
    """Forward and backward FLOPs as torch's FlopCounterMode sees them on the meta model in training mode.

    Raises CheckFailedError for an op that is neither counted nor declared free.
    """
    return _counted(build_model(plan, device="meta"), plan, batch, seq_len)


def _counted(model: nn.Module, plan: ModelPlan, batch: int, seq_len: int) -> tuple[int, int]:
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter, CoverageGate() as gate:
        logits, losses = model.train()(tokens)
        forward = counter.get_total_flops()
        (logits.sum() + sum(losses.values(), torch.zeros((), device="meta"))).backward()
    backward = counter.get_total_flops() - forward
    with torch.no_grad(), gate:  # what is exported and evaluated may take another way
        model.eval()(tokens)
    if gate.unknown:
        listed = ", ".join(f"{op} (first in {where or 'the model'})" for op, where in sorted(gate.unknown.items()))
        raise CheckFailedError(f"ops that are neither counted nor declared free: {listed}")
    return forward, backward


def require_exact(plan: ModelPlan) -> dict[str, Any]:
    """The ledger beside the built model: same parameters, same executed FLOPs. Raises CheckFailedError otherwise."""
    batch, seq_len = COUNTED_BATCH, min(COUNTED_SEQ_LEN, plan.max_seq_len)
    ledger = estimate(plan, batch=batch, seq_len=seq_len).flops(executed=True)
    model = build_model(plan, device="meta")
    built = {(name, tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in model.named_parameters()}
    planned = {(row.path, row.shape, row.dtype) for row in plan.params}
    if buffers := [name for name, _ in model.named_buffers()]:
        raise CheckFailedError(f"buffers have no row in the plan and would start undefined: {', '.join(buffers)}")
    if built != planned:
        differing = ", ".join(sorted(str(row) for row in built ^ planned)[:6])
        raise CheckFailedError(f"the model does not have the parameters of its plan: {differing}")
    counter = _counted(model, plan, batch, seq_len)
    if ledger != counter:
        raise CheckFailedError(
            f"the ledger's executed FLOPs {ledger} (forward, backward) differ from the counter's {counter}"
        )
    return {"batch": batch, "seq_len": seq_len, "forward": counter[0], "backward": counter[1]}
