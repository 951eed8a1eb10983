"""memforge: a TOML spec becomes a plan, a ledger, a PyTorch model and a training run.

The Python API is five verbs, each a pure function of the one before:

    spec = load_spec("spec.toml")            # Spec        text, validated
    plan = make_plan(spec)                   # Plan        numbers, frozen
    cost = estimate(plan.model, seq_len=512) # CostReport  parameters and FLOPs, exact
    model = build_model(plan.model, seed=0)  # nn.Module   tensors
    train(plan, run_dir)                     # a run directory

The first three never import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memforge.build import build_model
    from memforge.cost import estimate
    from memforge.plan import make_plan
    from memforge.spec import load_spec
    from memforge.training import train

_VERBS = {
    "load_spec": "memforge.spec",
    "make_plan": "memforge.plan",
    "estimate": "memforge.cost",
    "build_model": "memforge.build",
    "train": "memforge.training",
}

__all__ = ["build_model", "estimate", "load_spec", "make_plan", "train"]


def __getattr__(name: str) -> Any:
    if name not in _VERBS:
        raise AttributeError(f"module 'memforge' has no attribute {name!r}")
    return getattr(import_module(_VERBS[name]), name)
