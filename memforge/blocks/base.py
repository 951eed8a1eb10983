"""What every block kind is made of, free of torch: what the spec says, what the plan holds, what it costs.

Dimension letters, for the whole project: b batch, t tokens in a sequence, n flat tokens (b*t), d model, h heads,
k selected per head, s sub-keys per half, m = s*s slots, q key width, v value width, e experts, f hidden,
l layers, c vocabulary.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from memforge.errors import KeyPath, Problem

# Bounds keep every product of sizes an exact integer that a report can hold, and refuse specs by arithmetic
# long before anything is allocated.
Dim = Annotated[int, Field(ge=1, le=2**17)]
Count = Annotated[int, Field(ge=1, le=2**20)]
DType = Literal["float32", "bfloat16", "float16"]
BYTES_PER_ELEMENT: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class SpecModel(BaseModel):
    """A table of the spec: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class PlanModel(BaseModel):
    """A record of the plan: complete, immutable, JSON in and out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Init(PlanModel):
    """How a parameter starts: normal(std = scale), uniform(+-scale), the constant `scale`, or on a sphere.

    On a sphere every `width` elements have a random direction and this root mean square.
    """

    kind: Literal["normal", "uniform", "constant", "sphere"]
    scale: float
    width: int = 1


def normal(std: float) -> Init:
    return Init(kind="normal", scale=std)


def uniform(bound: float) -> Init:
    return Init(kind="uniform", scale=bound)


def sphere(rms: float, width: int) -> Init:
    return Init(kind="sphere", scale=rms, width=width)


def constant(value: float) -> Init:
    return Init(kind="constant", scale=value)


class RowReads(PlanModel):
    """How one token reads a table: `draws` independent choices of `rows` distinct entries of dimension 0.

    `whole_per_batch`: a batch reads every entry, however few of them one token reads.
    """

    draws: int
    rows: int
    whole_per_batch: bool = False


@dataclass(frozen=True)
class Param:
    """A parameter a block owns, named relative to the block. `reads` says how a token reads it (None: all of it)."""

    name: str
    shape: tuple[int, ...]
    init: Init
    group: Literal["dense", "values"] = "dense"
    decay: bool = True
    dtype: DType = "float32"
    reads: RowReads | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def linear(name: str, in_dim: int, out_dim: int, init: Init, *, bias: Init | None = None) -> tuple[Param, ...]:
    """Rows of an nn.Linear: weight [out, in] and, if `bias` says how it starts, bias [out]."""
    weight = Param(f"{name}.weight", (out_dim, in_dim), init)
    return (weight,) if bias is None else (weight, Param(f"{name}.bias", (out_dim,), bias, decay=False))


def norm(name: str, dim: int) -> Param:
    """The gain of an RMSNorm."""
    return Param(f"{name}.weight", (dim,), constant(1.0), decay=False)


@dataclass(frozen=True)
class Traffic:
    """Elements that an op must move over a whole batch, forward and backward; what is inside an op is not moved.

    `weights` are parameters, in their stored type (`dtype`; None: the type of the computation); `activations` all else.
    """

    weights: int
    activations: int
    backward_weights: int
    backward_activations: int
    dtype: DType | None = None


# What sets the pace of an op on a real machine, with what its `shape` holds.
# matmul: rows, in, out, matrices; attention: sequences, tokens, heads, head width; scoring: tokens, heads, sub-keys,
# query width, chosen; rows: tokens, rows each, width, rows of the table.
Engine = Literal["matmul", "attention", "scoring", "rows"]


@dataclass(frozen=True)
class OpCost:
    """FLOPs of one op over a whole batch; a multiply-add is 2.

    `forward` and `backward` are those executed: the op as implemented, attention as full matrix products, which is
    what torch's counter sees on meta. `counted` is the model's FLOPs by convention: causal attention at half, scoring
    backward over the selected rows, no padding.
    """

    op: str
    forward: int
    backward: int
    counted_forward: int | None = None
    counted_backward: int | None = None
    traffic: Traffic = Traffic(0, 0, 0, 0)
    engine: Engine = "matmul"
    shape: tuple[int, ...] = ()

    @property
    def counted(self) -> tuple[int, int]:
        forward = self.forward if self.counted_forward is None else self.counted_forward
        backward = self.backward if self.counted_backward is None else self.counted_backward
        return forward, backward


def matmul_cost(op: str, n: int, in_dim: int, out_dim: int, *, num_matrices: int = 1) -> OpCost:
    """A linear map of n rows: forward 2*n*in*out, and as much again for each of its two gradients.

    The rows may be shared out among `num_matrices`, of which at most one for each row is read.
    """
    forward, weights, rows = 2 * n * in_dim * out_dim, min(num_matrices, n) * in_dim * out_dim, n * (in_dim + out_dim)
    # Backward reads the weights and writes their gradient; each of the two products reads or writes every row.
    moved = Traffic(weights, rows, 2 * weights, 2 * rows)
    return OpCost(op, forward, 2 * forward, traffic=moved, shape=(n, in_dim, out_dim, num_matrices))


def rows_cost(op: str, n: int, rows: int, width: int, num_rows: int, dtype: DType) -> OpCost:
    """An op that reads `rows` rows of a table for each of n tokens: a weighted sum of them, or a product with each.

    At least every row that is read moves once, as do a slot and a weight for each read and one vector per token;
    backward reads rows and vectors again and writes the gradient of both.
    """
    forward, pointers = 2 * n * rows * width, 3 * n * rows  # an int64 slot is two fp32 elements
    table, vectors = min(n * rows, num_rows) * width, n * width
    moved = Traffic(table, vectors + pointers, 2 * table, 2 * vectors + pointers, dtype=dtype)
    return OpCost(op, forward, 2 * forward, traffic=moved, engine="rows", shape=(n, rows, width, num_rows))


@dataclass(frozen=True)
class Saved:
    """A tensor that autograd keeps from the forward to the backward pass, training in fp32."""

    what: str
    numel: int
    dtype: Literal["float32", "int64"] = "float32"

    @property
    def bytes(self) -> int:
        return self.numel * (8 if self.dtype == "int64" else 4)


def norm_saved(what: str, rows: int, width: int) -> tuple[Saved, ...]:
    """An RMSNorm keeps its input, one scale per row, and the rows before the gain."""
    return Saved(f"{what} input", rows * width), Saved(f"{what} scale", rows), Saved(f"{what} rows", rows * width)


@dataclass(frozen=True)
class Scratch:
    """Bytes alive at the worst moment of a block's forward and backward pass, beside what it saves; an estimate.

    `kept` are alive at all times and shared by all blocks.
    """

    forward: int = 0
    backward: int = 0
    kept: int = 0


@dataclass(frozen=True)
class TableRead:
    """One read of a table of the block's pool for every token, made through `pools.reader`, by `rows` slots each.

    `same_slots`: those of the read before. `kept`: whether the block keeps what is returned, or anything that is made
    after it, for its backward pass; where it does not, a layer that runs again for that pass ends before.
    """

    op: Literal["weighted_gather", "gather_dot"]
    table: str
    rows: int
    same_slots: bool = False
    kept: bool = True


@dataclass(frozen=True)
class Site:
    """What a block may know of the model around it."""

    dim: int
    num_layers: int
    max_seq_len: int
    pools: Mapping[str, Any] = field(default_factory=dict)


class KindPlan(PlanModel):
    """A block with every number resolved. `path` is its module path and the prefix of its parameters."""

    kind: str
    path: str
    dim: int
    num_layers: int

    def params(self) -> tuple[Param, ...]:
        raise NotImplementedError

    def costs(self, batch: int, seq_len: int) -> tuple[OpCost, ...]:
        """Cost of `batch` sequences of `seq_len` tokens; every op that does multiply-adds is listed."""
        raise NotImplementedError

    def saved(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        """What training keeps for the backward pass, besides the input of the block."""
        raise NotImplementedError

    def chosen(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        """What a layer that runs again for its backward pass keeps of the block, besides the layer's input."""
        return ()

    def scratch(self, batch: int, seq_len: int) -> Scratch:
        return Scratch()

    def factors(self, batch: int, seq_len: int) -> tuple[Saved, ...]:
        """What is kept until the update of the pool's rows: their gradient, in the factors it is made of."""
        return ()

    def pool_path(self) -> str | None:
        """The pool this block reads, if any."""
        return None

    def pool_reads(self) -> RowReads | None:
        """How one token reads the rows of that pool; None: all of them."""
        return None

    def table_reads(self) -> tuple[TableRead, ...]:
        """The reads of the pool's tables in the order they are made."""
        return ()

    def looks_ahead(self) -> str | None:
        """Why a token's output depends on later tokens in training, if it does. Every report repeats it."""
        return None


class KindSpec(SpecModel):
    """What a user writes about a block."""

    kind: str

    def check(self, site: Site) -> Iterator[Problem]:
        """Impossible combinations, with keys relative to this table."""
        yield from ()

    def plan(self, site: Site, path: str) -> KindPlan:
        """Resolve against the model. Called only after `check` yielded nothing."""
        raise NotImplementedError

    def resolved(self, site: Site, path: str, **given: Any) -> dict[str, Any]:
        """The fields of a plan: where it stands, the keys of this table, and `given` in the place of some of them."""
        return {**self.model_dump(), "path": path, "dim": site.dim, "num_layers": site.num_layers, **given}

    def reads(self) -> str | None:
        """The name of the shared pool this block reads, if any."""
        return None

    def own_pool(self) -> "KindSpec | None":
        """The pool this block brings along when it names none."""
        return None


@dataclass(frozen=True)
class Kind:
    """One entry of the registry. `module` is "package.module:Class", imported only when a model is built.

    `examples` are tables as a user would write them, for the contract tests; a pool gives in `reader` a block that
    reads it under the name "example".
    """

    name: str
    role: Literal["mixer", "block", "pool"]
    spec: type[KindSpec]
    plan: type[KindPlan]
    module: str
    examples: tuple[Mapping[str, Any], ...]
    summary: str
    reader: Mapping[str, Any] = field(default_factory=dict)


def unknown(key: KeyPath, what: str, name: str, known: list[str]) -> Problem:
    """A name that is not defined, with the nearest one that is."""
    from difflib import get_close_matches

    close = get_close_matches(name, known, n=1, cutoff=0.5)
    listed = f"known: {', '.join(known)}" if known else f"no {what} is defined"
    hint = f"did you mean `{close[0]}`?" if close else listed
    return Problem(key, f"no {what} named `{name}`", hint, depends=((what, name),))
