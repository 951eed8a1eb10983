"""Bytes that one training step holds: weights, gradients, optimizer state, activations, and the most of them at once.

Training is in fp32 with AdamW, pools are updated as [train] says. What autograd keeps is exact for eager execution on a
CPU; the peak adds estimates of what each block holds while it runs: see the tests for how close it comes.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from memforge.blocks.base import BYTES_PER_ELEMENT, Saved, norm_saved
from memforge.plan import LAZY, LayerPlan, ModelPlan, ParamRow, PoolUpdate

FP32, INT32, INT64 = 4, 4, 8


def state_bytes(row: ParamRow, shape: Sequence[int], update: PoolUpdate) -> int:
    """What the optimizer keeps of a part of a parameter: two moments in fp32 of each element, unless it is of a pool
    under sgd; of a pool in 16 bits an fp32 master, unless it is rounded by chance; and a number for each row of a pool
    whose rows remember their last step. The history of catch_up, 16 bytes for each step made, is not counted.
    """
    by_rows = updated_by_rows(row, update)
    moments = 0 if by_rows and update.optimizer == "sgd" else 2 * FP32
    master = FP32 if BYTES_PER_ELEMENT[row.dtype] < FP32 and update.rounding == "master" else 0
    counter = INT32 if by_rows and update.optimizer == "adamw" and update.rule != "lazy" else 0
    return math.prod(shape) * (moments + master) + shape[0] * counter


def updated_by_rows(row: ParamRow, update: PoolUpdate) -> bool:
    """Whether training updates only the rows that were read."""
    return row.group == "values" and bool(row.reads) and not update.dense


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step. `peak_in` names the phase in which most is alive."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    activations_checkpointed: int
    peak: int
    peak_in: str
    peak_checkpointed: int
    peak_checkpointed_in: str
    checkpoint: int
    by_kind: dict[str, dict[str, int]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_saved(layer: LayerPlan, dim: int, batch: int, seq_len: int) -> Iterator[tuple[str, Saved]]:
    """What autograd keeps of one layer, each with its kind. The input of mixer and blocks is the output of a norm."""
    rows = batch * seq_len
    for what, parts in (("mixer", (layer.mixer,)), ("block", layer.blocks)):
        for saved in (*norm_saved(f"{what}_norm", rows, dim), Saved(f"{what} input", rows * dim)):
            yield "norm", saved
        for part in parts:
            for saved in part.saved(batch, seq_len):
                yield part.kind, saved


def frame_saved(plan: ModelPlan, batch: int, seq_len: int) -> Iterator[tuple[str, Saved]]:
    """What autograd keeps outside the layers: the tokens, the last norm, and the loss."""
    n = batch * seq_len
    yield "embedding", Saved("window", batch * (seq_len + 1), "int64")
    for saved in (*norm_saved("norm", n, plan.dim), Saved("head input", n * plan.dim)):
        yield "norm", saved
    yield "head", Saved("log_probabilities", n * plan.vocab_size)
    # Where the targets are evenly spaced in the window they are a view of it.
    yield "head", Saved("targets", n if batch > 1 and seq_len > 1 else 0, "int64")
    yield "head", Saved("loss_weight", 1)


def step_memory(plan: ModelPlan, batch: int, seq_len: int, *, update: PoolUpdate = LAZY) -> StepMemory:
    """The memory of a step. Pools that are updated as a whole have gradients of their own size."""
    weights = plan.weight_bytes()
    optimizer = sum(state_bytes(row, row.shape, update) for row in plan.params)
    frame = list(frame_saved(plan, batch, seq_len))
    layers = [list(layer_saved(layer, plan.dim, batch, seq_len)) for layer in plan.layers]
    inputs = [FP32 * batch * seq_len * plan.dim + chosen_bytes(layer, batch, seq_len) for layer in plan.layers]
    saved, gradients = [_bytes(layer) for layer in layers], _Gradients(plan, batch, seq_len, update)
    step = _Step(plan, batch, seq_len, saved, inputs, _bytes(frame), gradients)
    peak, phase = max(step.timeline(checkpointed=False))
    peak_checkpointed, phase_checkpointed = max(step.timeline(checkpointed=True))
    return StepMemory(
        weights=weights,
        gradients=gradients.total,
        optimizer=optimizer,
        activations=_bytes(frame) + sum(saved),
        activations_checkpointed=_bytes(frame) + sum(inputs),
        peak=weights + optimizer + peak,
        peak_in=phase,
        peak_checkpointed=weights + optimizer + peak_checkpointed,
        peak_checkpointed_in=phase_checkpointed,
        checkpoint=weights + optimizer,
        by_kind=_by_kind(plan, update, gradients, [*frame, *(pair for layer in layers for pair in layer)]),
    )


def chosen_bytes(layer: LayerPlan, batch: int, seq_len: int) -> int:
    """What a layer keeps besides its input when it runs again for its backward pass."""
    return _bytes([("", saved) for part in layer.parts for saved in part.chosen(batch, seq_len)])


def kept_twice(layer: LayerPlan, batch: int, seq_len: int) -> int:
    """Of what a layer keeps when it runs again, the bytes that its backward pass would keep anyway."""
    shape = (batch, seq_len)
    return sum(saved.bytes for part in layer.parts for saved in part.chosen(*shape) if saved in part.saved(*shape))


def _bytes(saved: list[tuple[str, Saved]]) -> int:
    return sum(tensor.bytes for _, tensor in saved)


def _by_kind(
    plan: ModelPlan, update: PoolUpdate, gradients: "_Gradients", saved: list[tuple[str, Saved]]
) -> dict[str, dict[str, int]]:
    """Bytes of weights, gradients, optimizer state and activations of each kind."""
    nothing = dict.fromkeys(("weights", "gradients", "optimizer", "activations"), 0)
    kinds: dict[str, dict[str, int]] = defaultdict(nothing.copy)
    for row in plan.params:
        kinds[row.kind]["weights"] += row.numel * BYTES_PER_ELEMENT[row.dtype]
        kinds[row.kind]["gradients"] += gradients.of(row)
        kinds[row.kind]["optimizer"] += state_bytes(row, row.shape, update)
    for kind, size in gradients.factors_by_kind.items():
        kinds[kind]["gradients"] += size
    for kind, tensor in saved:
        kinds[kind]["activations"] += tensor.bytes
    return dict(kinds)


class _Gradients:
    """Bytes of the gradients of each layer, of each shared pool with a dense one, of the embedding as it is looked up,
    and of what comes first: last norm and head.
    """

    def __init__(self, plan: ModelPlan, batch: int, seq_len: int, update: PoolUpdate) -> None:
        self.update, self.tied = update, plan.tie_embeddings
        self.layers, self.first, self.embedding = [0] * plan.num_layers, 0, 0
        self.pools: dict[str, int] = defaultdict(int)
        for row in plan.params:
            self._add(row)
        self.factors, self.factors_by_kind, self.sorting = [0] * plan.num_layers, dict[str, int](), 0
        if update.dense:
            return
        self.sorting = _sorting(plan, update, batch * seq_len)
        for idx, layer in enumerate(plan.layers):
            for block in layer.blocks:
                size = sum(tensor.bytes for tensor in block.factors(batch, seq_len))
                self.factors[idx] += size
                self.factors_by_kind[block.kind] = self.factors_by_kind.get(block.kind, 0) + size

    @property
    def total(self) -> int:
        return sum(self.layers) + sum(self.pools.values()) + self.first + self.looked_up + sum(self.factors)

    @property
    def looked_up(self) -> int:
        """Of the embedding; where it is the head as well it is among the first."""
        return 0 if self.tied else self.embedding

    def of(self, row: ParamRow) -> int:
        return 0 if updated_by_rows(row, self.update) else row.numel * BYTES_PER_ELEMENT[row.dtype]

    def _add(self, row: ParamRow) -> None:
        size, parts = self.of(row), row.path.split(".")
        if parts[0] == "layers":
            self.layers[int(parts[1])] += size
        elif row.owner.startswith("pool.") and size:
            self.pools[row.owner] += size
        elif row.owner == "embedding":
            self.embedding += size
            self.first += size if self.tied else 0
        elif not row.owner.startswith("pool."):
            self.first += size


def _sorting(plan: ModelPlan, update: PoolUpdate, tokens: int) -> int:
    """Bytes that it takes to sort the reads of all tables by slot, done for the norm and kept for the update."""
    held, extra = 0, 0
    for row in plan.params:
        if updated_by_rows(row, update):
            reads = tokens * sum(read.draws * read.rows for read in row.reads)
            touched = min(reads, row.shape[0])  # at most
            # The token and weight of each read, the slots, where each starts; while they are sorted also the sorted
            # slots, their order, the tokens unsorted, and where slots change.
            held += reads * (INT64 + FP32) + 2 * INT64 * touched
            extra = max(extra, 3 * INT64 * reads + INT64 * touched)
    return held + extra


@dataclass(frozen=True)
class _Step:
    """What is needed to follow the memory of one step.

    `saved` of each layer, `inputs` where it runs again, `frame` outside of them.
    """

    plan: ModelPlan
    batch: int
    seq_len: int
    saved: list[int]
    inputs: list[int]
    frame: int
    gradients: _Gradients

    def timeline(self, *, checkpointed: bool) -> Iterator[tuple[int, str]]:
        """Bytes alive beside weights and optimizer state, and the phase, through one step that is not the first."""
        scratch = (part.scratch(self.batch, self.seq_len) for layer in self.plan.layers for part in layer.parts)
        kept = max(block.kept for block in scratch)
        for alive, phase in self._phases(checkpointed=checkpointed):
            yield alive + kept, phase

    def _phases(self, *, checkpointed: bool) -> Iterator[tuple[int, str]]:
        plan, n = self.plan, self.batch * self.seq_len
        stream, logits = FP32 * n * plan.dim, FP32 * n * plan.vocab_size
        tokens = 2 * INT64 * self.batch * (self.seq_len + 1)  # the window and the targets
        kept = list(accumulate(self.inputs if checkpointed else self.saved))
        scratch = [[part.scratch(self.batch, self.seq_len) for part in layer.parts] for layer in plan.layers]
        for idx, parts in enumerate(scratch):
            yield tokens + kept[idx] + max(part.forward for part in parts), f"forward of layer {idx}"
        # The gradients of the log-probabilities and of the logits, while the log-probabilities are still there.
        yield self.frame + kept[-1] + 2 * logits, "backward of the loss"

        gradients, begun = self.gradients, set[str]()
        done = gradients.first
        for idx in reversed(range(plan.num_layers)):
            read = gradients.pools.keys() & {block.pool_path() for block in plan.layers[idx].blocks}
            # Every reader of a pool makes a gradient of the whole pool, which is then added to that of those before.
            added = sum(gradients.pools[path] for path in read & begun)
            done += gradients.layers[idx] + sum(gradients.pools[path] for path in read - begun)
            begun |= read
            # Those of the residual stream, of the output of the norm and of its input.
            working = max(part.backward for part in scratch[idx]) + 3 * stream
            if checkpointed:  # the layer runs again, from the input that was kept
                replay = max(part.forward for part in scratch[idx]) + stream
                twice = kept_twice(plan.layers[idx], self.batch, self.seq_len)
                working = self.saved[idx] - stream - twice + max(working, replay)
            yield tokens + kept[idx] + done + added + working, f"backward of layer {idx}"
            done += gradients.factors[idx]
        # The gradient of the embedding is dense. If it is the head as well, it has one already, a transposed view, to
        # which autograd adds out of place.
        looked_up = gradients.embedding * (2 if plan.tie_embeddings else 1)
        yield tokens + stream + done + looked_up, "backward of the embedding"
        yield gradients.total + gradients.sorting, "update"
