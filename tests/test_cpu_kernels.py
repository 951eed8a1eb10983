"""The compiled CPU kernels against float64, on random shapes and at the edges of what an index can hold."""

import errno
import fcntl
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from memforge_kernels import product_key_topk, threads, weighted_scatter
from memforge_kernels.product_key_topk import cpu as topk_cpu
from memforge_kernels.product_key_topk import op as topk
from memforge_kernels.product_key_topk.cpu import CHUNK_SCORES
from memforge_kernels.row_update import Read, adamw_, segment_sum, sgd_, sorted_gradient

U32 = 2.0**-24
CASES = 300


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


def bag_case(seed: int) -> dict[str, float]:
    """Largest error over its bound, |y - ref64| <= 2 n 2^-24 sum|terms| + 2^-24 |ref|, of each result of one shape."""
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n, k = choose.choice([0, 1, 3, 17, 64]), choose.choice([1, 2, 5, 16, 33])
    m, v = choose.choice([1, 2, 7, 100, 1000]), choose.choice([1, 3, 13, 32, 100, 257, 768, 1000])
    values, x = normal(g, m, v), normal(g, n, v)
    slots, weights = torch.randint(m, (n, k), generator=g), normal(g, n, k)
    if choose.random() < 0.2:
        slots = torch.full_like(slots, m - 1)
    if choose.random() < 0.3:  # not contiguous
        slots, weights, x = slots.repeat(1, 2)[:, ::2], weights.T.contiguous().T, x.repeat(1, 2)[:, :v]
        slots = slots if slots.shape == (n, k) else slots[:, :k]
    values.requires_grad_(choose.random() < 0.7)
    frozen = not values.requires_grad
    weights = weights.detach().requires_grad_()
    out = torch.ops.memforge.weighted_gather(values, slots, weights)
    out.backward(x)
    v64, w64, x64 = values.detach().double(), weights.detach().double(), x.double()
    rows = v64[slots]
    one_hot = torch.nn.functional.one_hot(slots.flatten(), m).double().T
    terms = (w64[..., None] * x64[:, None]).flatten(0, 1)
    counts = one_hot.sum(1, keepdim=True)
    checks = [
        ("gather", out, (w64[..., None] * rows).sum(1), (w64[..., None] * rows).abs().sum(1), k),
        ("weights", weights.grad, (rows * x64[:, None]).sum(-1), (rows * x64[:, None]).abs().sum(-1), v),
        ("scatter", weighted_scatter(x, slots, weights.detach(), m), one_hot @ terms, one_hot @ terms.abs(), counts),
    ]
    if frozen:
        assert values.grad is None
    else:
        checks.append(("values", values.grad, one_hot @ terms, one_hot @ terms.abs(), counts))
    if n:
        grad = sorted_gradient([Read(slots, weights.detach(), x)])
        table = torch.zeros(m, v).index_copy(0, grad.touched, segment_sum(grad))
        checks.append(("rows", table, one_hot @ terms, one_hot @ terms.abs(), counts))
    return {name: worst(got, ref, size, terms_summed) for name, got, ref, size, terms_summed in checks}


def worst(got: Tensor | None, ref: Tensor, size: Tensor, terms: Tensor | int) -> float:
    assert got is not None
    assert got.shape == ref.shape
    bound = 2 * terms * U32 * size + U32 * ref.abs()
    error = (got.double() - ref).abs()
    assert torch.isfinite(got).all()
    return float((error / bound.clamp(min=1e-300)).max()) if got.numel() else 0.0


def topk_case(seed: int) -> float:
    """Largest error of a chosen score over its bound, and whether a better slot was left out."""
    choose, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n, h = choose.choice([0, 1, 5, 33]), choose.choice([1, 2, 5])
    q, s = 2 * choose.choice([1, 3, 16, 37]), choose.choice([1, 2, 31, 64, 255, 300, 600])
    k = choose.choice([x for x in (1, 2, 7, 32, 40) if x <= s])
    query, sub_keys = normal(g, n, h, q), normal(g, h, 2, s, q // 2)
    if choose.random() < 0.3:  # many ties
        query, sub_keys = query.round(), sub_keys.round()
    if choose.random() < 0.2:
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
    scores, slots = product_key_topk(query, sub_keys, k)
    half, keys = query.double().view(n, h, 2, q // 2), sub_keys.double()
    exact = torch.einsum("nhcd,hcsd->nhcs", half, keys)
    sizes = torch.einsum("nhcd,hcsd->nhcs", half.abs(), keys.abs())
    i, j = slots // s, slots % s
    of = [part[:, :, 0].gather(-1, i) + part[:, :, 1].gather(-1, j) for part in (exact, sizes)]
    error = worst(scores, of[0], of[1], q)
    assert (scores.diff(dim=-1) <= 0).all()
    assert slots.flatten(0, 1).sort(dim=-1).values.diff(dim=-1).ne(0).all()
    # The k-th best of all s*s sums, in float64: no chosen one lies below it by more than rounding.
    best = (exact[:, :, 0, :, None] + exact[:, :, 1, None, :]).flatten(2).topk(k, dim=-1).values
    bound = 4 * q * U32 * sizes.amax(dim=-1).sum(-1, keepdim=True)
    assert (of[0].sort(dim=-1, descending=True).values >= best - bound).all()
    return error


def test_random_shapes_stay_within_rounding(capsys: pytest.CaptureFixture[str]) -> None:
    found = [max(bag_case(seed).values()) for seed in range(CASES)]
    passed = sum(error <= 1 for error in found)
    with capsys.disabled():
        print(f"\nrandom bags within rounding of float64: {passed}/{CASES}")
    assert passed == CASES


def test_random_product_keys_stay_within_rounding(capsys: pytest.CaptureFixture[str]) -> None:
    passed = sum(topk_case(seed) <= 1 for seed in range(CASES))
    with capsys.disabled():
        print(f"\nrandom product keys within rounding of float64: {passed}/{CASES}")
    assert passed == CASES


@pytest.mark.parametrize("s", [40, 300, 1024])
def test_ties_infinities_and_nan_choose_as_the_definition_does(s: int) -> None:
    """The compiled kernel beside the composition of torch's own operators, bit for bit, slots included."""
    g = torch.Generator().manual_seed(s)
    sub_keys = torch.randint(-1, 2, (2, 2, s, 4), generator=g).float()
    query = torch.randint(-2, 3, (40, 2, 8), generator=g).float()
    query[3] = float("nan")
    query[5, 0, 2] = float("inf")
    query[6] = 0.0
    query[7, 1] = -0.0
    ours, theirs = product_key_topk(query, sub_keys, 32), topk.composed(query, sub_keys, 32)
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[0].nan_to_num(1e30), theirs[0].nan_to_num(1e30))
    assert ours[1][3].tolist() == [list(range(32))] * 2


def test_scores_are_never_held_whole() -> None:
    from test_ops import LargestTensor

    query, sub_keys = torch.randn(8192, 2, 8), torch.randn(2, 2, 1024, 4)
    with LargestTensor() as seen:
        topk.forward(query, sub_keys, 4)
    assert seen.largest <= CHUNK_SCORES < 8192 * 2 * 2 * 1024 / 4


def test_kernels_are_kept_where_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    store = SimpleNamespace(cache_path=str(tmp_path), save_overload=lambda code: f"saved {code}", load_overload=str)
    threads._one_process_at_a_time(SimpleNamespace(_cache=store))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert (store.save_overload("it"), store.load_overload("it")) == ("saved it", "it")


def test_inference_mode_leaves_nothing_behind() -> None:
    """Room made in that mode could not be written to outside of it."""
    query, sub_keys = torch.randn(3, 2, 8), torch.randn(2, 2, 700, 4)
    vars(topk_cpu._scratch).clear()
    with torch.inference_mode():
        expected = topk.forward(query, sub_keys, 4)[1]
    assert torch.equal(product_key_topk(query.requires_grad_(), sub_keys, 4)[1], expected)


def untouched(m: int, v: int) -> Tensor:
    """Zeros that take memory where they are written; torch's own would take it all."""
    return torch.from_numpy(np.zeros((m, v), dtype=np.float32))


def test_rows_beyond_two_to_the_31_elements_are_found_by_value() -> None:
    """8 GiB of address space, of which a few rows are ever touched."""
    m, v = 2**31 // 256 + 5, 256
    table = untouched(m, v)
    assert table.numel() > 2**31
    table[m - 1], table[m - 2], table[1] = 3.0, 5.0, 7.0
    slots = torch.tensor([[m - 1, 1], [m - 2, m - 1]])
    weights = torch.tensor([[1.0, 10.0], [2.0, 4.0]])
    out = torch.ops.memforge.weighted_gather(table, slots, weights)
    assert out[:, 0].tolist() == [73.0, 22.0]
    assert torch.ops.memforge.gather_dot(torch.ones(2, v), table, slots).tolist() == [[768, 1792], [1280, 768]]
    sgd_(table, sorted_gradient([Read(slots, weights, torch.ones(2, v))]), lr=1.0)
    assert [table[row, v - 1].item() for row in (m - 1, m - 2, 1, 0)] == [3 - 5, 5 - 2, 7 - 10, 0]


def test_moments_beyond_two_to_the_31_elements_are_found_by_value() -> None:
    m, v = 2**31 // 1024 + 3, 1024
    table, first, second = (untouched(m, v) for _ in range(3))
    read = Read(torch.tensor([[m - 1], [0]]), torch.ones(2, 1), torch.ones(2, v))
    adamw_(
        table, first, second, sorted_gradient([read]), torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]]),
        betas=(0.5, 0.75), eps=0.0,
    )  # fmt: skip
    for row in (0, m - 1):
        assert (first[row, v - 1].item(), second[row, 0].item(), table[row, 7].item()) == (0.5, 0.25, -1.0)
    assert not table[m - 2].any()
