"""From a plan to tensors: the module, and the graph that `memforge build` writes."""

from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from memforge.nn.decoder import Decoder
from memforge.nn.init import fill
from memforge.plan import ModelPlan


def build_model(plan: ModelPlan, *, seed: int = 0, device: str | torch.device = "cpu") -> nn.Module:
    """The model of a plan, initialised from `seed`: equal plans and seeds give bit-equal weights.

    On device "meta" nothing is allocated and nothing initialised.
    """
    with torch.device("meta"):
        model = Decoder(plan)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    for row in plan.params:
        fill(model.get_parameter(row.path), row.init, seed, row.path)
    return model


def export_graph(plan: ModelPlan) -> ExportedProgram:
    """The model in eval mode, exported on meta with dynamic batch and sequence length; memforge ops stay visible."""
    model = build_model(plan, device="meta").eval()
    tokens = torch.zeros(2, min(2, plan.max_seq_len), dtype=torch.int64, device="meta")
    shapes: dict[int, Any] = {0: Dim("batch")}
    if plan.max_seq_len > 2:
        shapes[1] = Dim("seq_len", max=plan.max_seq_len)
    return torch.export.export(model, (tokens,), dynamic_shapes=(shapes,))
