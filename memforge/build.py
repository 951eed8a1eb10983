"""From a plan to tensors."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from memforge.nn.decoder import Decoder
from memforge.nn.init import fill
from memforge.pieces import Piece
from memforge.plan import ModelPlan


def build_model(
    plan: ModelPlan,
    *,
    seed: int | None = 0,
    device: str | torch.device = "cpu",
    share_out: Callable[[Decoder, ModelPlan], Mapping[str, Piece]] | None = None,
    local: Callable[[Tensor], Tensor] = lambda parameter: parameter,
) -> Decoder:
    """The model of a plan, initialised from `seed`: equal plans and seeds give bit-equal weights.

    On device "meta" nothing is allocated and nothing initialised; with no seed it is left as it was allocated.
    `share_out` leaves the parameters of a model on meta only the parts that this process has, which it returns by path;
    `local` is that part of a parameter as a plain tensor. Parts are bit-equal to those of the whole.
    """
    with torch.device("meta"):
        model = Decoder(plan)
    pieces = {} if share_out is None else share_out(model, plan)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    for row in plan.params if seed is not None else ():
        part = local(model.get_parameter(row.path))
        fill(part, row.init, seed, row.path, shape=row.shape, piece=pieces.get(row.path))
    return model
