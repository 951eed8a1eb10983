"""The ledger: parameters and FLOPs of a plan, exact integers, without torch.

Conventions, printed on every report: a multiply-add is 2 FLOPs; backward is counted op by op, not assumed to be twice
the forward; norms, softmax, top-k compares and element-wise work are excluded. `executed` takes every op as it is
implemented, attention as plain matrix products, and equals torch's FlopCounterMode on the meta device (fused attention
kernels are counted differently or not at all); `counted` is the model's FLOPs by convention, which parity compares.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from memforge.blocks.base import BYTES_PER_ELEMENT, OpCost, matmul_cost
from memforge.cost.access import distinct_uniform, distinct_zipf
from memforge.cost.devices import DEVICES, Device
from memforge.cost.memory import StepMemory, step_memory, updated_by_rows
from memforge.cost.mesh import per_rank
from memforge.cost.roofline import Roofline, roofline, update_bytes
from memforge.errors import UsageError
from memforge.mesh import Mesh, SplitChoice
from memforge.plan import LAZY, ModelPlan, ParamRow, PoolUpdate

CONVENTIONS = (
    "a multiply-add is 2 FLOPs; backward is counted op by op",
    "counted: causal attention at half (2*t*t*width forward), a window at its band, scoring backward over the selected "
    "sub-keys only, rows of a capacity that hold no token not at all",
    "executed: every op as implemented, attention as full matrix products; equal to FlopCounterMode on meta",
    "active parameters: touched by one token - every dense weight and sub-key, one embedding row, the chosen "
    "experts, heads*top_k value rows per reader",
    "bytes read: of parameters, by one token with nothing cached, by a batch every row once; written: by a row-wise "
    "AdamW update, weight and two fp32 moments of each element that a token or a batch touches",
    "rows touched by a batch: expected, when all rows are equally likely, and when row i has probability ~ 1/i (Zipf); "
    "all experts where they choose the tokens",
    "memory: training in fp32 with AdamW, pools as [train] says, by rows with a gradient that stays in factors; "
    "activations are what autograd keeps in eager mode",
    "mesh: dense parameters cut over dp_shard x memory ranks, pools by columns or rows over memory, a copy in every "
    "group; what the fullest rank holds in a step of one pass on a CPU, with all that is gathered for it",
    "wire: bytes that a rank sends where nothing is sent twice, of n ranks (n-1) times its part of a gather, (n-1)/n "
    "of what it hands in to be summed and scattered, twice that for a sum that all get, and all but its own of an "
    "exchange; equal to the collectives recorded in training, but for pools by rows, where it is their mean",
    "roofline: the least time by peak FLOPs and bandwidth, each row and weight moved once; the update moves all but "
    "rows of pools that no token read (uniform); in bf16 on named devices, pools and update in the types they are "
    "stored in; memory-bound is a share of forward and backward time",
    "roofline of a rank: its own tokens and its part of the update; collectives at the rates of links and ports, "
    "without latency, what enters a machine once through the ports of all its members; between the sum of computing "
    "and sending and the longest of computing, links and network, as far as they overlap",
)
EXCLUDED = (
    "norms",
    "softmax",
    "top-k compares",
    "activations and other element-wise work",
    "rotary positions",
)
MAX_BATCH = 2**20
ACCESS = {"uniform": distinct_uniform, "zipf": distinct_zipf}
AXES = ("params", "active_params", "flops", "bytes")


@dataclass(frozen=True)
class CostRow:
    """FLOPs of one op of one block over the whole batch."""

    path: str
    kind: str
    layer_idx: int | None
    cost: OpCost


@dataclass(frozen=True)
class CostReport:
    """Every op and every parameter of a model at one batch shape. Totals are integers; per token is a rendering."""

    model_hash: str
    batch: int
    seq_len: int
    rows: tuple[CostRow, ...]
    params: tuple[ParamRow, ...]
    layers: tuple[tuple[str, ...], ...]
    caveats: tuple[str, ...]
    memory: StepMemory
    roofline: tuple[Roofline, ...]
    mesh: dict[str, Any] | None

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    def flops(self, *, executed: bool = False) -> tuple[int, int]:
        """Forward and backward over the batch."""
        return _flops(self.rows, executed=executed)

    def axes(self) -> dict[str, int | float]:
        """The four figures on which two models are compared. FLOPs are forward and backward, per token."""
        return {name: as_number(value) for name, value in self.exact_axes().items()}

    def exact_axes(self) -> dict[str, Fraction]:
        """The same unrounded: capacities round up, so that FLOPs per token need not be an integer."""
        return {
            "params": Fraction(sum(row.numel for row in self.params)),
            "active_params": Fraction(sum(row.active for row in self.params)),
            "flops": Fraction(sum(self.flops()), self.tokens),
            "bytes": Fraction(_bytes_read(self.params)),
        }

    def as_dict(self) -> dict[str, Any]:
        axes, kinds = self.axes(), _by(self.params, "kind")
        rows_of: dict[str, list[CostRow]] = _by(self.rows, "kind")
        return {
            "model_hash": self.model_hash,
            "batch": self.batch,
            "seq_len": self.seq_len,
            "params": {
                "total": axes["params"],
                "active": axes["active_params"],
                "by_kind": {kind: sum(r.numel for r in rows) for kind, rows in kinds.items()},
                "active_by_kind": {kind: sum(r.active for r in rows) for kind, rows in kinds.items()},
                "bytes": sum(r.numel * BYTES_PER_ELEMENT[r.dtype] for r in self.params),
            },
            "flops_per_token": {
                **self._flops_dict(self.rows, executed=False),
                "by_kind": {k: self._total(rows) for k, rows in rows_of.items()},
                "outside_layers": self._flops_dict([r for r in self.rows if r.layer_idx is None], executed=False),
                "executed": self._flops_dict(self.rows, executed=True),
            },
            "bytes_per_token": {
                "read": axes["bytes"],
                "written": sum(r.active * update_bytes(r.dtype)[1] for r in self.params),
                "read_by_kind": {kind: _bytes_read(rows) for kind, rows in kinds.items()},
            },
            "bytes_per_batch": self._traffic(),
            "memory": self.memory.as_dict(),
            "roofline": [line.as_dict(self.memory.peak, self.memory.peak_checkpointed) for line in self.roofline],
            "mesh": self.mesh,
            "layers": list(self._layer_dicts()),
            "pools": list(self._pool_dicts()),
            "caveats": list(self.caveats),
            "conventions": list(CONVENTIONS),
            "excluded": list(EXCLUDED),
        }

    def _traffic(self) -> dict[str, Any]:
        """Bytes of parameters that a step on the batch reads once, and that its update writes."""
        elements = {name: dict.fromkeys(("read", "written"), 0) for name in ACCESS}
        for row in self.params:
            width = row.numel // row.shape[0]
            for name, rows in touched(row, self.tokens).items():
                elements[name]["read"] += rows * width * BYTES_PER_ELEMENT[row.dtype]
                elements[name]["written"] += rows * width * update_bytes(row.dtype)[1]
        moved = [(row.numel, *update_bytes(row.dtype)) for row in self.params]
        dense = {"read": sum(n * read for n, read, _ in moved), "written": sum(n * written for n, _, written in moved)}
        return {"tokens": self.tokens, **elements, "dense_update": dense}

    def _pool_dicts(self) -> Iterator[dict[str, Any]]:
        pools = _by([row for row in self.params if row.owner.startswith("pool.")], "owner")
        for path, rows in pools.items():
            yield {
                "path": path,
                "params": sum(row.numel for row in rows),
                "active_params": sum(row.active for row in rows),
                "bytes_read": _bytes_read(rows),
                "kind": rows[0].kind,
                "rows": rows[0].shape[0],
                "rows_per_token": rows[0].active // (rows[0].numel // rows[0].shape[0]),
                "rows_touched": touched(rows[0], self.tokens),
                "layers": sorted(int(reader.split(".")[1]) for reader in rows[0].readers),
                "readers": list(rows[0].readers),
            }

    def _total(self, rows: list[CostRow]) -> int | float:
        return per_token(sum(_flops(rows)), self.tokens)

    def _flops_dict(self, rows: Iterable[CostRow], *, executed: bool) -> dict[str, int | float]:
        forward, backward = _flops(list(rows), executed=executed)
        return {
            "forward": per_token(forward, self.tokens),
            "backward": per_token(backward, self.tokens),
            "total": per_token(forward + backward, self.tokens),
        }

    def _layer_dicts(self) -> Iterator[dict[str, Any]]:
        """Layers in order. A shared pool is in no layer; it is in the totals, once."""
        params, costs, pools = defaultdict(list), defaultdict(list), defaultdict(set)
        for row in self.params:
            params[_block_path(row.path)].append(row)
            if row.owner.startswith("pool."):
                for reader in row.readers:
                    pools[reader].add(row.owner)
        for cost_row in self.rows:
            costs[cost_row.path].append(cost_row)
        for idx, paths in enumerate(self.layers):
            norms = (f"layers.{idx}.mixer_norm", f"layers.{idx}.block_norm")
            inside = [row for path in (*norms, *paths) for row in params[path]]
            yield {
                "idx": idx,
                "params": sum(row.numel for row in inside),
                "active_params": sum(row.active for row in inside),
                "bytes_read": _bytes_read(inside),
                "flops_per_token": self._flops_dict([r for p in paths for r in costs[p]], executed=False),
                "blocks": [self._block_dict(p, params[p], costs[p], pools[p]) for p in paths],
            }

    def _block_dict(self, path: str, params: list[ParamRow], costs: list[CostRow], pools: set[str]) -> dict[str, Any]:
        return {
            "path": path,
            "kind": costs[0].kind,
            "params": sum(row.numel for row in params),
            "active_params": sum(row.active for row in params),
            "bytes_read": _bytes_read(params),
            "reads": sorted(pools),
            "flops_per_token": self._flops_dict(costs, executed=False),
            "ops": {row.cost.op: self._flops_dict([row], executed=False) for row in costs},
        }


def _block_path(param_path: str) -> str:
    """layers.3.memory for layers.3.memory.pool.values."""
    return ".".join(param_path.split(".")[:3])


def estimate(
    plan: ModelPlan,
    *,
    batch: int = 1,
    seq_len: int | None = None,
    mesh: Mesh | None = None,
    pools: SplitChoice = "auto",
    devices: Iterable[Device] = tuple(DEVICES.values()),
    update: PoolUpdate = LAZY,
    dropout: bool = False,
) -> CostReport:
    """The cost of one step on `batch` sequences of `seq_len` tokens (by default the model's longest).

    Roofline times are given for each of `devices`, the share of one rank for `mesh`, where each rank has `batch`
    sequences and `pools` are shared out so. `update` says how pools are updated.
    Raises UsageError when seq_len is not in 1..max_seq_len, batch is not positive, or the model does not fit the mesh.
    """
    t = plan.max_seq_len if seq_len is None else seq_len
    if not 1 <= t <= plan.max_seq_len:
        raise UsageError(f"the sequence length must be 1 to {plan.max_seq_len} (model.max_seq_len), got {t}")
    if not 1 <= batch <= MAX_BATCH:
        raise UsageError(f"the batch must be 1 to {MAX_BATCH:,} sequences, got {batch}")
    rows = []
    for idx, layer in enumerate(plan.layers):
        for part in layer.parts:
            rows += [CostRow(part.path, part.kind, idx, cost) for cost in part.costs(batch, t)]
    head = matmul_cost("head", batch * t, plan.dim, plan.vocab_size)
    rows.append(CostRow("head", "head", None, head))
    paths = tuple(tuple(part.path for part in layer.parts) for layer in plan.layers)
    everything = sum(row.numel * sum(update_bytes(row.dtype)) for row in plan.params)
    at_rest = sum(
        (row.shape[0] - touched(row, batch * t)["uniform"]) * (row.numel // row.shape[0]) * sum(update_bytes(row.dtype))
        for row in plan.params
        if updated_by_rows(row, update)
    )
    lines = [roofline(((r.kind, r.cost) for r in rows), everything - at_rest, everything, device) for device in devices]
    of_rank = partial(per_rank, plan, batch=batch, seq_len=t, pools=pools, update=update, dropout=dropout)
    return CostReport(
        model_hash=plan.model_hash,
        batch=batch,
        seq_len=t,
        rows=tuple(rows),
        params=plan.params,
        layers=paths,
        caveats=plan.caveats(),
        memory=step_memory(plan, batch, t, update=update),
        roofline=tuple(lines),
        mesh=None if mesh is None else of_rank(mesh, computing=lines),
    )


def touched(row: ParamRow, tokens: int) -> dict[str, int]:
    """Entries of dimension 0 that a batch is expected to read, by how likely each is to be read."""
    if not row.reads or any(read.whole_per_batch for read in row.reads):
        return dict.fromkeys(ACCESS, row.shape[0])
    return {name: expected(row.reads, tokens, row.shape[0]) for name, expected in ACCESS.items()}


def per_token(total: int, tokens: int) -> int | float:
    """`total` over `tokens`, an integer where it divides."""
    return as_number(Fraction(total, tokens))


def as_number(value: Fraction | int) -> int | float:
    """The integer that a value is, or the float nearest to it."""
    return value.numerator if value.denominator == 1 else float(value)


def _flops(rows: Iterable[CostRow], *, executed: bool = False) -> tuple[int, int]:
    pairs = [(row.cost.forward, row.cost.backward) if executed else row.cost.counted for row in rows]
    return sum(f for f, _ in pairs), sum(b for _, b in pairs)


def _bytes_read(rows: Iterable[ParamRow]) -> int:
    """Bytes of parameters that one token reads."""
    return sum(row.active * BYTES_PER_ELEMENT[row.dtype] for row in rows)


def _by(rows: Iterable[Any], key: str) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        groups[getattr(row, key)].append(row)
    return dict(groups)
