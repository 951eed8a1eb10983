"""Blocks against deliberately naive versions of themselves, in float64, gradients included."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memforge.blocks import load_module, registry
from memforge.blocks.attention.module import rotary_angles
from memforge.blocks.attention.spec import Llama3Scaling, YarnScaling
from memforge.blocks.base import KindPlan, Site
from memforge.blocks.pools import Pools

DIM = 12
NO_POOLS = Pools(nn.ModuleDict())


def block_of(kind: str, **given: Any) -> tuple[nn.Module, KindPlan]:
    """A block (or mixer) of a model of width 12, with weights of unit scale, in float64."""
    entry, site = registry()[kind], Site(DIM, 2, 64)
    spec = entry.spec.model_validate({"kind": kind, **given})
    assert not list(spec.check(site))
    plan = spec.plan(site, f"layers.0.{kind}")
    args: list[object] = [1e-5]
    if (own := spec.own_pool()) is not None:
        args.append(load_module(registry()[own.kind])(own.plan(site, "layers.0.pool")))
    module = load_module(entry)(plan, *args).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.shape[-1] ** -0.5)
    return module, plan


def tokens(*shape: int) -> Tensor:
    x = torch.randn(*shape, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_()


def assert_same(ours: Tensor, naive: Tensor, leaves: list[Tensor]) -> None:
    assert torch.allclose(ours, naive, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True) for out in (ours, naive)]
    for got, expected in zip(*grads, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.allclose(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_peer_scores_every_expert_and_sums_the_best(activation: str, qk_norm: bool) -> None:
    """The full N x n key matrix, one token, head and expert at a time."""
    block, _ = block_of("peer", num_sub_keys=5, num_heads=3, top_k=4, key_dim=6, activation=activation, qk_norm=qk_norm)
    x = tokens(1, 7)
    p, act = dict(block.named_parameters()), {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation]
    out = []
    for token in x[0]:
        query, keys = (p["query.weight"] @ token + p["query.bias"]).view(3, 2, 3), p["sub_keys"]
        if qk_norm:
            query, keys = block.query_norm(query), block.key_norm(keys)
        y = torch.zeros_like(token)
        for head in range(3):
            full = torch.stack([torch.cat((keys[head, 0, i], keys[head, 1, j])) for i in range(5) for j in range(5)])
            scores = full @ query[head].flatten()
            best = scores.sort(descending=True).indices[:4]
            for weight, slot in zip(scores[best].softmax(0), best, strict=True):
                y = y + weight * act(p["pool.down"][slot] @ token) * p["pool.up"][slot]
        out.append(y)
    assert_same(block(x, NO_POOLS)[0][0], torch.stack(out), [x, *block.parameters()])


def expert(moe: nn.Module, e: int, token: Tensor) -> Tensor:
    hidden = F.silu(token @ moe.w1[e]) * (token @ moe.w3[e])
    return hidden @ moe.w2[e]


@pytest.mark.parametrize("factor", [0.4, 1.0, 9.0])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_capacity_drops_the_last_tokens_of_a_full_expert(factor: float, top_k: int) -> None:
    block, _ = block_of("moe", num_experts=3, top_k=top_k, hidden_dim=8, capacity_factor=factor)
    x = tokens(1, 10)
    probs = block.router(x[0]).softmax(-1)
    places = [min(math.ceil(factor * 10 * top_k / 3), 10)] * 3
    out, dropped = [], 0
    for i, token in enumerate(x[0]):
        y = torch.zeros_like(token)
        for e in probs[i].topk(top_k).indices.tolist():
            if places[e] > 0:
                places[e] -= 1
                y = y + probs[i, e] * expert(block, e, token)
            else:
                dropped += 1
        out.append(y)
    assert (dropped > 0) == (factor < 1) or factor == 1.0
    assert_same(block.train()(x, NO_POOLS)[0][0], torch.stack(out), [x, *block.parameters()])
    everyone = [
        sum(probs[i, e] * expert(block, e, token) for e in probs[i].topk(top_k).indices) for i, token in enumerate(x[0])
    ]
    assert torch.allclose(block.eval()(x, NO_POOLS)[0][0], torch.stack(everyone), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_choose_their_tokens_in_training_and_tokens_theirs_in_evaluation(top_k: int) -> None:
    block, plan = block_of("moe", num_experts=3, top_k=top_k, hidden_dim=8, router="expert_choice", z_loss_coef=0.1)
    x = tokens(1, 10)
    logits = block.router(x[0])
    probs = logits.softmax(-1)
    out = [torch.zeros(DIM, dtype=torch.float64) for _ in range(10)]
    for e in range(3):
        for i in probs[:, e].topk(math.ceil(10 * top_k / 3)).indices.tolist():
            out[i] = out[i] + probs[i, e] * expert(block, e, x[0, i])
    y, losses = block.train()(x, NO_POOLS)
    assert_same(y[0], torch.stack(out), [x, *block.parameters()])
    assert losses.keys() == {"router_z"}
    assert torch.allclose(losses["router_z"], 0.1 * logits.exp().sum(-1).log().square().mean(), rtol=1e-10)
    assert "not causal" in (plan.looks_ahead() or "")
    chosen = [
        sum(probs[i, e] * expert(block, e, token) for e in probs[i].topk(top_k).indices) for i, token in enumerate(x[0])
    ]
    y, losses = block.eval()(x, NO_POOLS)
    assert torch.allclose(y[0], torch.stack(chosen), rtol=1e-10, atol=1e-12)
    assert losses == {}


def test_shared_experts_see_every_token() -> None:
    block, _ = block_of("moe", num_experts=2, hidden_dim=8, num_shared_experts=3)
    x = tokens(2, 5)
    with_shared = block(x, NO_POOLS)[0]
    shared = block.shared
    assert shared.w1.weight.shape == (24, DIM)
    block.shared = None
    alone = block(x, NO_POOLS)[0]
    naive = shared.w2(F.silu(shared.w1(x)) * shared.w3(x))
    assert torch.allclose(with_shared, alone + naive, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_sees_the_window_behind_each_token(window: int | None, kv_heads: int) -> None:
    given = {} if window is None else {"window": window}
    block, _ = block_of("attention", num_heads=2, num_kv_heads=kv_heads, **given)
    x = tokens(1, 9)

    def turned(row: Tensor, position: int) -> Tensor:
        angles = [position * 500_000.0 ** (-2 * i / 6) for i in range(3)]
        pairs = [(row[i], row[i + 3], math.cos(a), math.sin(a)) for i, a in enumerate(angles)]
        return torch.stack([a * c - b * s for a, b, c, s in pairs] + [b * c + a * s for a, b, c, s in pairs])

    q, k, v = (w(x[0]).view(9, -1, 6) for w in (block.wq, block.wk, block.wv))
    out = []
    for i in range(9):
        heads = []
        for h in range(2):
            seen = range(max(0, i + 1 - (window or 9)), i + 1)
            g = h * kv_heads // 2
            scores = torch.stack([turned(q[i, h], i) @ turned(k[j, g], j) / 6**0.5 for j in seen])
            heads.append(scores.softmax(0) @ torch.stack([v[j, g] for j in seen]))
        out.append(block.wo(torch.cat(heads)))
    assert_same(block(x)[0], torch.stack(out), [x, *block.parameters()])


def frequencies(scaling: object, theta: float) -> tuple[list[float], float]:
    """Radians per position of each pair of a head of 16, and the length of a turned unit vector."""
    cos, sin = rotary_angles(2, 16, theta, torch.zeros(1, dtype=torch.float64), scaling)
    size = (cos[1] ** 2 + sin[1] ** 2).sqrt()[0, 0].item()
    return torch.atan2(sin[1], cos[1]).flatten().tolist(), size


def test_llama3_scaling_is_that_of_llama_31() -> None:
    """Wavelengths over 8,192 / 1 are divided by 8, those under 8,192 / 4 kept, those between blended."""
    theta, (got, size) = 500_000.0, frequencies(Llama3Scaling(kind="llama3", original_max_seq_len=8192), 500_000.0)
    expected = []
    for i in range(8):
        f = theta ** (-i / 8)
        wavelength = 2 * math.pi / f
        smooth = (8192 / wavelength - 1) / 3
        expected.append(f if wavelength < 2048 else f / 8 if wavelength > 8192 else (1 - smooth) * f / 8 + smooth * f)
    assert got == pytest.approx(expected, rel=1e-12)
    assert size == pytest.approx(1)
    kept, stretched = (sum(f == theta ** (-i / 8) / by for i, f in enumerate(expected)) for by in (1, 8))
    assert min(kept, stretched, 8 - kept - stretched) > 0


def test_yarn_scaling_is_that_of_the_published_code() -> None:
    """Channels below the one that turns 32 times in 2,048 positions are kept, those above 1 turn divided by 4."""
    theta, (got, size) = (
        10_000.0,
        frequencies(YarnScaling(kind="yarn", factor=4.0, original_max_seq_len=2048), 10_000.0),
    )
    low = math.floor(16 * math.log(2048 / (32 * 2 * math.pi)) / (2 * math.log(theta)))
    high = math.ceil(16 * math.log(2048 / (2 * math.pi)) / (2 * math.log(theta)))
    assert (low, high) == (2, 6)
    expected = []
    for i in range(8):
        f, ramp = theta ** (-i / 8), min(max((i - low) / (high - low), 0), 1)
        expected.append(f / 4 * ramp + f * (1 - ramp))
    assert got == pytest.approx(expected, rel=1e-12)
    assert size == pytest.approx(0.1 * math.log(4) + 1)
