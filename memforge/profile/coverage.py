"""The coverage gate: every op that a model runs is counted or declared free; any other would be missing in silence."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from memforge_kernels import FLOP_FORMULAS

# Views and element-wise ops are free by what torch says of them (is_view, the tag `pointwise`). These are the others:
# they do no multiply-adds that grow with a product of sizes, and the ledger lists them as excluded. Random numbers are
# not free: activation checkpointing runs layers twice and would draw others.
FREE = frozenset(
    """
    arange clone cat copy empty empty_like full full_like lift_fresh_copy new_empty new_full new_zeros ones ones_like
    promote_types scalar_tensor slice_backward stack zeros zeros_like _to_copy _unsafe_view constant_pad_nd
    fill repeat resize flip tril triu

    _softmax _softmax_backward_data _log_softmax _log_softmax_backward_data _safe_softmax logsumexp cumsum
    nll_loss_forward nll_loss_backward _fused_rms_norm _fused_rms_norm_backward native_layer_norm
    native_layer_norm_backward sum mean amax amin any all argmax argmin max min prod var var_mean std norm
    linalg_vector_norm

    floor_divide remainder bitwise_and bitwise_or
    topk sort argsort searchsorted unique_consecutive bincount nonzero
    embedding embedding_dense_backward gather index index_add index_copy index_fill index_put index_select
    masked_fill masked_select scatter scatter_add scatter_reduce
    """.split()
)


def is_free(op: Any) -> bool:
    """Whether an op overload does nothing that the ledger would have to count; in place or not is the same."""
    if op.is_view or torch.Tag.pointwise in op.tags:
        return True
    return op.namespace == "aten" and op.overloadpacket.__name__.rstrip("_") in FREE


class CoverageGate(TorchDispatchMode):
    """Sorts the ops that run inside it. `unknown` maps those neither counted nor free to where they first ran."""

    def __init__(self, formulas: Mapping[Any, Any] = FLOP_FORMULAS) -> None:
        super().__init__()
        self.formulas = {**flop_registry, **formulas}
        self.counted: set[str] = set()
        self.free: set[str] = set()
        self.unknown: dict[str, str] = {}
        self._modules = ModuleTracker()

    def __enter__(self) -> "CoverageGate":
        self._modules.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modules.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = f"{func.namespace}.{func.overloadpacket.__name__}"
        if func.overloadpacket in self.formulas:
            self.counted.add(name)
        elif is_free(func):
            self.free.add(name)
        else:
            # Names of the modules that are running, from "Global" in; the longest is the innermost.
            self.unknown.setdefault(name, max(self._modules.parents, key=len).partition(".")[2])
        return func(*args, **(kwargs or {}))
