"""The raw draws of numpy's Philox for any elements of a tensor, so that a rank draws only those it holds.

Draw i of the stream is word i % 4 of the block with counter i // 4 + 1: numpy counts up before it makes a block.
Ref: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", Philox4x64-10; numpy/random/src/philox/philox.h.
"""

from dataclasses import astuple
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray

from memforge.pieces import Runs
from memforge_kernels.threads import compiled, inline, over_rows

ROUNDS = 10
# All typed: numba makes a float of an unsigned and a plain integer.
MULTIPLIER_0, MULTIPLIER_1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
WEYL_0, WEYL_1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
ZERO = np.uint64(0)


def raw_draws(key: int, runs: Runs, start: int, count: int) -> NDArray[np.uint64]:
    """Elements start..start+count of `runs`, [count]: the draws of `np.random.Philox(key=key)`, bit for bit."""
    out = np.empty(count, dtype=np.uint64)
    words = np.uint64(key % 2**64), np.uint64(key >> 64)
    over_rows(_raw_draws, count, words, astuple(runs), start, out)
    return out


@compiled
def _raw_draws(start, stop, key, runs, offset, out):
    first, stride, num_runs, run_length, group_stride = runs
    # Several short runs may lie in one block, which is then made once.
    held, block = -1, np.empty(4, np.uint64)
    while start < stop:
        run, skipped = divmod(offset + start, run_length)
        group, place = divmod(run, num_runs)
        element = first + group * group_stride + place * stride + skipped
        end = min(stop, start + run_length - skipped)
        while start < end:
            idx, word = element // 4, element % 4
            if word == 0 and end - start >= 4:
                out[start], out[start + 1], out[start + 2], out[start + 3] = _block(idx, key)
                taken = 4
            else:
                if idx != held:
                    block[0], block[1], block[2], block[3] = _block(idx, key)
                    held = idx
                taken = min(4 - word, end - start)
                for i in range(taken):
                    out[start + i] = block[word + i]
            start += taken
            element += taken


@inline
def _block(idx, key):
    """The four draws 4 * idx .. 4 * idx + 3."""
    a, b, c, d = np.uint64(idx + 1), ZERO, ZERO, ZERO
    key_0, key_1 = key
    for _ in range(ROUNDS):
        (high_a, low_a), (high_c, low_c) = _product(a, MULTIPLIER_0), _product(c, MULTIPLIER_1)
        a, b, c, d = high_c ^ b ^ key_0, low_c, high_a ^ d ^ key_1, low_a
        key_0, key_1 = key_0 + WEYL_0, key_1 + WEYL_1
    return a, b, c, d


@intrinsic
def _product(typing_context: Any, x: Any, y: Any) -> Any:
    """High and low word of the product of two words: one instruction; products of halves take 3.5 times as long."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        word, wide = ir.IntType(64), ir.IntType(128)
        product = builder.mul(*(builder.zext(arg, wide) for arg in args))
        high = builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), word)
        return context.make_tuple(builder, signature.return_type, (high, builder.trunc(product, word)))

    return numba.types.UniTuple(numba.types.uint64, 2)(numba.types.uint64, numba.types.uint64), emit
