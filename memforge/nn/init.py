"""Initial values as a pure function of (seed, parameter name, element index).

Philox is counter-based: element i is the i-th draw of a stream keyed by seed and name, so any shard of a tensor can be
drawn alone, and no draw depends on the order in which parameters are made.
Ref: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memforge.blocks.base import Init, normal
from memforge.pieces import Piece, Runs

# Elements drawn at a time: 2**22 doubles are 32 MiB. A multiple of the 4 draws that one Philox counter gives.
CHUNK = 2**22


def draws(init: Init, seed: int, name: str, start: int, count: int, runs: Runs | None = None) -> Tensor:
    """Elements start..start+count of the flat parameter, or of `runs` of it: [count] in fp64 on the CPU.

    On a sphere, runs consist of whole rows.
    """
    if init.kind == "constant":
        return torch.full((count,), init.scale, dtype=torch.float64)
    if init.kind == "sphere":
        first, last = start // init.width, -(-(start + count) // init.width)
        rows = draws(normal(1.0), seed, name, first * init.width, (last - first) * init.width, runs)
        rows = rows.view(-1, init.width)
        rows *= init.scale / _root_mean_squares(rows)
        return rows.view(-1)[start - first * init.width :][:count]
    raw = _raw(seed, name, start, count, runs)
    # Midpoints of 2**53 equal cells of (0, 1): never 0 or 1, where the normal quantile is infinite. The last
    # midpoint is no double and would round to 1.
    unit = torch.from_numpy(((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53).clamp_(max=1 - 2.0**-53)
    if init.kind == "uniform":
        return (2 * unit - 1) * init.scale
    return torch.special.ndtri(unit) * init.scale


@torch.no_grad()
def fill(
    parameter: Tensor,
    init: Init,
    seed: int,
    name: str,
    *,
    shape: tuple[int, ...] | None = None,
    piece: Piece | None = None,
) -> None:
    """Write the initial value of a parameter, in its own dtype and on its own device.

    With a piece, `parameter` is only that piece of a tensor of this `shape`: it gets the values that the same elements
    of the whole have, and nothing of the size of the whole is made.
    """
    if piece is None:
        assert shape is None or parameter.shape == shape
        _fill(parameter, init, seed, name)
        return
    assert shape is not None
    assert parameter.shape == piece.shape(shape)
    assert init.kind != "sphere" or shape[-1] % init.width == 0
    if init.kind == "sphere" and piece.dim == len(shape) - 1:
        _fill_columns(parameter, init, seed, name, shape[-1], piece)
    else:
        _fill(parameter, init, seed, name, piece.runs(shape))


def _fill(parameter: Tensor, init: Init, seed: int, name: str, runs: Runs | None = None) -> None:
    flat = parameter.view(-1)
    for start, count in _chunks(flat.numel(), CHUNK):
        flat[start : start + count] = draws(init, seed, name, start, count, runs).to(flat.device, flat.dtype)


def _fill_columns(parameter: Tensor, init: Init, seed: int, name: str, row_length: int, piece: Piece) -> None:
    """Cut the columns out of whole rows: an element on a sphere depends on the others of its row."""
    if piece.length == 0:
        return
    columns = slice(piece.start, piece.indices.stop, piece.step)
    rows = parameter.view(-1, piece.length)
    for start, count in _chunks(len(rows), max(1, CHUNK // row_length)):
        whole = draws(init, seed, name, start * row_length, count * row_length).view(count, row_length)
        rows[start : start + count] = whole[:, columns].to(rows.device, rows.dtype)


def _raw(seed: int, name: str, start: int, count: int, runs: Runs | None) -> NDArray[np.uint64]:
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")
    if runs is not None:
        from memforge.nn.philox import raw_draws

        return raw_draws(key, runs, start, count)
    generator = np.random.Philox(key=key)
    generator.advance(start // 4)
    return generator.random_raw(start % 4 + count)[start % 4 :]


def _root_mean_squares(rows: Tensor) -> Tensor:
    """Of each row: [n, width] -> [n, 1], to the bit the same with and without the other rows."""
    # A sum to a single number is shared out among torch's threads, and then has another order.
    beside = rows if len(rows) > 1 else rows.repeat(2, 1)
    return beside.square().mean(dim=1, keepdim=True).sqrt()[: len(rows)]


def _chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(size, total - start)
