"""Row-sparse optimizers: against their definition, against dense ones, and fed by a tape."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memforge_kernels import Read, Reader, RowAdamW, RowOptimizer, RowSGD, Tape, expert_lookup, new_tap
from memforge_kernels.row_update import RULES, adamw_, reference, segment_sum, sgd_, sorted_gradient, squared_norm
from memforge_kernels.row_update.cpu import stochastically_rounded

U32 = 2.0**-24


def reads(
    m: int,
    v: int,
    shapes: list[tuple[int, int]],
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    top: int | None = None,
) -> list[Read]:
    g = torch.Generator().manual_seed(seed)
    return [
        Read(
            torch.randint(top or m, (n, k), generator=g),
            torch.randn(n, k, generator=g, dtype=torch.float64).to(dtype),
            torch.randn(n, v, generator=g, dtype=torch.float64).to(dtype),
        )
        for n, k in shapes
    ]


def dense(m: int, given: list[Read]) -> Tensor:
    """The gradient as a whole table."""
    out = given[0].rows.new_zeros(m, given[0].rows.shape[1])
    for read in given:
        terms = read.weights[..., None] * read.rows[:, None]
        out.index_add_(0, read.slots.flatten(), terms.flatten(0, 1))
    return out


SHAPES = [
    (1, 1, [(1, 1)]),
    (7, 13, [(5, 3)]),
    (50, 32, [(9, 4), (1, 1), (6, 2)]),
    (3, 100, [(40, 16)]),
    (300, 257, [(33, 5)]),
]


@pytest.mark.parametrize(("m", "v", "shapes"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_and_norms_stay_within_rounding(m: int, v: int, shapes: list[tuple[int, int]], dtype: torch.dtype) -> None:
    given = reads(m, v, shapes, dtype=dtype)
    exact = [Read(r.slots, r.weights.double(), r.rows.double()) for r in given]
    sizes = dense(m, [Read(r.slots, r.weights.abs(), r.rows.abs()) for r in exact])
    grad = sorted_gradient(given)
    counts = grad.starts.diff()[:, None]
    unit = torch.finfo(dtype).eps
    expected = dense(m, exact)
    assert ((segment_sum(grad) - expected[grad.touched]).abs() <= 2 * counts * unit * sizes[grad.touched]).all()
    assert grad.touched.tolist() == sorted({int(s) for r in given for s in r.slots.flatten()})
    terms = int(counts.max()) + v
    bound = 4 * terms * unit * float(sizes.square().sum())
    assert abs(float(squared_norm(grad)) - float(expected.square().sum())) <= bound


@pytest.mark.parametrize(("m", "v", "shapes"), SHAPES)
@pytest.mark.parametrize("per_row", [False, True])
def test_adamw_is_its_definition(m: int, v: int, shapes: list[tuple[int, int]], per_row: bool) -> None:
    g = torch.Generator().manual_seed(1)
    grad = sorted_gradient(reads(m, v, shapes))
    tables = [torch.randn(m, v, generator=g, dtype=torch.float64).abs() for _ in range(3)]
    rows = len(grad.touched) if per_row else 1
    coefficients = torch.rand(rows, 6, generator=g, dtype=torch.float64)
    ours, theirs = [t.clone() for t in tables], [t.clone() for t in tables]
    adamw_(*ours, grad, coefficients, betas=(0.8, 0.9), eps=1e-3, scale=0.5)
    reference.adamw(*theirs, grad, coefficients, (0.8, 0.9), 1e-3, 0.5)
    for got, expected, before in zip(ours, theirs, tables, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
        rest = torch.ones(m, dtype=torch.bool).index_fill(0, grad.touched, False)
        assert torch.equal(got[rest], before[rest])


@pytest.mark.parametrize(("m", "v", "shapes"), SHAPES)
def test_sgd_is_its_definition(m: int, v: int, shapes: list[tuple[int, int]]) -> None:
    grad = sorted_gradient(reads(m, v, shapes))
    ours = torch.randn(m, v, dtype=torch.float64)
    theirs = ours.clone()
    sgd_(ours, grad, lr=0.2, weight_decay=0.5, scale=1.5)
    reference.sgd(theirs, grad, 0.9, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_updates_are_the_same_bits_whatever_the_number_of_threads() -> None:
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1, 2):
        torch.set_num_threads(threads)
        table = nn.Parameter(torch.ones(40, 33))
        optimizer = RowAdamW([table], lr=0.1)
        for step in range(3):
            # One slot is named by most entries: a long segment.
            for read in reads(40, 33, [(200, 8)], seed=step, dtype=torch.float32, top=3):
                optimizer.add(table, read)
            optimizer.step()
        results.append(table.detach().clone())
    torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def run_dense(table: Tensor, steps: list[list[Read]], optimizer: Callable[..., Any]) -> Tensor:
    leaf = nn.Parameter(table.clone())
    dense_optimizer = optimizer([leaf])
    for given in steps:
        leaf.grad = dense(len(leaf), given) if given else torch.zeros_like(leaf)
        dense_optimizer.step()
    return leaf.detach()


def run_rows(
    table: Tensor, steps: list[list[Read]], optimizer: Callable[..., RowOptimizer]
) -> tuple[Tensor, RowOptimizer]:
    leaf = nn.Parameter(table.clone())
    row_optimizer = optimizer([leaf])
    for given in steps:
        for read in given:
            row_optimizer.add(leaf, read)
        row_optimizer.step()
    return leaf.detach(), row_optimizer


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_dense_adamw_when_every_row_is_touched(rule: str) -> None:
    table = torch.randn(6, 5, dtype=torch.float64)
    every = Read(
        torch.arange(6)[:, None], torch.ones(6, 1, dtype=torch.float64), torch.zeros(6, 5, dtype=torch.float64)
    )
    steps = [[*reads(6, 5, [(4, 3), (2, 2)], seed=i), every] for i in range(12)]
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    expected = run_dense(table, steps, lambda p: torch.optim.AdamW(p, **settings))
    got, _ = run_rows(table, steps, lambda p: RowAdamW(p, rule=rule, **settings))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_catch_up_makes_up_for_all_that_dense_adamw_does_to_a_row_at_rest() -> None:
    table = torch.randn(8, 5, dtype=torch.float64)
    steps = [reads(8, 5, [(2, 1)], seed=i) for i in range(30)]
    every = Read(torch.arange(8)[:, None], torch.ones(8, 1, dtype=torch.float64), torch.ones(8, 5, dtype=torch.float64))
    steps.append([every])
    settings = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-30}
    expected = run_dense(table, steps, lambda p: torch.optim.AdamW(p, **settings))
    got, _ = run_rows(table, steps, lambda p: RowAdamW(p, rule="catch_up", **settings))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    lazy, _ = run_rows(table, steps, lambda p: RowAdamW(p, rule="lazy", **settings))
    assert (lazy - expected).abs().max() > 1e-3


def test_how_far_one_late_touch_and_silence_move_a_row() -> None:
    """In units of the rate, betas (0.9, 0.999), no bias left: 0.1 / sqrt(0.001) at once, and dense a long tail."""
    late, silent = 8000, 1000
    touch, nothing = (
        Read(torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), x, dtype=torch.float64))
        for x in (1.0, 0.0)
    )
    other = Read(torch.tensor([[0]]), touch.weights, touch.rows)
    steps = [[other]] * late + [[other, touch]] + [[other]] * silent
    moved = {}
    for rule in RULES:
        make = partial(RowAdamW, lr=1.0, betas=(0.9, 0.999), eps=1e-15, rule=rule)
        table, optimizer = run_rows(torch.zeros(2, 1, dtype=torch.float64), steps, make)
        at_rest = -float(table[1, 0])
        optimizer.add(leaf := optimizer.param_groups[0]["params"][0], nothing)
        optimizer.step()
        moved[rule] = (at_rest, -float(leaf.detach()[1, 0]) - at_rest)
    assert moved["lazy"][0] == pytest.approx(3.16, abs=0.01)
    assert moved["lazy_row_step"][0] == pytest.approx(1.0, abs=0.01)
    assert moved["catch_up"][0] == pytest.approx(3.16, abs=0.01)
    assert sum(moved["catch_up"]) == pytest.approx(31.8, abs=0.1)  # what dense AdamW does
    assert moved["lazy"][1] < 3.16


def test_folding_and_order_of_readers_change_no_more_than_rounding() -> None:
    table = torch.zeros(3, 64, dtype=torch.float64)
    given = reads(3, 64, [(50, 8)] * 6)
    folded, plain = (RowSGD([nn.Parameter(table.clone())], lr=1.0) for _ in range(2))
    target = folded.param_groups[0]["params"][0]
    for read in given:
        folded.add(target, read)
    assert sum(read.bytes for read in folded._reads[target]) < sum(read.bytes for read in given) / 4
    folded.step()
    other = plain.param_groups[0]["params"][0]
    plain._reads[other] = given
    plain.step()
    torch.testing.assert_close(target, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(-target.detach(), dense(3, given), rtol=1e-12, atol=1e-12)


def test_bf16_tables_keep_small_updates_in_the_master_and_in_the_mean() -> None:
    """An update of 2^-12 of the weight is lost in bf16; a thousand of them are not."""
    read = Read(torch.arange(64)[:, None], torch.ones(64, 1), torch.full((64, 16), 2.0**-12))
    ends = {}
    for rounding in ("master", "stochastic"):
        table = nn.Parameter(torch.ones(64, 16, dtype=torch.bfloat16))
        optimizer = RowSGD([table], lr=1.0, rounding=rounding)
        for _ in range(1000):
            optimizer.add(table, read)
            optimizer.step()
        assert table.dtype == torch.bfloat16
        ends[rounding] = table.detach().float()
    exact = 1 - 1000 * 2.0**-12
    assert (ends["master"] - exact).abs().max() <= 2.0**-9
    # Each step rounds by less than one unit of 2^-8; the mean over 1,024 elements of their sums by far less.
    assert abs(float(ends["stochastic"].mean()) - exact) < 0.02


def test_stochastic_rounding_is_to_a_neighbour_and_right_in_the_mean() -> None:
    x = torch.tensor([1.0, 1.0 + 2**-9, -3.3, 1e-40, float("inf"), float("nan"), 3.389e38])
    many = torch.stack([stochastically_rounded(x, seed).float() for seed in range(2000)])
    assert torch.equal(many[:, 0], torch.ones(2000))
    assert set(many[:, 1].tolist()) == {1.0, 1.0 + 2**-7}
    assert float(many[:, 1].mean()) == pytest.approx(1 + 2**-9, abs=3 * 2**-7 / 2000**0.5)
    assert many[:, 4].isinf().all()
    assert many[:, 5].isnan().all()


def test_fp16_tables_need_a_master() -> None:
    table = nn.Parameter(torch.ones(4, 2, dtype=torch.float16))
    optimizer = RowSGD([table], rounding="stochastic")
    optimizer.add(table, Read(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.ones(1, 2)))
    with pytest.raises(ValueError, match="fp16"):
        optimizer.step()


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_outside_the_table_is_refused_before_anything_is_written(slot: int) -> None:
    table = nn.Parameter(torch.ones(4, 2))
    optimizer = RowAdamW([table])
    optimizer.add(table, Read(torch.tensor([[0], [slot]]), torch.ones(2, 1), torch.ones(2, 2)))
    with pytest.raises(ValueError, match="the table has 4"):
        optimizer.step()
    assert torch.equal(table, torch.ones(4, 2))


def test_a_read_that_does_not_fit_is_named() -> None:
    table = nn.Parameter(torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"\[1, 1\], \[1, 1\] and \[1, 3\] do not fit a table \[4, 2\]"):
        RowSGD([table]).add(table, Read(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.ones(1, 3)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_bit_for_bit(rule: str, dtype: torch.dtype) -> None:
    steps = [reads(20, 6, [(5, 3)], seed=i, dtype=torch.float32) for i in range(10)]

    def make(p: list[nn.Parameter]) -> RowAdamW:
        return RowAdamW(p, lr=0.1, betas=(0.9, 0.95), rule=rule)

    table = torch.ones(20, 6, dtype=dtype)
    whole, _ = run_rows(table, steps, make)
    half, optimizer = run_rows(table, steps[:5], make)
    saved = optimizer.state_dict()
    assert saved["state"][0]["exp_avg"].dtype == torch.float32

    def resumed(p: list[nn.Parameter]) -> RowAdamW:
        again = make(p)
        again.load_state_dict(saved)
        return again

    rest, _ = run_rows(half, steps[5:], resumed)
    assert torch.equal(rest, whole)


def test_a_tape_holds_the_gradients_that_autograd_would_make() -> None:
    g = torch.Generator().manual_seed(0)
    table, other = (torch.randn(30, 8, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = torch.randn(5, 8, generator=g, dtype=torch.float64, requires_grad=True)
    slots = torch.randint(30, (5, 8), generator=g)
    weights = torch.rand(5, 8, generator=g, dtype=torch.float64, requires_grad=True)

    def forward(reader: Any) -> Tensor:
        y = reader.weighted_gather(table, slots, weights) + expert_lookup(
            x, table, other, slots, weights, reader=reader
        )
        return y.sin().sum()

    expected = torch.autograd.grad(forward(Reader()), (x, weights, table, other))
    tape = Tape()
    forward(tape).backward()
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(weights.grad, expected[1])
    assert table.grad is None
    for parameter, grad in ((table, expected[2]), (other, expected[3])):
        made = [r.read() for r, p in zip(tape.records, tape.tables, strict=True) if p is parameter]
        torch.testing.assert_close(dense(30, made), grad)


def test_taps_take_no_memory() -> None:
    assert new_tap((1000, 1000), torch.zeros(1)).untyped_storage().nbytes() == 4
