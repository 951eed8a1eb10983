"""From a plan to tensors."""

import torch

from memforge.nn.decoder import Decoder
from memforge.nn.init import fill
from memforge.plan import ModelPlan


def build_model(plan: ModelPlan, *, seed: int = 0, device: str | torch.device = "cpu") -> Decoder:
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
