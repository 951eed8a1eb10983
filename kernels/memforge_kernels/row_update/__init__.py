from memforge_kernels.row_update.gradient import Read, RowGradient, sorted_gradient
from memforge_kernels.row_update.op import adamw_, segment_sum, sgd_, squared_norm
from memforge_kernels.row_update.optimizer import RowAdamW, RowOptimizer, RowSGD
from memforge_kernels.row_update.rules import RULES, Rule

__all__ = [
    "RULES",
    "Read",
    "RowAdamW",
    "RowGradient",
    "RowOptimizer",
    "RowSGD",
    "Rule",
    "adamw_",
    "segment_sum",
    "sgd_",
    "sorted_gradient",
    "squared_norm",
]
