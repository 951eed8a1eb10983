"""expert_lookup: single-neuron experts, chosen per token; the read of a PEER layer."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from memforge_kernels.tape import Reader

Activation = Literal["gelu", "relu", "silu"]
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def expert_lookup(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    slots: Tensor,
    weights: Tensor,
    activation: Activation = "gelu",
    *,
    reader: Reader = Reader(),  # noqa: B008  it has no state
) -> Tensor:
    """Sum over j of weights[i, j] * activation(<x_i, down[slot]>) * up[slot].

    Shape: x [n, d], down and up [m, d], slots [n, k] int64, weights [n, k] -> [n, d].
    Cost: 4*n*k*d FLOPs, 2*n*k rows read; the backward costs twice that. Nothing of size [n, k, d] is made in either
    direction: both products are ops that read rows in place, and so are their gradients; rows stored in another dtype
    are converted a chunk at a time.
    Raises: ValueError for shapes, dtypes or an activation that do not fit.
    Ref: He 2024, "Mixture of a Million Experts" (2407.04153), equation 2.
    """
    if weights.shape != slots.shape or up.shape != down.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (down, up, slots, weights))
        raise ValueError(f"expert_lookup needs down and up [m, d], slots and weights [n, k]; got {shapes}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"expert_lookup knows the activations {', '.join(ACTIVATIONS)}, not {activation}")
    hidden = ACTIVATIONS[activation](reader.gather_dot(x, down, slots))
    return reader.weighted_gather(up, slots, hidden * weights.to(hidden.dtype))
