"""What every registered kind must satisfy; a new kind is covered the moment it is registered."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from memforge.blocks import registry
from memforge.blocks.base import Kind, KindPlan
from memforge.build import build_model
from memforge.cost import estimate
from memforge.nn.decoder import next_token_loss
from memforge.plan import ModelPlan, make_plan
from memforge.profile.counter import count_flops, require_exact
from memforge.profile.live import kept_bytes
from memforge.spec.schema import Spec

CASES = [(kind, i) for kind in registry().values() for i in range(len(kind.examples))]
each_example = pytest.mark.parametrize(("kind", "i"), CASES, ids=[f"{k.name}-{i}" for k, i in CASES])


def spec_with(kind: Kind, example: dict[str, Any]) -> Spec:
    """A two-layer model whose layer 1 has the example as its mixer, block or pool."""
    values: dict[str, Any] = {
        "model": {"name": "x", "dim": 32, "num_layers": 2, "vocab_size": 64, "max_seq_len": 16},
        "attention": {"num_heads": 2},
        "ffn": {"hidden_dim": 16},
    }
    if kind.role == "pool":
        values["pool"] = {"example": {"kind": kind.name, **example}}
        values["place"] = [{"layers": [1], "block": dict(kind.reader)}]
    else:
        values["place"] = [{"layers": [1], kind.role: {"kind": kind.name, **example}}]
    return Spec.model_validate(values)


def plan_with(kind: Kind, i: int) -> ModelPlan:
    return make_plan(spec_with(kind, dict(kind.examples[i]))).model


def part_of(plan: ModelPlan, kind: Kind) -> KindPlan:
    layer = plan.layers[1]
    return plan.pools[0] if kind.role == "pool" else (layer.mixer if kind.role == "mixer" else layer.blocks[0])


@each_example
def test_rows_are_the_named_parameters_and_flops_are_the_counters(kind: Kind, i: int) -> None:
    require_exact(plan_with(kind, i))


@each_example
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 1), (3, 7)])
def test_flops_at_odd_shapes(kind: Kind, i: int, batch: int, seq_len: int) -> None:
    plan = plan_with(kind, i)
    assert estimate(plan, batch=batch, seq_len=seq_len).flops(executed=True) == count_flops(plan, batch, seq_len)


@each_example
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 5), (3, 7)])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_kept_activations_are_those_of_the_ledger(
    kind: Kind, i: int, batch: int, seq_len: int, checkpointed: bool
) -> None:
    plan = plan_with(kind, i)
    model = build_model(plan).train()
    model.checkpoint_layers = checkpointed
    memory = estimate(plan, batch=batch, seq_len=seq_len).memory
    assert kept_bytes(model, batch, seq_len) == (
        memory.activations_checkpointed if checkpointed else memory.activations
    )


@each_example
def test_checkpointed_layers_have_the_same_gradients(kind: Kind, i: int) -> None:
    grads = []
    for checkpointed in (False, True):
        model = build_model(plan_with(kind, i), seed=3).train()
        model.checkpoint_layers = checkpointed
        loss, extra = next_token_loss(model, torch.arange(22).view(2, 11))
        (loss + sum(extra.values())).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(kept, replayed) for kept, replayed in zip(*grads, strict=True))


@each_example
def test_specs_and_plans_round_trip(kind: Kind, i: int) -> None:
    spec = kind.spec.model_validate(dict(kind.examples[i]))
    assert kind.spec.model_validate(spec.model_dump(by_alias=True)) == spec
    part = part_of(plan_with(kind, i), kind)
    assert part.kind == kind.name
    assert TypeAdapter(kind.plan).validate_json(part.model_dump_json()) == part


@each_example
def test_every_parameter_learns_and_nothing_looks_ahead(kind: Kind, i: int) -> None:
    model = build_model(plan_with(kind, i), seed=3).double()
    tokens = torch.arange(20).view(2, 10) * 3 % 64
    logits, losses = model(tokens)
    (logits.square().mean() + sum(losses.values())).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # One expert is always chosen with probability one, so its router has nothing to learn.
    assert [name for name in silent if not (name.endswith("router.weight") and p_rows(model, name) == 1)] == []
    changed = tokens.clone()
    changed[:, 6:] += 1
    with torch.no_grad():
        before, after = model.eval()(tokens)[0], model(changed)[0]
    assert torch.allclose(before[:, :6], after[:, :6], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@each_example
def test_what_looks_ahead_in_training_says_so(kind: Kind, i: int) -> None:
    plan = plan_with(kind, i)
    model = build_model(plan, seed=3).double().train()
    tokens = torch.arange(14).view(1, 14) * 3 % 64
    # Later tokens that differ a lot: what an expert prefers among all of them changes what is left for earlier ones.
    changed = torch.cat((tokens[:, :6], (tokens[:, 6:] * 7 + 5) % 64), dim=1)
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    same = torch.allclose(before[:, :6], after[:, :6], rtol=0, atol=1e-12)
    assert same == (part_of(plan, kind).looks_ahead() is None)


def p_rows(model: torch.nn.Module, name: str) -> int:
    return model.get_parameter(name).shape[0]


@each_example
def test_compiles_whole_and_agrees_with_eager(kind: Kind, i: int) -> None:
    model = build_model(plan_with(kind, i), seed=1)
    tokens = torch.arange(16).view(2, 8)
    for training in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(model.train(training), fullgraph=True, backend="aot_eager")
        results = []
        for run in (compiled, model):
            model.zero_grad()
            logits, losses = run(tokens)
            (logits.square().mean() + sum(losses.values())).backward()
            results.append([logits, *losses.values(), *(p.grad for p in model.parameters())])
        assert all(torch.equal(ours, eager) for ours, eager in zip(*results, strict=True))


@pytest.mark.parametrize("kind", registry().values(), ids=lambda k: k.name)
def test_the_spec_of_a_kind_is_free_of_torch(kind: Kind) -> None:
    code = f"import sys; import {kind.spec.__module__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
