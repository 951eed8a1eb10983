"""Two hundred random models: parameters, executed FLOPs and kept activations equal those of the built model."""

import random
from typing import Any

import pytest

from memforge.blocks import registry
from memforge.build import build_model
from memforge.cost import estimate
from memforge.plan import Plan, make_plan, plan_from_json
from memforge.profile.counter import count_flops
from memforge.profile.live import kept_bytes
from memforge.spec.checks import check
from memforge.spec.schema import Spec

TRIALS = 200


def pick(r: random.Random, table: dict[str, Any], optional: dict[str, list[Any]]) -> dict[str, Any]:
    """The table with each optional key present half of the time."""
    return table | {key: r.choice(values) for key, values in optional.items() if r.random() < 0.5}


def product_keys(
    r: random.Random, kind: str, pool: str | None, own_sub_keys: int, sizes: dict[str, int]
) -> dict[str, Any]:
    sub_keys = own_sub_keys if pool is None else sizes[pool]
    where: dict[str, Any] = {"num_sub_keys": sub_keys} if pool is None else {"pool": pool}
    table = {
        "kind": kind,
        "num_heads": r.randint(1, 4),
        "top_k": r.randint(2, sub_keys),
        "key_dim": 2 * r.randint(1, 9),
    }
    optional: dict[str, list[Any]] = {"qk_norm": [True, False]}
    if kind == "memory":
        optional["gate"] = ["none", "sigmoid", "swilu"]
        optional |= {"value_dim": ["model", 7, 40]} if pool is None else {}
    else:
        optional["activation"] = ["gelu", "relu", "silu"]
    return pick(r, table | where, optional)


def moe(r: random.Random) -> dict[str, Any]:
    experts = r.randint(1, 7)
    table = {"kind": "moe", "num_experts": experts, "top_k": r.randint(1, experts), "hidden_dim": r.randint(1, 30)}
    optional = {"activation": ["swiglu", "gelu", "relu2"], "num_shared_experts": [1, 2], "z_loss_coef": [0.01]}
    if r.random() < 0.4:
        return pick(r, table | {"router": "expert_choice"}, optional)
    normal = {"normalize_top_k": [True]} if table["top_k"] > 1 else {}
    return pick(
        r, table, optional | normal | {"capacity_factor": [0.3, 1.0, 1.25, 8.0], "load_balance_coef": [0.0, 1.0]}
    )


def attention(r: random.Random, dim: int) -> dict[str, Any]:
    heads = r.choice([h for h in (1, 2, 3, 4) if dim % (2 * h) == 0])
    scaling = [
        {"kind": "linear", "factor": 2.0},
        {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 8},
        {"kind": "llama3", "original_max_seq_len": 16},
    ]
    kv_heads = [h for h in range(1, heads + 1) if heads % h == 0]
    optional = {"num_kv_heads": kv_heads, "head_dim": [2, 6], "qk_norm": [True], "window": [1, 5, 99]}
    return pick(r, {"num_heads": heads}, optional | {"rope_scaling": scaling, "rope_theta": [100.0, 5e5]})


def random_spec(seed: int) -> Spec:
    """Any of the kinds anywhere, pools shared or owned, blocks replaced or added."""
    r = random.Random(seed)
    dim, layers = r.choice([8, 12, 24, 30]), r.randint(1, 4)
    values: dict[str, Any] = {
        "model": {
            "name": f"random-{seed}",
            "dim": dim,
            "num_layers": layers,
            "vocab_size": r.randint(2, 90),
            "max_seq_len": r.randint(1, 40),
            "tie_embeddings": r.random() < 0.3,
        },
        "attention": attention(r, dim),
        "ffn": pick(r, {"hidden_dim": r.randint(1, 50)}, {"activation": ["swiglu", "gelu", "relu2"]}),
        "place": [],
    }
    sizes = {"facts": r.randint(2, 9), "more": r.randint(2, 6), "neurons": r.randint(2, 9)}
    for idx in range(layers):
        made: list[dict[str, Any] | None] = [
            None,
            moe(r),
            product_keys(r, "memory", r.choice([None, "facts", "more"]), 5, sizes),
            product_keys(r, "peer", r.choice([None, "neurons"]), 4, sizes),
        ]
        block, added = r.sample(made, 2)
        if block is not None:
            values["place"].append({"layers": [idx], "block": block})
        if added is not None and r.random() < 0.5:
            values["place"].append({"layers": [idx], "mode": "add", "block": added})
        if r.random() < 0.3:
            values["place"].append({"layers": [idx], "mixer": {"kind": "attention", **attention(r, dim)}})
    read = {rule["block"].get("pool") for rule in values["place"] if "block" in rule}
    kinds = {"facts": "values", "more": "values", "neurons": "experts"}
    values["pool"] = {
        name: {"kind": kind, "num_sub_keys": sizes[name], "dtype": r.choice(["float32", "bfloat16"])}
        for name, kind in kinds.items()
        if name in read
    }
    spec = Spec.model_validate(values)
    assert not list(check(spec)), (seed, list(check(spec)))
    return spec


def is_exact(plan: Plan, batch: int, seq_len: int) -> bool:
    report = estimate(plan.model, batch=batch, seq_len=seq_len)
    model = build_model(plan.model, device="meta")
    return (
        plan_from_json(plan.to_json(), "plan") == plan
        and {(n, tuple(p.shape)) for n, p in model.named_parameters()}
        == {(row.path, row.shape) for row in plan.model.params}
        and sum(p.numel() for p in model.parameters()) == report.axes()["params"]
        and count_flops(plan.model, batch, seq_len) == report.flops(executed=True)
        and kept_bytes(build_model(plan.model).train(), batch, seq_len) == report.memory.activations
    )


def test_the_ledger_is_exact_for_random_models(capsys: pytest.CaptureFixture[str]) -> None:
    exact, failed, kinds = 0, [], set()
    for seed in range(TRIALS):
        plan, r = make_plan(random_spec(seed)), random.Random(f"shape of {seed}")
        shape = r.randint(1, 3), r.randint(1, plan.model.max_seq_len)
        kinds |= {part.kind for part in plan.model.sublayers()} | {pool.kind for pool in plan.model.pools}
        if is_exact(plan, *shape):
            exact += 1
        else:
            failed.append((seed, shape))
    with capsys.disabled():
        print(f"\nrandom models with an exact ledger: {exact}/{TRIALS}")
    assert failed == []
    assert kinds >= {kind.name for kind in registry().values() if kind.module.startswith("memforge.")}
