"""What one key of a spec says, where it came from, what depends on it, and what one step of it would change."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo

from memforge.cost import AXES, as_number, estimate
from memforge.errors import KeyPath, SpecError, dotted
from memforge.plan import ModelPlan, make_model_plan
from memforge.spec import Spec, with_values
from memforge.spec.keys import field_of, find_key, plain_value, value_of

OPTION = "KEY"
# What a number of each name counts; plug-ins may add fields that are not here.
UNITS = {
    "dim": "elements", "hidden_dim": "elements", "key_dim": "elements", "value_dim": "elements",
    "head_dim": "elements", "num_layers": "layers", "vocab_size": "tokens of the vocabulary", "max_seq_len": "tokens",
    "seq_len": "tokens", "num_heads": "heads", "num_kv_heads": "heads", "window": "tokens",
    "rope_theta": "base of the rotary angles", "num_sub_keys": "sub-keys per half; slots are their square",
    "num_experts": "experts", "num_shared_experts": "experts", "capacity_factor": "share of the even load",
    "num_facts": "facts", "num_held_out": "phrasings", "rare_share": "share of the facts",
    "num_unseen": "facts",
    "held_out": "share of the windows", "steps": "optimizer steps", "warmup_steps": "optimizer steps",
    "log_every": "optimizer steps", "every_steps": "optimizer steps", "batch_size": "sequences",
    "learning_rate": "per step", "value_learning_rate": "per step", "weight_decay": "share of the rate",
    "final_rate": "share of the peak rate", "clip_norm": "norm of the gradient", "max_prompts": "prompts or windows",
    "centered": "layers", "stride": "layers", "every": "layers", "from": "layer",
    "top_k": "chosen per head, or experts per token", "micro_batch_size": "sequences",
    "dropout": "share of the elements", "value_weight_decay": "share of the rate", "decay_steps": "optimizer steps",
    "max_skipped": "optimizer steps", "revive_every": "optimizer steps", "checkpoint_every": "optimizer steps",
    "checkpoint_minutes": "minutes", "keep_checkpoints": "checkpoints", "data_workers": "threads",
    "sample_tokens": "tokens", "sample_temperature": "times that of the model", "dp_replicate": "ranks",
    "dp_shard": "ranks", "memory": "ranks", "timeout_minutes": "minutes", "params": "largest |ratio - 1|",
    "active_params": "largest |ratio - 1|", "flops": "largest |ratio - 1|", "bytes": "largest |ratio - 1|",
}  # fmt: skip
# A step of a number that is not whole.
REAL_STEP = 1.01


@dataclass(frozen=True)
class Effect:
    """The model with another value at some places: each axis of the ledger, as it is and as it would be."""

    place: str
    value: Any
    axes: dict[str, tuple[int | float, int | float]]


@dataclass(frozen=True)
class Explanation:
    """`places`: each place of the key with its value and origin; `parameters` and `ops`: those that follow it.

    `of_model`: whether it is about the model at all, and not data, training or a claim.
    """

    key: str
    meaning: str
    allowed: str
    unit: str | None
    places: tuple[tuple[str, Any, str], ...]
    effects: tuple[Effect, ...]
    of_model: bool
    parameters: tuple[str, ...]
    ops: tuple[str, ...]


def explain(spec: Spec, name: str, seq_len: int) -> Explanation:
    """Everything about the key called `name`. Raises SpecError, positioned in the name, where there is none."""
    key = find_key(spec, name, OPTION)
    place = key.places[0]
    field = field_of(spec, place)
    now = make_model_plan(spec)
    effects, parameters, ops = [], set[str](), set[str]()
    values = key.values(spec)
    # Places of one value change together, others one by one.
    groups = [key.places] if all(value == values[0] for value in values) else [(p,) for p in key.places]
    for places in groups:
        tried = 0
        for value in _steps(value_of(spec, places[0]), field):
            try:
                changed = make_model_plan(with_values(spec, dict.fromkeys(places, value)))
            except SpecError:
                continue
            if not tried or isinstance(value, str | bool):
                effects.append(Effect(", ".join(map(dotted, places)), value, _axes(now, changed, seq_len)))
                parameters |= _parameters(now, changed)
                ops |= _ops(now, changed, seq_len)
            tried += 1
    return Explanation(
        key=key.name,
        meaning=(field.description if field else None) or "",
        allowed=_allowed(field),
        unit=UNITS.get(str(place[-1])) if _is_number(field) else None,
        places=tuple((dotted(p), plain_value(value_of(spec, p)), origin(spec, p)) for p in key.places),
        effects=tuple(effects),
        of_model=place[0] not in ("data", "train", "parallel", "eval", "parity"),
        parameters=_folded(parameters),
        ops=_folded(ops),
    )


def origin(spec: Spec, path: KeyPath) -> str:
    """Where a value comes from: file:line:column, --set, or the default."""
    document = spec._document
    for cut in range(len(path), 0, -1):
        span = document.spans.get(path[:cut])
        if span is None:
            continue
        if cut < len(path) and not _given(document.values, path):
            break
        where = span.position(at_key=cut < len(path))
        if span.source.path is None:
            return f"--set {span.source.lines[where.line - 1].strip()}"
        return f"{where}" + ("" if span.source.name == document.source.name else " (extended)")
    return "default"


def _given(values: Any, path: KeyPath) -> bool:
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _steps(value: Any, field: FieldInfo | None) -> Iterator[Any]:
    """Other values, nearest first: a number one step up or down, the other words of a choice."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        # Where one more does not divide, the next that does.
        yield from dict.fromkeys((value + 1, value + 2, value + 4, value * 2, value - 1, value // 2))
    elif isinstance(value, float):
        yield value * REAL_STEP
    elif isinstance(value, str) and field is not None:
        yield from (word for word in _words(field.annotation) if word != value)


def _words(annotation: Any) -> Iterator[str]:
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        elif get_args(part):
            yield from _words(part)


def _allowed(field: FieldInfo | None) -> str:
    if field is None:
        return ""
    words = [f'"{word}"' for word in _words(field.annotation)]
    low = next((m.ge for m in field.metadata if getattr(m, "ge", None) is not None), None)
    high = next((m.le for m in field.metadata if getattr(m, "le", None) is not None), None)
    bounds = f"{low:,} to {high:,}" if low is not None and high is not None else ""
    return " | ".join([*words, *([bounds] if bounds else [])])


def _is_number(field: FieldInfo | None) -> bool:
    return field is not None and ("int" in str(field.annotation) or "float" in str(field.annotation))


def _axes(now: ModelPlan, changed: ModelPlan, seq_len: int) -> dict[str, tuple[int | float, int | float]]:
    length = min(seq_len, now.max_seq_len, changed.max_seq_len)
    before, after = (estimate(plan, seq_len=length, devices=()).exact_axes() for plan in (now, changed))
    return {axis: (as_number(before[axis]), as_number(after[axis])) for axis in AXES}


def _parameters(now: ModelPlan, changed: ModelPlan) -> set[str]:
    """Parameters that one of the plans has and the other has not, or not in this shape, type or start."""
    before, after = ({row.path: (row.shape, row.dtype, row.init) for row in plan.params} for plan in (now, changed))
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def _ops(now: ModelPlan, changed: ModelPlan, seq_len: int) -> set[str]:
    length = min(seq_len, now.max_seq_len, changed.max_seq_len)
    before, after = (
        {
            f"{row.path}.{row.cost.op}".replace("head.head", "head"): row.cost
            for row in estimate(plan, seq_len=length, devices=()).rows
        }
        for plan in (now, changed)
    )
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def _folded(paths: set[str]) -> tuple[str, ...]:
    """layers.0.ffn.w1, layers.1.ffn.w1 as layers.{0-1}.ffn.w1."""
    layers: dict[tuple[str, str], list[int]] = {}
    single = []
    for path in paths:
        if found := re.fullmatch(r"layers\.(\d+)\.(.+)", path):
            layers.setdefault(("layers", found[2]), []).append(int(found[1]))
        else:
            single.append(path)
    folded = [f"{head}.{{{_ranges(sorted(indices))}}}.{rest}" for (head, rest), indices in layers.items()]
    return (*sorted(single), *sorted(folded))


def _ranges(indices: list[int]) -> str:
    runs: list[list[int]] = []
    for idx in indices:
        if runs and idx == runs[-1][1] + 1:
            runs[-1][1] = idx
        else:
            runs.append([idx, idx])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)
