"""Bytes that one training step holds: weights, gradients, optimizer state, activations, and the most of them at once.

Training is in fp32 with AdamW and dense gradients, as memforge/training does it. What autograd keeps is exact for
eager execution on a CPU; the peak adds estimates of what each block holds while it runs: for the demo models it is
within 2% of what torch's allocator gives out, with checkpointing within 7%; for wide models on few tokens up to 15%
over it.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from memforge.blocks.base import BYTES_PER_ELEMENT, Saved, norm_saved
from memforge.plan import LayerPlan, ModelPlan

# AdamW keeps two moments in fp32.
STATE_BYTES_PER_PARAM = 8
FP32, INT64 = 4, 8


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


def step_memory(plan: ModelPlan, batch: int, seq_len: int) -> StepMemory:
    weights, num_params = plan.weight_bytes(), sum(row.numel for row in plan.params)
    optimizer = STATE_BYTES_PER_PARAM * num_params
    frame = list(frame_saved(plan, batch, seq_len))
    layers = [list(layer_saved(layer, plan.dim, batch, seq_len)) for layer in plan.layers]
    sizes, outside = [_bytes(layer) for layer in layers], _bytes(frame)
    inputs = FP32 * batch * seq_len * plan.dim * plan.num_layers
    peak, phase = max(_timeline(plan, batch, seq_len, sizes, outside, checkpointed=False))
    peak_checkpointed, phase_checkpointed = max(_timeline(plan, batch, seq_len, sizes, outside, checkpointed=True))
    return StepMemory(
        weights=weights,
        gradients=weights,
        optimizer=optimizer,
        activations=outside + sum(sizes),
        activations_checkpointed=outside + inputs,
        peak=weights + optimizer + peak,
        peak_in=phase,
        peak_checkpointed=weights + optimizer + peak_checkpointed,
        peak_checkpointed_in=phase_checkpointed,
        checkpoint=weights,
        by_kind=_by_kind(plan, [*frame, *(pair for layer in layers for pair in layer)]),
    )


def _bytes(saved: list[tuple[str, Saved]]) -> int:
    return sum(tensor.bytes for _, tensor in saved)


def _by_kind(plan: ModelPlan, saved: list[tuple[str, Saved]]) -> dict[str, dict[str, int]]:
    """Bytes of weights, gradients, optimizer state and activations of each kind."""
    nothing = dict.fromkeys(("weights", "gradients", "optimizer", "activations"), 0)
    kinds: dict[str, dict[str, int]] = defaultdict(nothing.copy)
    for row in plan.params:
        size = row.numel * BYTES_PER_ELEMENT[row.dtype]
        kinds[row.kind]["weights"] += size
        kinds[row.kind]["gradients"] += size
        kinds[row.kind]["optimizer"] += STATE_BYTES_PER_PARAM * row.numel
    for kind, tensor in saved:
        kinds[kind]["activations"] += tensor.bytes
    return dict(kinds)


def _timeline(
    plan: ModelPlan, batch: int, seq_len: int, layers: list[int], frame: int, *, checkpointed: bool
) -> Iterator[tuple[int, str]]:
    """Bytes alive beside weights and optimizer state, and the phase, through one step."""
    n = batch * seq_len
    stream, logits = FP32 * n * plan.dim, FP32 * n * plan.vocab_size
    tokens = 2 * INT64 * batch * (seq_len + 1)  # the window and the targets
    kept = list(accumulate(stream if checkpointed else saved for saved in layers))
    scratch = [[part.scratch(batch, seq_len) for part in layer.parts] for layer in plan.layers]
    for idx, parts in enumerate(scratch):
        yield tokens + kept[idx] + max(part.forward for part in parts), f"forward of layer {idx}"
    # The gradients of the log-probabilities and of the logits, while the log-probabilities are still there.
    yield frame + kept[-1] + 2 * logits, "backward of the loss"

    gradients, begun = _Gradients(plan), set[str]()
    done = gradients.first
    for idx in reversed(range(plan.num_layers)):
        read = gradients.pools.keys() & {block.pool_path() for block in plan.layers[idx].blocks}
        # Every reader of a pool makes a gradient of the whole pool, which is then added to that of the readers before.
        added = sum(gradients.pools[path] for path in read & begun)
        done += gradients.layers[idx] + sum(gradients.pools[path] for path in read - begun)
        begun |= read
        # Those of the residual stream, of the output of the norm and of its input.
        working = max(part.backward for part in scratch[idx]) + 3 * stream
        if checkpointed:  # the layer runs again, from the input that was kept
            replay = max(part.forward for part in scratch[idx]) + stream
            working = layers[idx] - stream + max(working, replay)
        yield tokens + kept[idx] + done + added + working, f"backward of layer {idx}"
    # The gradient of the embedding is dense. If it is the head as well, it has one already, a transposed view, to which
    # autograd adds out of place.
    looked_up = gradients.embedding * (2 if plan.tie_embeddings else 1)
    yield tokens + stream + done + looked_up, "backward of the embedding"
    yield plan.weight_bytes(), "update"


class _Gradients:
    """Bytes of the gradients of each layer, of each shared pool, of the embedding as it is looked up, and of what comes
    first: last norm and head.
    """

    def __init__(self, plan: ModelPlan) -> None:
        self.layers, self.first, self.embedding = [0] * plan.num_layers, 0, 0
        self.pools: dict[str, int] = defaultdict(int)
        for row in plan.params:
            size, parts = row.numel * BYTES_PER_ELEMENT[row.dtype], row.path.split(".")
            if parts[0] == "layers":
                self.layers[int(parts[1])] += size
            elif row.owner.startswith("pool."):
                self.pools[row.owner] += size
            elif row.owner == "embedding":
                self.embedding += size
                self.first += size if plan.tie_embeddings else 0
            else:
                self.first += size
