"""Operators of memory and expert layers, usable without memforge.

Each op has its own folder: `reference` is the definition in plain torch, any float dtype; `op` is the registered
operator `torch.ops.memforge.<name>` with a fake kernel for meta and export, a gradient, and a FLOP formula
(expert_lookup is made of two of them).
"""

from memforge_kernels.expert_lookup import expert_lookup
from memforge_kernels.gather_dot import gather_dot
from memforge_kernels.grouped_linear import grouped_linear
from memforge_kernels.product_key_topk import product_key_topk
from memforge_kernels.registry import FLOP_FORMULAS, KERNELS
from memforge_kernels.row_update import Read, RowAdamW, RowOptimizer, RowSGD
from memforge_kernels.tape import Reader, Record, Recorder, Tape, new_tap
from memforge_kernels.weighted_gather import weighted_gather
from memforge_kernels.weighted_scatter import weighted_scatter

__all__ = [
    "FLOP_FORMULAS",
    "KERNELS",
    "Read",
    "Reader",
    "Record",
    "Recorder",
    "RowAdamW",
    "RowOptimizer",
    "RowSGD",
    "Tape",
    "expert_lookup",
    "gather_dot",
    "grouped_linear",
    "new_tap",
    "product_key_topk",
    "weighted_gather",
    "weighted_scatter",
]
