"""Which kernel configs a model's ops run with on which GPU, and what they compile to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memforge.build import build_model
from memforge.cost.access import distinct_uniform
from memforge.cost.memory import updated_by_rows
from memforge.errors import DeviceError, UsageError, printable
from memforge.plan import ParamRow, Plan
from memforge_kernels import tuning
from memforge_kernels.tuning import Key

# Tokens of a step where the spec has no [train].
USUAL_TOKENS = 2**14


class _Seen(TorchDispatchMode):
    """The keys of the kernels that run inside it, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[tuple[str, Key], None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for found in _keys_of(func.overloadpacket.__name__, args) if func.namespace == "memforge" else ():
            self.keys.setdefault(found)
        return func(*args, **(kwargs or {}))


def _keys_of(name: str, args: tuple[Any, ...]) -> Iterator[tuple[str, Key]]:
    """The kernels that an op launches, by the keys of its wrapper."""
    if name == "weighted_gather":
        values, slots = args[:2]
        yield name, Key(slots.shape[0], values.shape[1], slots.shape[1], values.dtype)
    if name == "gather_dot":
        _, values, slots = args
        yield name, Key(slots.shape[0], values.shape[1], slots.shape[1], values.dtype)
    if name == "product_key_topk":
        query, sub_keys, k = args
        n, h = query.shape[:2]
        yield f"{name}.halves", Key(n, sub_keys.shape[2], k, query.dtype)
        yield f"{name}.pairs", Key(n * h, sub_keys.shape[2], k, query.dtype)


def kernel_keys(plan: Plan) -> list[tuple[str, Key]]:
    """The Triton kernels of a training step, by op, shape and type: found by running the model on meta."""
    run = plan.run.train
    seq_len = plan.model.max_seq_len if run is None else run.seq_len
    batch = max(1, USUAL_TOKENS // seq_len) if run is None else run.batch_size
    model = build_model(plan.model, device="meta").train()
    with _Seen() as seen:
        logits, _ = model(torch.zeros(batch, seq_len, dtype=torch.int64, device="meta"))
        logits.sum().backward()
    tables = (row for row in plan.model.params if updated_by_rows(row, plan.run.pool_update))
    updates = {f"row_update.{kernel}": None for kernel in ("squared_norm", _updater(plan))}
    for row in tables:
        for op in updates:
            seen.keys.setdefault((op, _update_key(row, batch * seq_len)))
    return list(seen.keys)


def _updater(plan: Plan) -> str:
    return "adamw" if plan.run.train is None else plan.run.train.value_optimizer


def _update_key(row: ParamRow, tokens: int) -> Key:
    """Rows expected to be touched, and reads of each."""
    reads = tokens * sum(read.draws * read.rows for read in row.reads)
    touched = max(1, distinct_uniform(row.reads, tokens, row.shape[0]))
    return Key(touched, row.shape[1], -(-reads // touched), getattr(torch, row.dtype))


def kernel_configs(plan: Plan, targets: list[str] | None) -> list[dict[str, Any]]:
    """A record of each kernel and target: the config that it runs with, and where that comes from.

    By default for every target that a table is shipped for, as the tables have it; for `targets` that are named, with
    what the kernels compile to. Raises UsageError for an unknown target, DeviceError where compiler tools are missing.
    """
    keys = kernel_keys(plan)
    if targets is None:
        return [tuning.explained(op, key, target) for target in tuning.shipped() for op, key in keys]
    return [record for target in targets for record in _compiled(keys, target)]


def _compiled(keys: list[tuple[str, Key]], target: str) -> Iterator[dict[str, Any]]:
    with compiling_for(target) as offline:
        for op, key in keys:
            yield tuning.explained(op, key, target) | offline.record(op, key, target)


@contextmanager
def compiling_for(target: str, *, ranked: bool = False) -> Iterator[Any]:
    """The module that compiles kernels without a GPU, for a target that it knows (`ranked`: and can rank configs for).

    Raises UsageError for another target, DeviceError where compiler tools are missing or give up.
    """
    from memforge_kernels import offline

    known = offline.ranked_targets() if ranked else offline.targets()
    if target not in known:
        raise UsageError(f"--target {printable(target)}: known are {', '.join(known)}")
    try:
        yield offline
    except (offline.ToolMissing, offline.NotCompiled) as error:
        raise DeviceError(str(error)) from None
