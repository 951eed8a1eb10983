"""Initial values as a pure function of (seed, parameter name, element index).

Philox is counter-based: element i is the i-th draw of a stream keyed by seed and name, so any shard of a tensor can be
drawn alone, and no draw depends on the order in which parameters are made.
Ref: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from memforge.blocks.base import Init, normal

# Elements drawn at a time: 2**22 doubles are 32 MiB. A multiple of the 4 draws that one Philox counter gives.
CHUNK = 2**22


def draws(init: Init, seed: int, name: str, start: int, count: int) -> Tensor:
    """Elements start..start+count of the flat parameter, [count] in fp64 on the CPU."""
    if init.kind == "constant":
        return torch.full((count,), init.scale, dtype=torch.float64)
    if init.kind == "sphere":
        first, last = start // init.width, -(-(start + count) // init.width)
        rows = draws(normal(1.0), seed, name, first * init.width, (last - first) * init.width).view(-1, init.width)
        rows *= init.scale / rows.square().mean(dim=1, keepdim=True).sqrt()
        return rows.view(-1)[start - first * init.width :][:count]
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    generator = np.random.Philox(key=key)
    generator.advance(start // 4)
    raw = generator.random_raw(start % 4 + count)[start % 4 :]
    # Midpoints of 2**53 equal cells of (0, 1): never 0 or 1, where the normal quantile is infinite.
    unit = torch.from_numpy(((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)
    if init.kind == "uniform":
        return (2 * unit - 1) * init.scale
    return torch.special.ndtri(unit) * init.scale


@torch.no_grad()
def fill(parameter: Tensor, init: Init, seed: int, name: str) -> None:
    """Write the initial value of a whole parameter, in its own dtype and on its own device."""
    flat = parameter.view(-1)
    for start, count in _chunks(flat.numel()):
        flat[start : start + count] = draws(init, seed, name, start, count).to(flat.device, flat.dtype)


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, CHUNK):
        yield start, min(CHUNK, total - start)
