"""Two specs side by side: the keys in which they differ, and what follows from them."""

from pathlib import Path
from typing import Any

from memforge.cost import AXES, as_number, estimate
from memforge.errors import dotted
from memforge.plan import make_plan
from memforge.spec import Spec
from memforge.spec.keys import leaves, plain_value, value_of


def differences(first: Spec, second: Spec) -> dict[str, Any]:
    """A record: `names`, `keys` that differ (null: absent there), and, at one length, `axes`, `kinds` and `memory`.

    Lists of rules are compared by their place in the list. Values at their default are values like any other.
    """
    plans = [make_plan(spec) for spec in (first, second)]
    length = min(plan.model.max_seq_len for plan in plans)
    costs = [estimate(plan.model, seq_len=length, devices=(), update=plan.run.pool_update) for plan in plans]
    axes = [cost.exact_axes() for cost in costs]
    records = [cost.as_dict() for cost in costs]
    kinds = dict.fromkeys(kind for r in records for kind in (*r["params"]["by_kind"], *r["flops_per_token"]["by_kind"]))
    return {
        "names": [plan.name for plan in plans],
        "seq_len": length,
        "same_model": plans[0].model.model_hash == plans[1].model.model_hash,
        "keys": _keys(first, second),
        "axes": {axis: [as_number(found[axis]) for found in axes] for axis in AXES},
        "kinds": {
            kind: {
                "params": [r["params"]["by_kind"].get(kind, 0) for r in records],
                "flops": [r["flops_per_token"]["by_kind"].get(kind, 0) for r in records],
            }
            for kind in kinds
        },
        "memory": {what: [r["memory"][what] for r in records] for what in ("peak", "peak_checkpointed", "checkpoint")},
    }


def _keys(first: Spec, second: Spec) -> dict[str, list[Any]]:
    sides = [{dotted(path): plain_value(value_of(spec, path)) for path in leaves(spec)} for spec in (first, second)]
    for side, spec in zip(sides, (first, second), strict=True):
        if spec.baseline_path is not None:  # the same words may lead to different files, and different ones to the same
            side["parity.against"] = str(Path(spec.baseline_path).resolve())
    if sides[0].get("parity.against") != sides[1].get("parity.against"):
        for side, spec in zip(sides, (first, second), strict=True):
            side["parity.against"] = spec.baseline_path
    names = dict.fromkeys([*sides[0], *sides[1]])
    return {name: [side.get(name) for side in sides] for name in names if sides[0].get(name) != sides[1].get(name)}
