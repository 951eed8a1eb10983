"""The Triton kernels in the interpreter: `python interpreted_checks.py CHECK` runs one function below.

Outputs are poisoned before each kernel, and what no bag may read holds NaN.
"""

import sys
from collections.abc import Callable
from math import ceil, nan

import torch
from interpreted_builder import poisoned_outputs, traffic
from torch import Tensor

from memforge_kernels import product_key_topk, trials
from memforge_kernels.gather_dot import kernel as gather_dot
from memforge_kernels.product_key_topk import kernel as topk_kernel
from memforge_kernels.row_update import kernel as row_update
from memforge_kernels.trials import Expected
from memforge_kernels.tuning import Config
from memforge_kernels.weighted_gather import kernel as weighted_gather

# Bags, rows per bag, slots, width: ones, odd sizes, more rows than slots, a width past one block of columns, no bag.
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 13), (2, 8, 4, 96), (3, 33, 50, 100), (1, 3, 9, 1000), (2, 2, 9, 768), (0, 4, 5, 6)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bag(n: int, k: int, m: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, slots, weights and x; no slot names the first and the last row, which are NaN.

    The first is what a masked load of a slot names. Slots and weights are not contiguous.
    """
    g = torch.Generator().manual_seed(n + k + v)
    values = torch.randn(m + 2, v, generator=g).to(dtype)
    values[[0, -1]] = nan
    slots = 1 + torch.randint(m, (k, n), generator=g).T
    weights = torch.randn(k, n, generator=g).T
    return values, slots, weights, torch.randn(n, v, generator=g)


def gather() -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            values, slots, weights, gate = bag(*shape, dtype)
            for w in (weights, weights.to(dtype)):
                out = weighted_gather.weighted_gather(values, slots, w)
                assert out.dtype == w.dtype
                assert trials.gathered(values, slots, w).admits(out), (shape, dtype)
            out = weighted_gather.weighted_gather(values, slots, weights, gate.to(dtype))
            assert trials.gathered(values, slots, weights, gate.to(dtype)).admits(out), (shape, dtype)
            equal = torch.ones_like(slots)
            out = weighted_gather.weighted_gather(values, equal, weights)
            assert trials.gathered(values, equal, weights).admits(out), (shape, dtype)


def dot() -> None:
    for shape in SHAPES:
        for dtype in DTYPES:
            values, slots, _, x = bag(*shape, dtype)
            for slots_of in (slots, torch.ones_like(slots)):
                out = gather_dot.gather_dot(x, values, slots_of)
                assert trials.dotted(x, values, slots_of).admits(out), (shape, dtype)
            rounded = x.to(dtype)
            assert trials.dotted(rounded, values, slots).admits(gather_dot.gather_dot(rounded, values, slots))


def topk_scores() -> None:
    """Against float64 where scores do not tie: those of the slots chosen, and the best of all slots."""
    for n, h, s, half, k in [
        (1, 1, 1, 1, 1),
        (3, 2, 7, 5, 3),
        (2, 1, 100, 24, 12),
        (1, 1, 70, 40, 64),
        (0, 1, 4, 2, 2),
    ]:
        for dtype in (torch.float32, torch.bfloat16):
            g = torch.Generator().manual_seed(s)
            query = torch.randn(n, h, 2 * half, generator=g).to(dtype)
            sub_keys = torch.randn(h, 2, s, half, generator=g).to(dtype)
            scores, slots = topk_kernel.product_key_topk(query, sub_keys, k)
            expected = trials.slot_scores(query, sub_keys, slots)
            best = product_key_topk(query.double(), sub_keys.double(), k)[0]
            assert expected.admits(scores), (n, h, s, half, k)
            assert Expected(best, expected.bound).admits(scores), (n, h, s, half, k)
            assert (scores.diff(dim=2) <= 0).all()


def topk_ties() -> None:
    """Bit for bit the op's CPU result on small integers, whose sums are exact and tie in every row."""
    g = torch.Generator().manual_seed(0)
    for s, k in [(9, 9), (70, 9), (12, 8)]:
        query = torch.randint(-2, 3, (4, 2, 6), generator=g).float()
        query[1] = 0  # every score ties, -0 with +0 too
        query[2, 0, 0] = nan  # the first half of one head
        query[3] = nan
        sub_keys = torch.randint(-1, 2, (2, 2, s, 3), generator=g).float()
        sub_keys[1, 0, s // 2] = torch.inf
        below = (query.abs() + 1, -1 - sub_keys.abs())  # below the 0 that a masked sub-key scores
        for q, keys in [
            (query, sub_keys),
            (query, sub_keys.bfloat16()),
            (query.bfloat16(), sub_keys.bfloat16()),
            below,
        ]:
            got, expected = topk_kernel.product_key_topk(q, keys, k), product_key_topk(q, keys, k)
            assert torch.equal(got[1], expected[1]), (s, k)
            assert torch.equal(got[0].isnan(), expected[0].isnan()), (s, k)
            assert torch.equal(got[0].nan_to_num(7), expected[0].nan_to_num(7)), (s, k)
            assert got[1][3].tolist() == [list(range(k))] * 2


def factors(lengths: list[int], v: int, num_rows: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows, row_idx, weights, starts of segments of these lengths; the first and last of `rows` belong to none."""
    g = torch.Generator().manual_seed(v)
    rows = torch.randn(num_rows + 2, v, generator=g)
    rows[[0, -1]] = nan
    starts = torch.tensor([0, *lengths]).cumsum(0)
    row_idx = 1 + torch.randint(num_rows, (int(starts[-1]),), generator=g)
    return rows, row_idx, torch.randn(int(starts[-1]), generator=g), starts


SEGMENTS = [([1], 1), ([1, 2, 1, 1, 5, 3], 13), ([23, 1, 4, 5, 0], 96), ([2, 9], 300), ([], 5)]


def sums() -> None:
    for lengths, v in SEGMENTS:
        for max_entries in (4, 64):
            arguments = factors(lengths, v)
            expected, norms = trials.segment_sums(*arguments), trials.squared_norms(*arguments)
            assert expected.admits(row_update.segment_sum(*arguments, max_entries=max_entries)), (lengths, v)
            assert norms.admits(row_update.squared_norm(*arguments, max_entries=max_entries)), (lengths, v)


def only_long_segments_have_pieces() -> None:
    segments = row_update._split(*factors([23, 1, 4, 5], 8), 4)
    assert segments.pieces is not None
    assert segments.first_piece is not None
    assert segments.first_piece.tolist() == [0, 6, 6, 6, 8]
    assert segments.pieces.shape == (8, 8)
    assert row_update._split(*factors([3, 1, 4], 8), 4).pieces is None


def _tables(touched: Tensor, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(v)
    values, first, second = (torch.randn(3 * len(touched) + 2, v, generator=g) for _ in range(3))
    return values.to(dtype), 0.1 * first, 0.01 * second.square()


def _steps(u: int) -> row_update.RowSteps:
    g = torch.Generator().manual_seed(u)
    low, high = torch.tensor([[1e-3, 1, 0.5, 0.5, 0.9, 0], [1e-2, 3, 1, 1, 1, 1e-2]])[:, :, None]
    return row_update.RowSteps(*(low + (high - low) * torch.rand(6, u, generator=g)))


ADAMW = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "scale": 0.25}


def adamw() -> None:
    for lengths, v in SEGMENTS:
        rows, row_idx, weights, starts = factors(lengths, v)
        u = len(lengths)
        touched, steps = torch.arange(u) * 3, _steps(u)
        grad = trials.segment_sums(rows, row_idx, weights, starts)
        for dtype, has_master in [(d, False) for d in DTYPES] + [(torch.bfloat16, True), (torch.float16, True)]:
            values, first, second = _tables(touched, v, dtype)
            master = values.float() + 1e-4 if has_master else None
            before = [t.clone() for t in (values, first, second)]
            stepped = values if master is None else master
            expected = trials.adamw((stepped, first, second), touched, grad, steps, **ADAMW)
            row_update.adamw_(
                values, first, second, touched, starts, row_idx, weights, rows,
                **steps._asdict(), **ADAMW, seed=2**40 + 1, master=master, max_entries=4,
            )  # fmt: skip
            for want, table in zip(expected, (stepped, first, second), strict=True):
                assert want.rounded_to(table.dtype).admits(table[touched]), (lengths, v, dtype, has_master)
            if master is not None:
                assert torch.equal(values[touched], master[touched].to(dtype))
            rest = torch.ones(len(values), dtype=torch.bool)
            rest[touched] = False
            assert all(torch.equal(t[rest], b[rest]) for t, b in zip((values, first, second), before, strict=True))


def sgd() -> None:
    for lengths, v in SEGMENTS:
        rows, row_idx, weights, starts = factors(lengths, v)
        touched = torch.arange(len(lengths)) * 3
        grad = trials.segment_sums(rows, row_idx, weights, starts)
        for dtype in DTYPES:
            values = _tables(touched, v, dtype)[0]
            expected = trials.sgd(values, touched, grad, shrink=1 - 0.5 * 0.1, step=0.5 * 0.25)
            numbers = {"lr": 0.5, "weight_decay": 0.1, "scale": 0.25, "seed": 3}
            row_update.sgd_(values, touched, starts, row_idx, weights, rows, **numbers, max_entries=4)
            assert expected.rounded_to(dtype).admits(values[touched]), (lengths, v, dtype)


def random_rounding() -> None:
    """The mean of many roundings is the fp32 step, 1/5 of the distance of two bf16 numbers here; a NaN stays one."""
    v, u = 2000, 8
    rows = torch.ones(1, v)
    rows[0, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that any addition overflows
    row_idx, weights = torch.zeros(u, dtype=torch.int64), torch.ones(u)
    touched, starts = torch.arange(u), torch.arange(u + 1)

    def stepped(seed: int) -> Tensor:
        values = torch.ones(u, v, dtype=torch.bfloat16)
        row_update.sgd_(
            values, touched, starts, row_idx, weights, rows, lr=0.2 * 2**-7, weight_decay=0, scale=-1, seed=seed
        )
        assert values[:, 0].isnan().all()
        return values[:, 1:].double()

    got = stepped(1)
    assert set(got.unique().tolist()) == {1, 1 + 2**-7}
    up = (got > 1).double()
    # Five standard deviations of a mean of 16,000 draws of odds 1/5.
    assert abs(up.mean() - 0.2) < 5 * (0.2 * 0.8 / up.numel()) ** 0.5
    assert torch.equal(got, stepped(1))
    assert not torch.equal(got, stepped(2))


def repeated_runs_agree() -> None:
    values, slots, weights, x = bag(3, 33, 10, 100, torch.bfloat16)
    rows, row_idx, entry_weights, starts = factors([23, 1, 4], 100)
    query, sub_keys = torch.randn(2, 1, 8), torch.randn(1, 2, 9, 4)

    def all_results() -> list[Tensor]:
        tables = [torch.ones(3, 100, dtype=torch.bfloat16), torch.zeros(3, 100), torch.zeros(3, 100)]
        row_update.adamw_(
            *tables, torch.arange(3), starts, row_idx, entry_weights, rows,
            **_steps(3)._asdict(), **ADAMW, seed=5, max_entries=4,
        )  # fmt: skip
        return [
            weighted_gather.weighted_gather(values, slots, weights),
            gather_dot.gather_dot(x, values, slots),
            row_update.segment_sum(rows, row_idx, entry_weights, starts, max_entries=4),
            *topk_kernel.product_key_topk(query, sub_keys, 4),
            *tables,
        ]

    first = all_results()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, all_results(), strict=True))


def every_config_agrees() -> None:
    """Tiles smaller and larger than the rows, and blocks that do not divide them."""
    values, slots, weights, x = bag(2, 5, 9, 40, torch.float32)
    rows, row_idx, entry_weights, starts = factors([1, 7, 2], 40)
    for rows_at_a_time, columns in [(1, 16), (4, 32), (8, 64)]:
        config = Config((("BLOCK_K", rows_at_a_time), ("BLOCK_V", columns)))
        out = weighted_gather.weighted_gather(values, slots, weights, config=config)
        assert trials.gathered(values, slots, weights).admits(out)
        config = Config((("BLOCK_U", rows_at_a_time), ("BLOCK_V", columns)))
        out = row_update.squared_norm(rows, row_idx, entry_weights, starts, config=config)
        assert trials.squared_norms(rows, row_idx, entry_weights, starts).admits(out)
    config = Config((("BLOCK_K", 1), ("BLOCK_V", 64)))
    assert trials.dotted(x, values, slots).admits(gather_dot.gather_dot(x, values, slots, config=config))


def offsets_are_64_bit() -> None:
    """A row that starts past 2**31 elements, in a table of which only the pages touched are in memory."""
    table = torch.empty((2**31 + 2**20) // 64, 64, dtype=torch.bfloat16)
    last = table.shape[0] - 1
    table[last] = torch.arange(64)
    slots, one = torch.tensor([[last]]), torch.ones(1, 1)
    assert torch.equal(weighted_gather.weighted_gather(table, slots, one)[0], torch.arange(64.0))
    assert torch.equal(gather_dot.gather_dot(torch.ones(1, 64), table, slots), torch.tensor([[2016.0]]))
    entry = (torch.tensor([last]), torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), torch.ones(1, 64))
    row_update.sgd_(table, *entry, lr=1.0, weight_decay=0.0, scale=1.0, seed=0)
    assert torch.equal(table[last].float(), torch.arange(64.0) - 1)


def bytes_of_gather() -> None:
    """The least is each row, slot and weight once, and each output once: at most 5% above."""
    for dtype, v in [(torch.bfloat16, 1024), (torch.float32, 256), (torch.float32, 1000)]:
        n, k = 2, 32
        values, slots, weights, _ = bag(n, k, 50, v, dtype)
        with traffic() as moved:
            weighted_gather.weighted_gather(values, slots, weights)
        least = n * k * (v * dtype.itemsize + 8 + 4) + n * v * 4
        _within("weighted_gather", dtype, v, moved.read["all"] + moved.written["all"], least, 1.05)


def bytes_of_dot() -> None:
    """The least is each row and slot once, x once, and each product once: at most 25% above."""
    for dtype, v in [(torch.bfloat16, 1024), (torch.float32, 256), (torch.float32, 1000)]:
        n, k = 2, 32
        values, slots, _, x = bag(n, k, 50, v, dtype)
        with traffic(x=x) as moved:
            gather_dot.gather_dot(x, values, slots)
        assert moved.read["x"] == n * v * 4
        least = n * k * (v * dtype.itemsize + 8 + 4) + n * v * 4
        _within("gather_dot", dtype, v, moved.read["all"] + moved.written["all"], least, 1.25)


def bytes_of_adamw() -> None:
    """The least is value and moments of each touched row read and written, and each entry read: at most 25% above."""
    lengths = [1, 1, 2, 1, 9, 1, 1, 3, 1, 1]
    for dtype, v, max_entries in [(torch.float32, 96, 64), (torch.bfloat16, 512, 64), (torch.float32, 256, 4)]:
        rows, row_idx, weights, starts = factors(lengths, v)
        u = len(lengths)
        touched = torch.arange(u)
        values, first, second = _tables(touched, v, dtype)
        with traffic(values=values, first=first, second=second, rows=rows) as moved:
            row_update.adamw_(
                values, first, second, touched, starts, row_idx, weights, rows,
                **_steps(u)._asdict(), **ADAMW, seed=0, max_entries=max_entries,
            )  # fmt: skip
        for table, size in (("values", dtype.itemsize), ("first", 4), ("second", 4)):
            assert moved.read[table] == moved.written[table] == u * v * size
        assert moved.read["rows"] == sum(lengths) * v * 4
        least = 2 * u * v * (dtype.itemsize + 8) + sum(lengths) * (v * 4 + 8 + 4)
        _within(f"adamw_ max_entries {max_entries}", dtype, v, moved.read["all"] + moved.written["all"], least, 1.25)


def bytes_of_topk() -> None:
    """The n * h * 2 * s scores never reach memory: what is written is 2k keys, k scores and k slots per head."""
    n, h, s, half, k = 3, 2, 100, 8, 4
    query, sub_keys = torch.randn(n, h, 2 * half), torch.randn(h, 2, s, half)
    with traffic() as moved:
        topk_kernel.product_key_topk(query, sub_keys, k)
    assert moved.written["all"] == n * h * k * (2 * 8 + 4 + 8)


def _within(kernel: str, dtype: torch.dtype, v: int, moved: int, least: int, factor: float) -> None:
    print(f"{kernel} {dtype} width {v}: {moved / least:.3f} of the least bytes")
    assert moved <= ceil(factor * least), moved / least


CHECKS: tuple[Callable[[], None], ...] = (
    gather,
    dot,
    topk_scores,
    topk_ties,
    sums,
    only_long_segments_have_pieces,
    adamw,
    sgd,
    random_rounding,
    repeated_runs_agree,
    every_config_agrees,
    offsets_are_64_bit,
    bytes_of_gather,
    bytes_of_dot,
    bytes_of_adamw,
    bytes_of_topk,
)

if __name__ == "__main__":
    (check,) = (c for c in CHECKS if c.__name__ == sys.argv[1])
    if check in (offsets_are_64_bit, repeated_runs_agree):
        check()
    else:
        with poisoned_outputs():
            check()
