"""Which slots a text reads, and which of its tokens read a slot: a forward pass on tapes."""

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memforge.blocks.base import KindPlan
from memforge.errors import UsageError, printable
from memforge.nn.decoder import Decoder
from memforge.plan import ModelPlan
from memforge_kernels import Tape
from memforge_kernels.tape import Gathered

Weighted = tuple[int, float]


@dataclass(frozen=True)
class SlotOf:
    """A slot of a pool, and the layers whose reads of it are asked for."""

    slot: int
    of: str
    layers: tuple[str, ...]


def reading_blocks(plan: ModelPlan) -> list[KindPlan]:
    """The blocks that read a pool, in order. Raises UsageError when there is none."""
    found = [part for part in plan.sublayers() if part.pool_path() is not None]
    if not found:
        raise UsageError("the model has no memory or PEER layers: no slots are read")
    return found


def find_slot(plan: ModelPlan, text: str) -> SlotOf:
    """What LAYER_OR_POOL:INDEX names. Raises UsageError with what exists."""
    blocks = reading_blocks(plan)
    of, _, index = text.rpartition(":")
    layers = tuple(block.path for block in blocks if of in (block.path, block.pool_path()))
    if not layers:
        pools = dict.fromkeys(block.pool_path() for block in blocks)
        known = ", ".join([*(block.path for block in blocks), *(str(pool) for pool in pools)])
        raise UsageError(f"--slot {printable(text)}: expected LAYER:INDEX or POOL:INDEX; there are {known}")
    pool = next(block.pool_path() for block in blocks if block.path == layers[0])
    rows = next(row.shape[0] for row in plan.params if row.owner == pool)
    if not (index.isascii() and index.isdigit() and len(index) < 20 and int(index) < rows):
        raise UsageError(f"--slot {printable(text)}: {of} has the slots 0 to {rows - 1}")
    return SlotOf(int(index), of, layers)


@torch.no_grad()
def slots_read(model: Decoder, plan: ModelPlan, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The slots and weights of every read of a pool, by the block that read it.

    Shape: tokens [t] -> for each block two of [t, h*k]. The weight of a single-neuron expert is its output's: the
    softmax weight times the activation, which may be negative.
    """
    owners = {id(model.get_parameter(row.path)): row.owner for row in plan.params}
    tapes = [Tape() for _ in plan.layers]
    model.forward_with(tokens[None], [lambda tape=tape: tape for tape in tapes])
    found = {}
    for layer, tape in zip(plan.layers, tapes, strict=True):
        for block in layer.blocks:
            # Each block of a layer reads a pool of its own kind, so the table tells whose read it was.
            reads = [
                (record.slots, record.weights)
                for table, record in zip(tape.tables, tape.records, strict=True)
                if isinstance(record, Gathered) and owners[id(table)] == block.pool_path()
            ]
            if reads:
                slots, weights = (torch.cat(parts, dim=1) for parts in zip(*reads, strict=True))
                found[block.path] = slots.cpu(), weights.float().cpu()
    return found


def token_slots(model: Decoder, plan: ModelPlan, tokens: Sequence[int], top: int) -> list[dict[str, list[Weighted]]]:
    """For each token and each block that reads a pool, the slots of most weight, summed over heads."""
    found: list[dict[str, list[Weighted]]] = []
    for _, reads in _windows(model, plan, tokens):
        lists = {
            path: [_heaviest(*row, top) for row in zip(slots.tolist(), weights.tolist(), strict=True)]
            for path, (slots, weights) in reads.items()
        }
        found += [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return found


def slot_tokens(
    model: Decoder, plan: ModelPlan, tokens: Sequence[int], wanted: SlotOf, top: int
) -> dict[str, list[Weighted]]:
    """For each layer, the positions of the tokens that read a slot with most weight, heaviest first."""
    found: dict[str, list[Weighted]] = {path: [] for path in wanted.layers}
    for start, reads in _windows(model, plan, tokens):
        for path, heaviest in found.items():
            slots, weights = reads[path]
            hit = slots == wanted.slot
            total = (weights * hit).sum(dim=1)
            positions = hit.any(dim=1).nonzero().flatten().tolist()
            found[path] = _most([*heaviest, *((start + p, float(total[p])) for p in positions)], top)
    return found


def _windows(
    model: Decoder, plan: ModelPlan, tokens: Sequence[int]
) -> Iterator[tuple[int, dict[str, tuple[Tensor, Tensor]]]]:
    """The reads of each stretch of max_seq_len tokens and where it starts; no token sees further back than that."""
    device = next(model.parameters()).device
    for start in range(0, len(tokens), plan.max_seq_len):
        window = torch.tensor(tokens[start : start + plan.max_seq_len], device=device)
        yield start, slots_read(model, plan, window)


def _heaviest(slots: list[int], weights: list[float], top: int) -> list[Weighted]:
    total: dict[int, float] = {}
    for slot, weight in zip(slots, weights, strict=True):
        total[slot] = total.get(slot, 0.0) + weight
    return _most(total.items(), top)


def _most(found: Iterable[Weighted], top: int) -> list[Weighted]:
    """Those of the largest weight by size; of equal ones, the first."""
    return heapq.nsmallest(top, found, key=lambda of: (-abs(of[1]), of[0]))
