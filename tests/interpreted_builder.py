"""Triton's interpreter as the tests need it: rounded as a GPU rounds, fast enough to sort, and counting bytes.

What it repairs in triton 3.7: fp32 is cut off to bf16 instead of rounded,
products of bf16 matrices are those of their bits, and a xor reduction, which sorting is made of, runs element by
element in Python.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"
BUILDER = interpreter.InterpreterBuilder
_cast, _dot, _reduce = BUILDER.cast_impl, BUILDER.create_dot, interpreter.ReduceOps.apply_impl


def _rounding_cast(self: Any, source: Any, target: Any) -> Any:
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(rounded, target.scalar)
    return _cast(self, source, target)


def _typed_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
    a, b = (_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, acc, *options)


def _fast_reduce(self: Any, inputs: tuple[Any, ...]) -> Any:
    if self.combine_fn == tl.standard._xor_combine:
        data = np.bitwise_xor.reduce(inputs[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, inputs[0].dtype)
    return _reduce(self, inputs)


BUILDER.cast_impl, BUILDER.create_dot, interpreter.ReduceOps.apply_impl = _rounding_cast, _typed_dot, _fast_reduce


class Traffic:
    """Bytes read from and written to each tensor, and which of its elements were written."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self._ranges = {n: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for n, t in tensors.items()}

    def add(self, count: Counter[str], pointers: Any, mask: Any, itemsize: int) -> None:
        live = pointers[np.broadcast_to(mask, pointers.shape)]
        for name, (begin, end) in self._ranges.items():
            count[name] += itemsize * int(((live >= begin) & (live < end)).sum())
        count["all"] += itemsize * live.size


@contextmanager
def traffic(**tensors: Tensor) -> Iterator[Traffic]:
    """What the kernels launched inside read and write; masked lanes do not count. "all" is every tensor."""
    counted = Traffic(tensors)
    load, store = BUILDER.create_masked_load, BUILDER.create_masked_store

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        loaded = load(self, pointers, mask, *rest)
        counted.add(counted.read, pointers.data, mask.data, loaded.data.itemsize)
        return loaded

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counted.add(counted.written, pointers.data, mask.data, value.data.itemsize)
        return store(self, pointers, value, mask, *rest)

    BUILDER.create_masked_load, BUILDER.create_masked_store = counting_load, counting_store
    try:
        yield counted
    finally:
        BUILDER.create_masked_load, BUILDER.create_masked_store = load, store


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN, or the least integer, so that an element that no program writes is seen."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        out = empty(*size, **options)
        return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).min)

    torch.empty = poisoned
    try:
        yield
    finally:
        torch.empty = empty
