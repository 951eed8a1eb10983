"""The built model: shared pools, initialisation, and the memory layer against a naive one."""

from pathlib import Path

import pytest
import torch
from conftest import SMALL, write
from torch import Tensor, nn

from memforge.blocks.base import Init
from memforge.blocks.pools import Pools
from memforge.build import build_model
from memforge.nn.init import CHUNK, draws
from memforge.plan import ModelPlan, make_plan
from memforge.spec import load_spec
from memforge.spec.checks import RESERVED_POOL_NAMES

BLOCK = 'block = {{ kind = "memory", pool = "{}", num_heads = 2, top_k = 4, key_dim = 16, gate = "{}" }}'


def plan_of(path: Path, text: str) -> ModelPlan:
    return make_plan(load_spec(write(path, text))).model


def three_readers(gate: str = "swilu") -> str:
    head, _, _ = SMALL.partition("[[place]]")
    return head + f"[[place]]\nlayers = [0, 1, 3]\n{BLOCK.format('facts', gate)}\n"


def test_three_readers_share_one_storage_and_sum_their_gradients(tmp_path: Path) -> None:
    model = build_model(plan_of(tmp_path / "s.toml", three_readers()), seed=1).double()
    pools = [name for name, _ in model.named_parameters() if name.endswith("values")]
    assert pools == ["pool.facts.values"]
    tokens = torch.arange(24).view(2, 12)
    model(tokens)[0].square().mean().backward()
    shared = model.get_parameter("pool.facts.values")

    # The same model with a pool of its own for each reader; the sum of their gradients is the shared one.
    own = three_readers().replace('pool = "facts"', "num_sub_keys = 8").replace("[pool.facts]\nnum_sub_keys = 8\n", "")
    apart = build_model(plan_of(tmp_path / "o.toml", own), seed=1).double()
    state = {
        name: shared.detach() if name.endswith("values") else model.get_parameter(name).detach()
        for name, _ in apart.named_parameters()
    }
    apart.load_state_dict(state)
    apart(tokens)[0].square().mean().backward()
    grads = [p.grad for name, p in apart.named_parameters() if name.endswith("values")]
    assert len(grads) == 3
    assert torch.allclose(sum(grads), shared.grad, rtol=1e-10, atol=1e-15)


def test_two_pools_and_two_models_do_not_touch_each_other(tmp_path: Path) -> None:
    head, _, tail = SMALL.partition("[[place]]")
    text = head + f"[pool.other]\nnum_sub_keys = 5\n\n[[place]]\nlayers = [1]\n{BLOCK.format('other', 'none')}\n\n"
    plan = plan_of(tmp_path / "two.toml", text + "[[place]]" + tail)
    first, second = build_model(plan, seed=1), build_model(plan, seed=1)
    tokens = torch.arange(8).view(1, 8)
    before = second(tokens)[0]
    with torch.no_grad():
        first.get_parameter("pool.facts.values").zero_()
        first.get_parameter("pool.other.values").add_(1)
    assert torch.equal(second(tokens)[0], before)
    assert not torch.equal(first(tokens)[0], before)
    assert first.get_parameter("pool.other.values").shape == (25, 32)


def test_equal_plans_and_seeds_give_bit_equal_models(small: Path) -> None:
    plan = make_plan(load_spec(small)).model
    one, two, other = (build_model(plan, seed=s).state_dict() for s in (7, 7, 8))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("kind", ["normal", "uniform", "sphere"])
def test_any_slice_is_drawn_alone(kind: str) -> None:
    init = Init(kind=kind, scale=0.5, width=10)
    whole = draws(init, 3, "x", 0, 1000)
    for start, count in ((0, 1), (1, 7), (6, 11), (997, 3)):
        assert torch.equal(draws(init, 3, "x", start, count), whole[start : start + count])
    assert CHUNK % 4 == 0


def test_draws_have_the_distribution_they_name() -> None:
    normal = draws(Init(kind="normal", scale=2.0), 0, "n", 0, 400_000)
    uniform = draws(Init(kind="uniform", scale=2.0), 0, "u", 0, 400_000)
    assert normal.mean().abs() < 0.02
    assert normal.std().sub(2).abs() < 0.01
    assert normal.div(2).pow(4).mean().sub(3).abs() < 0.1
    assert uniform.abs().max() < 2
    assert uniform.std().sub(2 / 3**0.5).abs() < 0.01


def test_keys_on_a_sphere_have_one_length_and_no_direction_in_common(small: Path) -> None:
    plans = [
        make_plan(load_spec(small, overrides=[f"place.0.block.key_init={name}", "pool.facts.num_sub_keys=200"])).model
        for name in ("sphere", "uniform")
    ]
    sphere, uniform = (build_model(plan).layers[0].memory.sub_keys.detach() for plan in plans)
    lengths = sphere.norm(dim=-1)
    assert lengths.sub(lengths.mean()).abs().max() < 1e-6 * lengths.mean()
    assert lengths.square().mean().sqrt() == pytest.approx(float(uniform.square().sum(-1).mean().sqrt()), rel=0.05)
    assert uniform.norm(dim=-1).std() > 0.05 * lengths.mean()
    directions = (sphere / lengths[..., None]).flatten(0, 2)
    # 800 unit vectors in 8 dimensions: their mean is as long as that of so many random ones, 1 / sqrt(800).
    assert directions.mean(dim=0).norm() < 3 / 800**0.5


def naive_memory(block: nn.Module, values: Tensor, x: Tensor) -> Tensor:
    """The memory layer with the full key matrix: every slot scored, no product trick, one token and head at a time."""
    p = dict(block.named_parameters())
    s, half = block.sub_keys.shape[2], block.sub_keys.shape[3]
    out = []
    for token in x:
        query = (p["query.weight"] @ token + p["query.bias"]).view(block.num_heads, 2, half)
        keys = p["sub_keys"]
        if block.query_norm is not None:
            query, keys = block.query_norm(query), block.key_norm(keys)
        y = torch.zeros_like(values[0])
        for head in range(block.num_heads):
            full = torch.stack([torch.cat((keys[head, 0, i], keys[head, 1, j])) for i in range(s) for j in range(s)])
            scores = full @ query[head].flatten()
            best = scores.sort(descending=True).indices[: block.top_k]
            y = y + scores[best].softmax(0) @ values[best]
        if block.gate == "swilu":
            gate = p["w1.weight"] @ token
            y = p["w2.weight"] @ (y * gate * gate.sigmoid())
        if block.gate == "sigmoid":
            y = y * (p["gate_proj.weight"] @ token).sigmoid()
        if block.value_proj is not None:
            y = p["value_proj.weight"] @ y
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("gate", ["none", "sigmoid", "swilu"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("value_dim", [32, 12])
def test_memory_is_what_the_paper_says(tmp_path: Path, gate: str, qk_norm: bool, value_dim: int) -> None:
    text = three_readers(gate).replace("num_sub_keys = 8", f"num_sub_keys = 8\nvalue_dim = {value_dim}")
    text = text.replace(f'gate = "{gate}"', f'gate = "{gate}", qk_norm = {str(qk_norm).lower()}')
    model = build_model(plan_of(tmp_path / "s.toml", text), seed=2).double()
    block, pools = model.get_submodule("layers.1.memory"), Pools(model.pool)
    values = model.get_parameter("pool.facts.values")
    x = torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = [x, values, *block.parameters()]
    ours = block(x, pools)[0]
    grads = torch.autograd.grad(ours.square().sum(), wanted)
    naive = naive_memory(block, values, x[0])[None]
    assert torch.allclose(ours, naive, rtol=1e-10, atol=1e-12)
    for got, expected in zip(grads, torch.autograd.grad(naive.square().sum(), wanted), strict=True):
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-11)


def test_moe_is_the_weighted_sum_of_its_chosen_experts(small: Path) -> None:
    model = build_model(make_plan(load_spec(small)).model, seed=0).double()
    moe = model.get_submodule("layers.3.moe")
    x = torch.randn(1, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y, losses = moe(x, Pools(model.get_submodule("pool")))
    probs = moe.router(x[0]).softmax(-1)
    expected = torch.zeros(9, 32, dtype=torch.float64)
    for i, token in enumerate(x[0]):
        for e in probs[i].topk(2).indices:
            hidden = nn.functional.silu(token @ moe.w1[e]) * (token @ moe.w3[e])
            expected[i] += probs[i, e] * (hidden @ moe.w2[e])
    assert torch.allclose(y[0], expected, rtol=1e-10, atol=1e-12)
    share = torch.bincount(probs.topk(2).indices.flatten(), minlength=4) / 18
    assert losses["load_balance"].item() == pytest.approx(0.01 * 4 * (share * probs.mean(0)).sum().item(), rel=1e-5)
    assert moe.eval()(x, Pools(model.get_submodule("pool")))[1] == {}


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    plan = plan_of(tmp_path / "t.toml", SMALL.replace("dim = 32\n", "dim = 32\ntie_embeddings = true\n"))
    model = build_model(plan)
    assert "head.weight" not in model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == sum(row.numel for row in plan.params)


def test_reserved_pool_names_are_those_of_torch() -> None:
    assert {name for name in dir(nn.ModuleDict()) if not name.startswith("_")} == RESERVED_POOL_NAMES
