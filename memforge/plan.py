"""The plan: a spec resolved into numbers. Nothing after `make_plan` reads the spec.

It has two halves. `ModelPlan` is the architecture: two equal ones and one seed give bit-equal modules. `RunPlan` is
everything about data and training. Both are frozen, complete and JSON in and out.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from memforge.blocks import union_of
from memforge.blocks.base import BYTES_PER_ELEMENT, DType, Init, KindPlan, Param, PlanModel, RowReads, constant, normal
from memforge.errors import StorageError, UsageError
from memforge.mesh import Mesh, PoolReads, Split, SplitChoice
from memforge.spec.checks import selections, site_of
from memforge.spec.schema import (
    NAME,
    Data,
    EvalSpec,
    ParallelSpec,
    ScheduleName,
    Spec,
    ToleranceSpec,
    TrainSpec,
    parts_at,
)

FORMAT_VERSION = 3
Block: Any = union_of("block", "plan")
Mixer: Any = union_of("mixer", "plan")
Pool: Any = union_of("pool", "plan")


class ParamRow(PlanModel):
    """One tensor storage: who owns it, who reads it, how it starts and how it learns.

    `path` is the state-dict key. `reads` is how one token reads it, reader by reader; empty: it reads all of it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: DType
    kind: str
    owner: str
    readers: tuple[str, ...]
    init: Init
    group: Literal["dense", "values"]
    decay: bool
    reads: tuple[RowReads, ...]
    numel: int

    @property
    def active(self) -> int:
        """Elements that one token touches."""
        if not self.reads:
            return self.numel
        rows = sum(read.draws * read.rows for read in self.reads)
        return min(rows * (self.numel // self.shape[0]), self.numel)


class LayerPlan(PlanModel):
    """x = x + mixer(norm(x)), then x = x + the sum of the blocks of norm(x)."""

    mixer: Mixer
    blocks: tuple[Block, ...]

    @property
    def parts(self) -> tuple[KindPlan, ...]:
        """Mixer and blocks in the order they run."""
        return (self.mixer, *self.blocks)


class ModelPlan(PlanModel):
    """The architecture, with every parameter it will have."""

    dim: int
    num_layers: int
    vocab_size: int
    max_seq_len: int
    tie_embeddings: bool
    norm_eps: float
    layers: tuple[LayerPlan, ...]
    pools: tuple[Pool, ...]
    params: tuple[ParamRow, ...]

    @property
    def model_hash(self) -> str:
        """SHA-256 of the canonical JSON, 64 hex digits."""
        return _hash(self)

    def weight_bytes(self) -> int:
        """Bytes of all parameters in the types they are stored in."""
        return sum(row.numel * BYTES_PER_ELEMENT[row.dtype] for row in self.params)

    def caveats(self) -> tuple[str, ...]:
        """What every report says about the model: kinds whose tokens see later ones in training, with their layers."""
        layers: dict[str, list[str]] = {}
        for part in self.sublayers():
            if (reason := part.looks_ahead()) is not None:
                layers.setdefault(reason, []).append(part.path)
        return tuple(
            f"{paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''}: {why}" for why, paths in layers.items()
        )

    def sublayers(self) -> Iterator[KindPlan]:
        """Mixers and blocks in the order they run."""
        for layer in self.layers:
            yield from layer.parts


class TrainPlan(TrainSpec):
    """[train] with its defaults resolved against the model."""

    seq_len: int
    micro_batch_size: int
    value_learning_rate: float
    value_schedule: ScheduleName
    decay_steps: int


@dataclass(frozen=True)
class PoolUpdate:
    """How value pools are updated, as far as it decides what a step holds and moves: keys of [train]."""

    optimizer: str = "adamw"
    rule: str = "lazy"
    rounding: str = "master"

    @property
    def dense(self) -> bool:
        """Whether every row moves in every step, not only those that were read."""
        return self.rule == "dense"


LAZY = PoolUpdate()


class RunPlan(PlanModel):
    """Data, training, ranks and evaluation."""

    data: Data | None
    train: TrainPlan | None
    parallel: ParallelSpec
    eval: EvalSpec

    @property
    def pool_update(self) -> PoolUpdate:
        """How training updates value pools; as by default where the plan has no training."""
        if self.train is None:
            return LAZY
        return PoolUpdate(self.train.value_optimizer, self.train.value_update, self.train.value_rounding)

    @property
    def run_hash(self) -> str:
        return _hash(self)


class ParityPlan(PlanModel):
    """The claim of [parity], with the whole architecture of the baseline."""

    against: str
    name: str
    tolerance: ToleranceSpec
    baseline: ModelPlan


class Plan(PlanModel):
    """A model, a run, and the claim that binds the model to a baseline."""

    name: Annotated[str, Field(pattern=NAME)]
    model: ModelPlan
    run: RunPlan
    parity: ParityPlan | None = None

    def to_json(self) -> str:
        """Text that `plan_from_json` reads back to an equal plan."""
        record = {
            "format_version": FORMAT_VERSION,
            "model_hash": self.model.model_hash,
            "run_hash": self.run.run_hash,
            "plan_hash": _hash(self),
            "plan": self.model_dump(mode="json", by_alias=True),
        }
        return json.dumps(record, indent=1, sort_keys=True) + "\n"


def on_mesh(plan: Plan, mesh: Mesh) -> Plan:
    """The same plan, to be run on another mesh. Raises UsageError for one whose ranks are too many for a pool."""
    require_parts(plan.model, plan.run.parallel.pools, mesh)
    axes = {"dp_replicate": mesh.dp_replicate, "dp_shard": mesh.dp_shard, "memory": mesh.memory}
    run = plan.run.model_copy(update={"parallel": plan.run.parallel.model_copy(update=axes)})
    return plan.model_copy(update={"run": run})


def split_of(plan: ModelPlan, choice: SplitChoice, mesh: Mesh) -> dict[str, Split]:
    """How each pool is shared out among the memory ranks of a mesh, by the path of the pool; `choice` is the key
    parallel.pools. All tables of a pool in one way; by columns those of which a reader does not say how it reads them.
    """
    tables: dict[str, list[ParamRow]] = {}
    for row in plan.params:
        if row.group == "values":
            tables.setdefault(row.owner, []).append(row)
    return {path: _reads_of(rows).split(choice, mesh.memory) for path, rows in tables.items()}


def require_parts(plan: ModelPlan, choice: SplitChoice, mesh: Mesh) -> None:
    """Raises UsageError where a rank of a mesh would have nothing of a pool."""
    splits = split_of(plan, choice, mesh)
    for row in plan.params:
        if row.group != "values" or row.shape[0 if splits[row.owner] == "rows" else -1] >= mesh.memory:
            continue
        parts = {"columns": f"{row.shape[-1]:,} columns", "rows": f"{row.shape[0]:,} rows"}
        few = " and the ".join(parts.values()) if choice == "auto" else parts[choice]
        raise UsageError(f"--mesh: memory={mesh.memory} is more than the {few} of {row.path}")


def _reads_of(tables: list[ParamRow]) -> PoolReads:
    reads = tuple(read.draws * read.rows for read in tables[0].reads)
    return PoolReads(min(row.shape[0] for row in tables), tuple(row.shape[-1] for row in tables), reads)


def plan_from_json(text: str, origin: str) -> Plan:
    """The plan that `Plan.to_json` wrote. Raises StorageError when it is damaged or of another format."""
    try:
        record = json.loads(text)
        version = record["format_version"]
        if version != FORMAT_VERSION:
            raise StorageError(f"{origin}: plan format {version}; this memforge reads {FORMAT_VERSION}")
        plan = Plan.model_validate_json(json.dumps(record["plan"]))
        recorded = record["plan_hash"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        kind = "does not hold a plan" if isinstance(error, ValidationError) else "is not valid JSON"
        raise StorageError(f"{origin}: the file {kind}") from None
    if recorded != _hash(plan) or text != plan.to_json():
        raise StorageError(f"{origin}: the plan was changed after it was written (its hash does not match)")
    return plan


def read_plan(path: Path) -> Plan:
    """The plan in a file. Raises StorageError when it is absent or damaged."""
    try:
        return plan_from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def make_plan(spec: Spec) -> Plan:
    """Resolve a valid spec: layers in order, pools with their readers, one row per parameter."""
    parity = None
    if spec.parity is not None:
        assert spec.baseline is not None, "load_spec resolves the baseline"
        parity = ParityPlan(
            against=spec.parity.against,
            name=spec.baseline.model.name,
            tolerance=spec.parity.tolerance,
            baseline=make_model_plan(spec.baseline),
        )
    run = RunPlan(data=spec.data, train=_train_plan(spec), parallel=spec.parallel, eval=spec.eval)
    return Plan(name=spec.model.name, model=make_model_plan(spec), run=run, parity=parity)


def _train_plan(spec: Spec) -> TrainPlan | None:
    if spec.train is None:
        return None
    given = spec.train.model_dump()
    given["seq_len"] = given["seq_len"] or spec.model.max_seq_len
    defaults = {
        "micro_batch_size": spec.train.batch_size,
        "value_learning_rate": spec.train.learning_rate,
        "value_schedule": spec.train.schedule,
        "decay_steps": max(1, spec.train.steps // 5),
    }
    given |= {key: default for key, default in defaults.items() if given[key] is None}
    return TrainPlan.model_validate(given)


def make_model_plan(spec: Spec) -> ModelPlan:
    site = site_of(spec)
    selected, problems = selections(spec)
    assert not problems, "load_spec refuses layers outside the model"
    pools: dict[str, KindPlan] = {f"pool.{name}": pool.plan(site, f"pool.{name}") for name, pool in spec.pool.items()}

    layers = []
    for idx in range(spec.model.num_layers):
        block_spec, added, mixer = parts_at(spec, idx, selected)
        blocks = [part for part in (block_spec, added) if part is not None]
        for block in blocks:
            path = f"layers.{idx}.{block.kind}.pool"
            if (own := block.own_pool()) is not None:
                pools[path] = own.plan(site, path)
        planned = tuple(block.plan(site, f"layers.{idx}.{block.kind}") for block in blocks)
        layers.append(LayerPlan(mixer=mixer.plan(site, f"layers.{idx}.{mixer.kind}"), blocks=planned))
    return ModelPlan(
        dim=spec.model.dim,
        num_layers=spec.model.num_layers,
        vocab_size=spec.model.vocab_size,
        max_seq_len=spec.model.max_seq_len,
        tie_embeddings=spec.model.tie_embeddings,
        norm_eps=spec.model.norm_eps,
        layers=tuple(layers),
        pools=tuple(pools.values()),
        params=tuple(_param_rows(spec, layers, pools)),
    )


def _param_rows(spec: Spec, layers: list[LayerPlan], pools: dict[str, KindPlan]) -> Iterator[ParamRow]:
    """Rows in the order the modules hold them: embedding, shared pools, layers, final norm, head."""
    dim, vocab, tied = spec.model.dim, spec.model.vocab_size, spec.model.tie_embeddings
    readers: dict[str, list[KindPlan]] = {path: [] for path in pools}
    for layer in layers:
        for reader in layer.blocks:
            if (path := reader.pool_path()) is not None:
                readers[path].append(reader)

    def gain(owner: str, reader: str) -> ParamRow:
        return _row(owner, Param("weight", (dim,), constant(1.0), decay=False), "norm", (reader,))

    table = Param("weight", (vocab, dim), normal(dim**-0.5), reads=None if tied else RowReads(draws=1, rows=1))
    yield _row("embedding", table, "embedding", ("embedding", "head") if tied else ("embedding",))
    for path, pool in pools.items():
        if path.startswith("pool."):
            yield from _pool_rows(pool, readers[path])
    for idx, layer in enumerate(layers):
        yield gain(f"layers.{idx}.mixer_norm", f"layers.{idx}")
        yield from _block_rows(layer.mixer)
        yield gain(f"layers.{idx}.block_norm", f"layers.{idx}")
        for block in layer.blocks:
            yield from _block_rows(block)
            if (own := block.pool_path()) is not None and own.startswith(block.path):
                yield from _pool_rows(pools[own], readers[own])
    yield gain("norm", "norm")
    if not tied:
        yield _row("head", Param("weight", (vocab, dim), normal(dim**-0.5)), "head", ("head",))


def _block_rows(block: KindPlan) -> Iterator[ParamRow]:
    for p in block.params():
        yield _row(block.path, p, block.kind, (block.path,))


def _pool_rows(pool: KindPlan, readers: list[KindPlan]) -> Iterator[ParamRow]:
    """A pool counts as the kind that reads it; a token touches the rows that all its readers read."""
    kind = readers[0].kind if readers else pool.kind
    given = [reader.pool_reads() for reader in readers]
    reads = [read for read in given if read is not None]
    for p in pool.params():
        row = _row(pool.path, p, kind, tuple(reader.path for reader in readers))
        yield row.model_copy(update={"reads": tuple(reads) if len(reads) == len(given) else ()})


def _row(owner: str, p: Param, kind: str, readers: tuple[str, ...]) -> ParamRow:
    return ParamRow(
        path=f"{owner}.{p.name}",
        shape=p.shape,
        dtype=p.dtype,
        kind=kind,
        owner=owner,
        readers=readers,
        init=p.init,
        group=p.group,
        decay=p.decay,
        reads=() if p.reads is None else (p.reads,),
        numel=p.numel,
    )


def _hash(record: PlanModel) -> str:
    text = json.dumps(record.model_dump(mode="json", by_alias=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
