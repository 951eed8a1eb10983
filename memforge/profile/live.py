"""Bytes of tensor storage alive at once, counted op by op, storage by storage."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memforge.nn.decoder import next_token_loss
from memforge_kernels import KERNELS


class LiveStorage(TorchDispatchMode):
    """Counts every storage that is made inside it, from the op that makes it until nothing refers to it.

    Ops of memforge_kernels are entered, so that what they allocate inside is counted too; what torch's own kernels
    allocate inside is not. `static` tensors exist before and are counted from the start.
    """

    def __init__(self, static: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in static:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._alive.get(key)
        if known is not None and known[0]() is not None:
            return
        if known is not None:
            self._forget(key)

        def gone(_: Any) -> None:
            self._forget(key)

        self._alive[key] = (weakref.ref(storage, gone), size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _forget(self, key: int) -> None:
        found = self._alive.pop(key, None)
        if found is not None:
            self.bytes -= found[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = KERNELS.get(func)
        if inside is None:
            out = func(*args, **(kwargs or {}))
        else:
            with self:
                out = inside(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out


def kept_bytes(model: nn.Module, batch: int, seq_len: int) -> int:
    """What a forward pass in training leaves alive for its backward pass, besides the losses it returns."""

    def forward() -> tuple[Tensor, dict[str, Tensor]]:
        return next_token_loss(model, torch.zeros(batch, seq_len + 1, dtype=torch.int64))

    with LiveStorage(model.parameters()) as live:
        with torch.no_grad():  # so that the room that kernels keep for the next call is there
            forward()
        before = live.bytes
        loss, extra = forward()
        return live.bytes - before - sum(t.untyped_storage().nbytes() for t in (loss, *extra.values()))
