"""What a CPU was measured to do, and the time of a training step that follows from it.

`memforge doctor --calibrate` measures a few ops over a range of sizes, once; a step is predicted as the sum of its
ops, each at the rate of its size. Between two sizes rates are interpolated, in logarithms; beyond them they stay.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from memforge.blocks.base import BYTES_PER_ELEMENT, KindPlan, OpCost
from memforge.cost.ledger import CostReport, touched
from memforge.cost.memory import updated_by_rows
from memforge.machine import cpu_name
from memforge.plan import LAZY, ModelPlan
from memforge.storage import cache_dir

FORMAT_VERSION = 1
# Size and seconds per unit of work at that size, for each of several sizes, ascending.
Curve = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Passes:
    """The curves of an op's forward and backward pass."""

    forward: Curve
    backward: Curve


@dataclass(frozen=True)
class Calibration:
    """Seconds per unit of work, by size.

    `blocks` are what a block of each kind takes beside its ops, per byte that it keeps for the backward pass; `frame`
    the norms and residual adds of a layer, per byte of the residual stream; `loss` the loss, per byte of the logits.
    They are forward and backward together.
    """

    cpu: str
    cores: int
    torch: str
    matmul: Passes  # by the FLOPs of one product, per FLOP
    stream: float  # per byte of a copy that is read or written: weights that are in no cache
    attention: Passes  # by tokens of a sequence, per executed FLOP
    scoring: Passes  # by sub-keys, per token, head, sub-key and element of the query; backward per chosen element
    rows: Passes  # by bytes of the table, per byte of a row; backward is the gradient of the weights
    blocks: dict[str, Curve]
    frame: Curve
    loss: Curve
    update: Curve  # by elements of one parameter, per element: norm of the gradient, clipping and fused AdamW
    row_sums: Curve  # by bytes of the table, per byte of a row that was read: sorting, norm, sum
    row_update: Curve  # by bytes of the table, per byte of a row that was touched

    def is_of_this_machine(self) -> bool:
        """Whether CPU, cores and torch are those that were measured."""
        cores = len(os.sched_getaffinity(0))
        return (self.cpu, self.cores, self.torch) == (cpu_name(), cores, version("torch"))

    def to_json(self) -> str:
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step in fp32 on the calibrated CPU."""

    forward_and_backward: float
    update: float

    @property
    def total(self) -> float:
        return self.forward_and_backward + self.update


def calibration_file() -> Path:
    return cache_dir() / "calibration.json"


def read_calibration() -> Calibration | None:
    """The last one that was made on this account, if there is one that can be read."""
    try:
        record = json.loads(calibration_file().read_text(encoding="utf-8"))
        if record.pop("format_version") != FORMAT_VERSION:
            return None
        passes = {
            name: Passes(_curve(record[name]["forward"]), _curve(record[name]["backward"]))
            for name in ("matmul", "attention", "scoring", "rows")
        }
        curves = {name: _curve(record[name]) for name in ("frame", "loss", "update", "row_sums", "row_update")}
        blocks = {kind: _curve(points) for kind, points in record["blocks"].items()}
        return Calibration(**{**record, **passes, **curves, "blocks": blocks})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _curve(points: Iterable[Sequence[float]]) -> Curve:
    return tuple((float(size), float(seconds)) for size, seconds in points)


def at(curve: Curve, size: float) -> float:
    """Seconds per unit at a size."""
    for (low, a), (high, b) in pairwise(curve):
        if size < high:
            if size <= low:
                return a
            share = math.log(size / low) / math.log(high / low)
            return float(a ** (1 - share) * b**share)
    return curve[-1][1]


def predict(plan: ModelPlan, report: CostReport, machine: Calibration) -> StepTime:
    """The time of an eager step on the report's batch that keeps all activations and updates pools by their rows."""
    n, stream = report.tokens, 4 * report.tokens * plan.dim
    logits = 4 * n * plan.vocab_size
    seconds = logits * at(machine.loss, logits) + plan.num_layers * stream * at(machine.frame, stream)
    seconds += sum(op_seconds(row.cost, machine) for row in report.rows)
    for layer in plan.layers:
        for part in layer.parts:
            kept = kept_bytes(part, report.batch, report.seq_len)
            # A kind of another package may be newer than the calibration.
            seconds += kept * at(machine.blocks.get(part.kind, machine.blocks["ffn"]), kept)
    update = 0.0
    for row in plan.params:
        size = BYTES_PER_ELEMENT[row.dtype]
        if updated_by_rows(row, LAZY):
            width, table = row.numel // row.shape[0], row.numel * size
            read = n * sum(read.draws * read.rows for read in row.reads)
            update += read * width * 4 * at(machine.row_sums, table)
            update += touched(row, n)["uniform"] * width * size * at(machine.row_update, table)
        else:
            update += row.numel * at(machine.update, row.numel)
    return StepTime(seconds, update)


def kept_bytes(part: KindPlan, batch: int, seq_len: int) -> int:
    """What a block keeps for the backward pass, its input included."""
    return 4 * batch * seq_len * part.dim + sum(saved.bytes for saved in part.saved(batch, seq_len))


def op_seconds(cost: OpCost, machine: Calibration) -> float:
    """Forward and backward of one op."""
    if cost.engine == "matmul":
        matrices = min(cost.shape[3], cost.shape[0]) if cost.shape else 1
        size = cost.forward / max(1, matrices)
        moved = 4 * (cost.traffic.weights + cost.traffic.backward_weights)
        computing = cost.forward * at(machine.matmul.forward, size) + cost.backward * at(machine.matmul.backward, size)
        return computing + moved * machine.stream
    if cost.engine == "attention":
        tokens, rates = cost.shape[1], machine.attention
        return cost.forward * at(rates.forward, tokens) + cost.backward * at(rates.backward, tokens)
    if cost.engine == "scoring":
        n, heads, sub_keys, query, chosen = cost.shape
        forward = n * heads * sub_keys * query * at(machine.scoring.forward, sub_keys)
        return forward + n * heads * chosen * query * at(machine.scoring.backward, sub_keys)
    n, each, width, table = cost.shape
    moved, size = 4 * n * each * width, 4 * width * table
    return moved * (at(machine.rows.forward, size) + at(machine.rows.backward, size))
