"""The ops against their references in float64, and as torch sees them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from memforge_kernels import (
    FLOP_FORMULAS,
    KERNELS,
    decompositions,
    expert_lookup,
    gather_dot,
    grouped_linear,
    product_key_topk,
    weighted_gather,
    weighted_scatter,
)
from memforge_kernels.expert_lookup import reference as lookup_reference
from memforge_kernels.expert_lookup.op import Activation
from memforge_kernels.gather_dot import reference as dot_reference
from memforge_kernels.grouped_linear import op as grouped_linear_op
from memforge_kernels.grouped_linear import reference as grouped_reference
from memforge_kernels.product_key_topk import reference as topk_reference
from memforge_kernels.product_key_topk.op import candidate_pairs
from memforge_kernels.topk import topk_ties_low
from memforge_kernels.weighted_gather import reference as gather_reference
from memforge_kernels.weighted_scatter import reference as scatter_reference

U32 = 2.0**-24
# Tokens, rows per bag, slots, width: ones, odd sizes, more rows than slots.
GATHER_SHAPES = [(1, 1, 1, 1), (7, 5, 3, 13), (16, 8, 64, 32), (3, 33, 10, 100), (0, 4, 5, 6)]


def bag(n: int, k: int, m: int, v: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(m, v, generator=g, dtype=torch.float64).to(dtype)
    slots = torch.randint(m, (n, k), generator=g)
    weights = torch.randn(n, k, generator=g, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    return values, slots, weights


@pytest.mark.parametrize("shape", GATHER_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots_of", ["random", "equal", "strided"])
def test_gather_and_its_gradients_stay_within_rounding(
    shape: tuple[int, int, int, int], dtype: torch.dtype, slots_of: str
) -> None:
    """|y - ref64| <= 2 n 2^-24 sum|s_i w_i| + u_out |ref|, n the terms of the sum, for the output and each gradient."""
    n, k, m, v = shape
    values, slots, weights = bag(n, k, m, v, dtype)
    if slots_of == "equal":
        slots = torch.zeros_like(slots)
    if slots_of == "strided":
        slots, weights = slots.repeat(1, 2)[:, ::2], weights.T.contiguous().T
    weights.requires_grad_()
    values.requires_grad_()
    out = weighted_gather(values, slots, weights)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    out.backward(grad)

    v64, w64, g64 = values.detach().double(), weights.detach().double(), grad.double()
    rows = v64[slots]
    terms = torch.zeros(m, v, dtype=torch.float64).index_add(
        0, slots.flatten(), (w64[..., None] * g64[:, None]).flatten(0, 1)
    )
    sizes = torch.zeros(m, v, dtype=torch.float64).index_add(
        0, slots.flatten(), (w64[..., None] * g64[:, None]).abs().flatten(0, 1)
    )
    counts = torch.bincount(slots.flatten(), minlength=m)[:, None]
    u_values = torch.finfo(dtype).eps
    checks = [
        (out, (w64[..., None] * rows).sum(1), (w64[..., None] * rows).abs().sum(1), k, U32),
        (weights.grad, (rows * g64[:, None]).sum(-1), (rows * g64[:, None]).abs().sum(-1), v, U32),
        (values.grad, terms, sizes, counts, u_values),
    ]
    for got, ref, size, num_terms, unit in checks:
        assert got is not None
        bound = 2 * num_terms * U32 * size + unit * ref.abs()
        assert ((got.double() - ref).abs() <= bound).all()


def test_gather_agrees_with_its_reference() -> None:
    values, slots, weights = bag(9, 4, 20, 6, torch.float64)
    assert torch.allclose(
        weighted_gather(values, slots, weights), gather_reference.weighted_gather(values, slots, weights), rtol=1e-12
    )
    assert torch.autograd.gradcheck(
        lambda v, w: weighted_gather(v, slots, w), (values.requires_grad_(), weights.requires_grad_())
    )


def test_frozen_values_get_no_gradient() -> None:
    values, slots, weights = bag(4, 3, 8, 5, torch.float32)
    weighted_gather(values, slots, weights.requires_grad_()).sum().backward()
    assert values.grad is None
    assert weights.grad is not None


def test_value_gradients_are_the_same_bits_every_time() -> None:
    values, slots, weights = bag(500, 16, 7, 33, torch.float32)
    grads = []
    for _ in range(5):
        leaf = values.clone().requires_grad_()
        weighted_gather(leaf, slots, weights).square().sum().backward()
        grads.append(leaf.grad)
    assert all(torch.equal(g, grads[0]) for g in grads)


@pytest.mark.parametrize(
    ("values", "slots", "weights", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1), "slots, weights"),
        (torch.zeros(4), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), r"values \[m, v\]"),
        (torch.zeros(4, 2), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2), "int64"),
    ],
)
def test_gather_names_the_sizes_that_do_not_fit(values: Tensor, slots: Tensor, weights: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weighted_gather(values, slots, weights)


@pytest.mark.parametrize("shape", GATHER_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_dot_and_its_gradients_stay_within_rounding(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    n, k, m, v = shape
    values, slots, grad = bag(n, k, m, v, dtype)
    x = torch.randn(n, v, generator=torch.Generator().manual_seed(2)).requires_grad_()
    values.requires_grad_()
    out = gather_dot(x, values, slots)
    out.backward(grad)
    x64, v64 = x.detach().double(), values.detach().double()
    x_ref, v_ref = x64.clone().requires_grad_(), v64.clone().requires_grad_()
    dot_reference.gather_dot(x_ref, v_ref, slots).backward(grad.double())
    sizes = v64[slots].abs()
    scatter = scatter_reference.weighted_scatter(x64.abs(), slots, grad.abs().double(), m)
    counts = torch.bincount(slots.flatten(), minlength=m)[:, None]
    checks = [
        (out, dot_reference.gather_dot(x64, v64, slots), (x64[:, None].abs() * sizes).sum(-1), v, U32),
        (x.grad, x_ref.grad, (grad.abs()[..., None] * sizes).sum(1), k, U32),
        (values.grad, v_ref.grad, scatter, counts, torch.finfo(dtype).eps),
    ]
    for got, ref, size, num_terms, unit in checks:
        assert got is not None
        assert ref is not None
        assert ((got.double() - ref).abs() <= 2 * num_terms * U32 * size + unit * ref.abs()).all()


@pytest.mark.parametrize("shapes", [((2, 3), (4, 2), (2, 1)), ((2, 3), (4, 3), (1, 1)), ((3,), (4, 3), (1, 1))])
def test_gather_dot_names_the_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, values, slots = shapes
    with pytest.raises(ValueError, match="gather_dot needs"):
        gather_dot(torch.zeros(x), torch.zeros(values), torch.zeros(slots, dtype=torch.int64))


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_expert_lookup_is_a_weighted_sum_of_single_neuron_experts(activation: Activation) -> None:
    down, slots, weights = bag(9, 4, 20, 6, torch.float64)
    up, x = bag(9, 4, 20, 6, torch.float64, seed=1)[0], torch.randn(9, 6, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, down, up, weights)]
    ours = expert_lookup(x, down, up, slots, weights, activation)
    naive = lookup_reference.expert_lookup(x, down, up, slots, weights, activation)
    assert torch.allclose(ours, naive, rtol=1e-12)
    for got, expected in zip(
        torch.autograd.grad(ours.square().sum(), leaves),
        torch.autograd.grad(naive.square().sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an op returns."""

    largest = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))  # type: ignore[operator]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_expert_lookup_never_holds_a_row_for_each_token_and_expert() -> None:
    n, k, m, d = 64, 32, 40, 48
    down, slots, weights = bag(n, k, m, d, torch.float32)
    up, x = down.clone(), torch.randn(n, d)
    leaves = [leaf.requires_grad_() for leaf in (x, down, up, weights)]
    sizes = []
    for f in (expert_lookup, lookup_reference.expert_lookup):
        with LargestTensor() as seen:
            torch.autograd.grad(f(x, down, up, slots, weights).sum(), leaves)
        sizes.append(seen.largest)
    assert sizes[0] <= max(n * d, n * k, m * d)
    assert sizes[1] == n * k * d


TOPK_SHAPES = [(1, 1, 2, 2, 1), (5, 3, 8, 7, 4), (4, 2, 16, 40, 32), (6, 1, 6, 5, 5), (0, 2, 4, 4, 2)]


@pytest.mark.parametrize(("n", "h", "q", "s", "k"), TOPK_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_finds_what_scoring_every_slot_finds(n: int, h: int, q: int, s: int, k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(n)
    query = torch.randn(n, h, q, generator=g, dtype=dtype)
    sub_keys = torch.randn(h, 2, s, q // 2, generator=g, dtype=dtype)
    scores, slots = product_key_topk(query, sub_keys, k)
    expected, expected_slots = topk_reference.product_key_topk(query, sub_keys, k)
    assert torch.equal(scores, expected)
    apart = (expected.diff(dim=-1) != 0).all(-1)
    assert torch.equal(slots[apart], expected_slots[apart])
    # The scores belong to the slots: score them again, one by one.
    halves = query.view(n, h, 2, q // 2)
    keys = torch.stack((sub_keys[:, 0].unsqueeze(0).expand(n, -1, -1, -1), sub_keys[:, 1].expand(n, -1, -1, -1)))
    idx = torch.stack((slots // s, slots % s))[..., None].expand(-1, -1, -1, -1, q // 2)
    again = (keys.gather(3, idx) * halves.permute(2, 0, 1, 3)[:, :, :, None]).sum((0, -1))
    assert torch.allclose(again, scores, rtol=1e-4, atol=1e-5)


def test_topk_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(4, 2, 6, generator=g, dtype=torch.float64, requires_grad=True)
    sub_keys = torch.randn(2, 2, 5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, s: product_key_topk(q, s, 3)[0], (query, sub_keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lowest_slot(dtype: torch.dtype) -> None:
    sub_keys = torch.ones(1, 2, 6, 2, dtype=dtype)
    _, slots = product_key_topk(torch.ones(3, 1, 4, dtype=dtype), sub_keys, 4)
    assert slots.tolist() == [[[0, 1, 2, 3]]] * 3


def test_rounded_sums_that_tie_go_to_the_lowest_candidate() -> None:
    """Slots 0 and 1 are as good as 2 after rounding, but (rank 1, rank 1) is no candidate at k = 2."""
    sub_keys = torch.tensor([[[[1.0], [1.0 + 2**-23]], [[1024.0], [1024.0]]]])
    query = torch.ones(1, 1, 2)
    scores, slots = product_key_topk(query, sub_keys, 2)
    reference_scores, reference_slots = topk_reference.product_key_topk(query, sub_keys, 2)
    assert torch.equal(scores, reference_scores)
    assert (slots.flatten().tolist(), reference_slots.flatten().tolist()) == ([0, 2], [0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slot", [-1, 4])
def test_slots_outside_the_pool_are_refused(dtype: torch.dtype, slot: int) -> None:
    table, slots, one = torch.zeros(4, 2, dtype=dtype), torch.tensor([[2, slot]]), torch.ones(1, 2)
    message = f"slots {min(2, slot)} to {max(2, slot)}: the table has 4 rows"
    for read in (
        lambda: weighted_gather(table, slots, one),
        lambda: gather_dot(one.to(dtype), table, slots),
        lambda: weighted_scatter(one.to(dtype), slots, one, 4),
    ):
        with pytest.raises(ValueError, match=message):
            read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_query_is_seen_by_the_loss(dtype: torch.dtype) -> None:
    query = torch.full((1, 1, 4), math.nan, dtype=dtype)
    scores, slots = product_key_topk(query, torch.randn(1, 2, 6, 2, dtype=dtype), 5)
    assert slots.tolist() == [[[0, 1, 2, 3, 4]]]
    assert scores.isnan().all()
    assert scores.softmax(-1).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_orders_like_a_stable_sort(dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 1.5, -1.5, math.inf, -math.inf, 1e-45, -1e-45, 3e38, 1.5, 0.0]
    scores = torch.tensor(special, dtype=dtype)
    index = torch.arange(len(special)).flip(0)
    best, chosen = topk_ties_low(scores, index, 9)
    pairs = sorted(zip(special, index.tolist(), strict=True), key=lambda p: (-p[0], p[1]))[:9]
    assert best.tolist() == torch.tensor([p[0] for p in pairs], dtype=dtype).tolist()
    assert chosen.tolist() == [p[1] for p in pairs]


def test_slots_beyond_int32_keep_their_value() -> None:
    s = 50_000  # s * s = 2.5e9 > 2**31
    sub_keys = torch.zeros(1, 2, s, 1)
    sub_keys[0, :, s - 1] = 1.0
    _, slots = product_key_topk(torch.ones(1, 1, 2), sub_keys, 1)
    assert slots.item() == s * s - 1


@pytest.mark.parametrize(("k", "pairs"), [(1, 1), (2, 3), (32, 119)])
def test_few_pairs_can_win(k: int, pairs: int) -> None:
    assert len(candidate_pairs(k)[0]) == pairs


@pytest.mark.parametrize(
    ("query", "keys", "k", "message"),
    [
        ((2, 1, 4), (1, 2, 6, 2), 7, "k = 7 must be 1 to s = 6"),
        ((2, 3, 4), (1, 2, 6, 2), 2, "does not fit"),
        ((2, 1, 4), (1, 3, 6, 2), 2, "needs query"),
    ],
)
def test_topk_names_the_sizes_that_do_not_fit(
    query: tuple[int, ...], keys: tuple[int, ...], k: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        product_key_topk(torch.zeros(query), torch.zeros(keys), k)


@pytest.mark.parametrize("sizes", [(3, 0, 5, 1), (0, 0, 0, 0), (9,)])
def test_grouped_linear_agrees_with_its_reference(sizes: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    offsets = torch.tensor(sizes).cumsum(0)
    x = torch.randn(sum(sizes), 4, generator=g, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(sizes), 4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    expected = grouped_reference.grouped_linear(x, weights, offsets)
    assert torch.allclose(grouped_linear(x, weights, offsets), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda a, w: grouped_linear(a, w, offsets), (x, weights))


@pytest.mark.parametrize("offsets", [[2, 5], [5, 4], [3, 6, 9]])
def test_grouped_linear_refuses_offsets_that_do_not_cover_the_rows(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets"):
        grouped_linear(torch.zeros(4, 2), torch.zeros(2, 2, 2), torch.tensor(offsets))


def test_torchs_grouped_gemm_means_what_grouped_linear_does() -> None:
    """A GPU's 16-bit matrices go to it; here it runs on a CPU, given what the op would give it."""
    x, weights = torch.randn(9, 16).bfloat16(), torch.randn(4, 16, 24).bfloat16()
    grad, offsets = torch.randn(9, 24).bfloat16(), torch.tensor([3, 3, 8, 9])
    assert grouped_linear_op.fit_grouped_gemm(x, weights, grad, weights.transpose(1, 2), x.T)
    for a, b, expected in (
        (x, weights, grouped_linear(x, weights, offsets)),
        (grad, weights.transpose(1, 2), grouped_linear(grad, weights.transpose(1, 2), offsets)),
        (x.T, grad, grouped_linear_op.weight_grad(x, grad, offsets)),
    ):
        torch.testing.assert_close(F.grouped_mm(a, b, offs=offsets.int()), expected)


def test_what_torchs_grouped_gemm_refuses_does_not_go_to_it() -> None:
    wide = torch.zeros(9, 32, dtype=torch.bfloat16)
    for matrix in (wide[:, :20].contiguous(), wide[:, ::2]):
        assert not grouped_linear_op.fit_grouped_gemm(matrix)
        with pytest.raises(RuntimeError):
            F.grouped_mm(matrix, wide.new_zeros(2, matrix.shape[1], 8), offs=torch.tensor([2, 9]).int())
    assert not grouped_linear_op.fit_grouped_gemm(wide.float())


def op_arguments() -> dict[str, tuple[object, tuple[object, ...]]]:
    values, slots, weights = bag(6, 3, 10, 4, torch.float32)
    grad = torch.randn(6, 4)
    x, experts, offsets = torch.randn(6, 4), torch.randn(3, 4, 5), torch.tensor([2, 2, 6])
    ops = torch.ops.memforge
    return {
        "weighted_gather": (ops.weighted_gather, (values.requires_grad_(), slots, weights.requires_grad_())),
        "gather_dot": (ops.gather_dot, (grad.requires_grad_(), values.detach().requires_grad_(), slots)),
        "weighted_scatter": (ops.weighted_scatter, (grad.detach(), slots, weights.detach(), 10)),
        "product_key_topk": (
            ops.product_key_topk,
            (torch.randn(5, 2, 6, requires_grad=True), torch.randn(2, 2, 7, 3, requires_grad=True), 3),
        ),
        "product_key_topk_grad": (
            ops.product_key_topk_grad,
            (torch.randn(5, 2, 3), torch.randn(5, 2, 6), torch.randn(2, 2, 7, 3), torch.randint(49, (5, 2, 3))),
        ),
        "grouped_linear": (ops.grouped_linear, (x.requires_grad_(), experts.requires_grad_(), offsets)),
        "grouped_weight_grad": (ops.grouped_linear_weight_grad, (x.detach(), torch.randn(6, 5), offsets)),
    }


@pytest.mark.parametrize("name", list(op_arguments()))
def test_torch_accepts_the_registration(name: str) -> None:
    op, args = op_arguments()[name]
    torch.library.opcheck(op.default, args)


def test_every_op_has_a_flop_formula_and_a_kernel() -> None:
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("memforge::")
    }
    assert registered == {op.__name__ for op in FLOP_FORMULAS}
    assert registered == {overload.overloadpacket.__name__ for overload in KERNELS}


def counted(function: object, *args: object) -> int:
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        function(*args)  # type: ignore[operator]
    return counter.get_total_flops()


def test_formulas_equal_the_count_of_the_plain_torch_definitions() -> None:
    """The reference is made of matrix products that torch counts by itself, so no formula is checked by itself."""
    values, slots, weights = bag(6, 3, 10, 4, torch.float32)
    rows = torch.randn(6, 4)
    gather = [
        counted(lambda f: f(values.requires_grad_(), slots, weights.requires_grad_()).sum().backward(), f)
        for f in (weighted_gather, gather_reference.weighted_gather)
    ]
    x, experts, offsets = torch.randn(6, 4), torch.randn(3, 4, 5), torch.tensor([2, 2, 6])
    grouped = [
        counted(lambda f: f(x.requires_grad_(), experts.requires_grad_(), offsets).sum().backward(), f)
        for f in (grouped_linear, grouped_reference.grouped_linear)
    ]
    query, sub_keys = torch.randn(5, 2, 6), torch.randn(2, 2, 7, 3)
    topk = [counted(f, query, sub_keys, 3) for f in (product_key_topk, topk_reference.product_key_topk)]
    dot = [
        counted(lambda f: f(rows.requires_grad_(), values.requires_grad_(), slots).sum().backward(), f)
        for f in (gather_dot, dot_reference.gather_dot)
    ]
    scatter = [
        counted(f, rows.detach(), slots, weights, 10) for f in (weighted_scatter, scatter_reference.weighted_scatter)
    ]
    lookup = [
        counted(lambda f: f(rows, values, values, slots, weights.requires_grad_()).sum().backward(), f)
        for f in (expert_lookup, lookup_reference.expert_lookup)
    ]
    assert gather == dot == [3 * 2 * 6 * 3 * 4] * 2
    assert scatter == [2 * 6 * 3 * 4] * 2
    assert lookup == [2 * 3 * 2 * 6 * 3 * 4] * 2
    assert grouped == [3 * 2 * 6 * 4 * 5] * 2
    assert topk == [2 * 5 * 2 * 7 * 6] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("equal_keys", [False, True])
def test_decompositions_choose_the_same_slots(dtype: torch.dtype, equal_keys: bool) -> None:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(40, 2, 6, generator=g).to(dtype)
    # Few different keys: many ties within the halves and between sums.
    sub_keys = torch.randint(-1, 2, (2, 2, 9, 3), generator=g).to(dtype)
    query = query.round() if equal_keys else query
    for got, expected in zip(
        decompositions.product_key_topk(query, sub_keys, 7), product_key_topk(query, sub_keys, 7), strict=True
    ):
        assert torch.equal(got, expected)


def test_decompositions_of_a_nan_query_choose_the_first_slots() -> None:
    query = torch.full((1, 1, 4), math.nan)
    assert decompositions.product_key_topk(query, torch.randn(1, 2, 6, 2), 5)[1].tolist() == [[[0, 1, 2, 3, 4]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decompositions_compute_what_the_ops_compute(dtype: torch.dtype) -> None:
    values, slots, weights = bag(16, 8, 64, 32, dtype)
    x, offsets = torch.randn(16, 32), torch.tensor([0, 5, 5, 16])
    experts = torch.randn(4, 32, 6)
    pairs = [
        (decompositions.weighted_gather(values, slots, weights), weighted_gather(values, slots, weights)),
        (decompositions.gather_dot(x, values, slots), gather_dot(x, values, slots)),
        (decompositions.grouped_linear(x, experts, offsets), grouped_linear(x, experts, offsets)),
    ]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="at most 256 experts, not 257"):
        decompositions.grouped_linear(x, torch.zeros(257, 32, 1), torch.full((257,), 16))
