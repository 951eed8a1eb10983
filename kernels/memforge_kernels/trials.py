"""What each Triton kernel must compute, in float64 with a bound on the error, and sample inputs to try a config on.

The bound of a sum of n terms is 2 * n * 2**-24 * sum|terms| + u_out * |sum|, u_out the unit roundoff of the output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memforge_kernels.gather_dot import kernel as gather_dot
from memforge_kernels.product_key_topk import kernel as product_key_topk
from memforge_kernels.row_update import kernel as row_update
from memforge_kernels.tuning import Config, Key
from memforge_kernels.weighted_gather import kernel as weighted_gather

U32 = 2.0**-24


@dataclass(frozen=True)
class Expected:
    """A float64 result and how far from it each element may be."""

    value: Tensor
    bound: Tensor

    def admits(self, got: Tensor) -> bool:
        return got.shape == self.value.shape and bool(((got.double() - self.value).abs() <= self.bound).all())

    def rounded_to(self, dtype: torch.dtype) -> "Expected":
        """After a rounding up or down, as at random; below the least normal number it is to a multiple of that."""
        if dtype == torch.float32:
            return self
        info = torch.finfo(dtype)
        return Expected(self.value, self.bound + info.eps * (self.value.abs() + self.bound).clamp(min=info.tiny))


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def sum_of(terms: Tensor, axis: int, dtype: torch.dtype) -> Expected:
    """Of fp32 sums of `terms`, in float64, along `axis`, rounded to dtype."""
    value = terms.sum(axis)
    bound = 2 * terms.shape[axis] * U32 * terms.abs().sum(axis) + unit_roundoff(dtype) * value.abs()
    return Expected(value, bound)


def gathered(values: Tensor, slots: Tensor, weights: Tensor, gate: Tensor | None = None) -> Expected:
    """Of weighted_gather; the gate counts as one more term."""
    terms = values.double()[slots] * weights.double()[..., None]  # [n, k, v]
    if gate is not None:
        terms = torch.cat((terms * gate.double()[:, None], torch.zeros_like(terms[:, :1])), dim=1)
    return sum_of(terms, 1, weights.dtype)


def dotted(x: Tensor, values: Tensor, slots: Tensor) -> Expected:
    """Of gather_dot."""
    return sum_of(values.double()[slots] * x.double()[:, None], 2, x.dtype)


def half_scores(query: Tensor, sub_keys: Tensor) -> Expected:
    """Scores of every sub-key, [n, h, 2, s], before any is chosen."""
    (n, h, q), s = query.shape, sub_keys.shape[2]
    halves = query.double().reshape(n, h, 2, 1, q // 2).expand(n, h, 2, s, q // 2)
    return sum_of(halves * sub_keys.double(), 4, torch.float32)


def slot_scores(query: Tensor, sub_keys: Tensor, slots: Tensor) -> Expected:
    """Of product_key_topk for the slots that it chose."""
    halves, s = half_scores(query, sub_keys), sub_keys.shape[2]
    value, bound = (
        part[:, :, 0].gather(2, slots // s) + part[:, :, 1].gather(2, slots % s)
        for part in (halves.value, halves.bound)
    )
    return Expected(value, bound + 2 * U32 * value.abs())


def segment_sums(rows: Tensor, row_idx: Tensor, weights: Tensor, starts: Tensor) -> Expected:
    """Of segment_sum: [u, v]."""
    counts = starts.diff()
    owner = torch.repeat_interleave(counts)
    terms = rows.double()[row_idx] * weights.double()[:, None]
    zeros = terms.new_zeros(len(counts), rows.shape[1])
    value, sizes = zeros.index_add(0, owner, terms), zeros.index_add(0, owner, terms.abs())
    return Expected(value, 2 * counts[:, None] * U32 * sizes + U32 * value.abs())


def squared_norms(rows: Tensor, row_idx: Tensor, weights: Tensor, starts: Tensor) -> Expected:
    """Of squared_norm: the error of each square by that of its sum, and of the sum of squares."""
    sums = segment_sums(rows, row_idx, weights, starts)
    squares = sums.value.square()
    from_sums = ((sums.value.abs() + sums.bound).square() - squares).sum(1)
    return Expected(squares.sum(1), from_sums + 2 * (rows.shape[1] + 1) * U32 * squares.sum(1))


def adamw(
    tables: tuple[Tensor, Tensor, Tensor],
    touched: Tensor,
    grad: Expected,
    steps: row_update.RowSteps,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    scale: float,
) -> tuple[Expected, Expected, Expected]:
    """Of the touched rows of (weights, exp_avg, exp_avg_sq) after adamw_, weights in fp32.

    The error of the gradient goes through each formula to first order; each operation on n terms adds 2 * n * 2**-24
    of their size, n one more than the terms for the coefficients that were rounded.
    """
    weight, first, second = (table[touched].double() for table in tables)
    vectors = (vector.double()[:, None] for vector in steps)
    step_size, inv_sqrt_bias2, decay_first, decay_second, shrink, drift = vectors
    g, g_bound = scale * grad.value, abs(scale) * (grad.bound + 2 * U32 * grad.value.abs())

    drifted = drift * first / (second.sqrt() + eps)
    weight_bound = 8 * U32 * ((shrink * weight).abs() + drifted.abs())
    weight = shrink * weight - drifted
    old, new = beta1 * decay_first * first, (1 - beta1) * g
    first, first_bound = old + new, (1 - beta1) * g_bound + 6 * U32 * (old.abs() + new.abs())
    old, new = beta2 * decay_second * second, (1 - beta2) * g.square()
    second = old + new
    second_bound = (1 - beta2) * ((g.abs() + g_bound).square() - g.square()) + 8 * U32 * second

    denominator = second.sqrt() * inv_sqrt_bias2 + eps
    lowest = (second - second_bound).clamp(min=0).sqrt() * inv_sqrt_bias2 + eps
    step = step_size * first / denominator
    highest_step = step_size * (first.abs() + first_bound) / lowest
    weight_bound += highest_step - step.abs() + 12 * U32 * (step.abs() + weight.abs())
    return (
        Expected(weight - step, weight_bound),
        Expected(first, first_bound),
        Expected(second, second_bound),
    )


def sgd(values: Tensor, touched: Tensor, grad: Expected, *, shrink: float, step: float) -> Expected:
    """Of the touched rows after sgd_, in fp32."""
    kept, step_taken = shrink * values[touched].double(), step * grad.value
    bound = abs(step) * grad.bound + 6 * U32 * (kept.abs() + step_taken.abs())
    return Expected(kept - step_taken, bound)


@dataclass(frozen=True)
class Trial:
    """A kernel on sample inputs: run to be timed, and checked against float64."""

    run: Callable[[Config], Any]
    agrees: Callable[[Config], bool]


def trial(op: str, key: Key, device: torch.device, seed: int = 0) -> Trial:
    """A trial of the shape of `key`: tables in key.dtype, all else in fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    make = {"product_key_topk": _topk_trial, "row_update": _row_trial}.get(op.partition(".")[0], _bag_trial)
    return make(op, key, generator)


def _bag_trial(op: str, key: Key, generator: torch.Generator) -> Trial:
    num_rows = min(2**18, 16 * key.n * key.k)
    values = _normal(generator, num_rows, key.width).to(key.dtype)
    slots = torch.randint(num_rows, (key.n, key.k), generator=generator, device=generator.device)
    x, weights = _normal(generator, key.n, key.width), _normal(generator, key.n, key.k)
    # All bags in float64 would be n * k * width numbers; the kernels treat one bag as any other.
    few = min(key.n, 64)

    def run(config: Config) -> Tensor:
        if op == "gather_dot":
            return gather_dot.gather_dot(x, values, slots, config=config)
        return weighted_gather.weighted_gather(values, slots, weights, config=config)

    def agrees(config: Config) -> bool:
        if op == "gather_dot":
            return dotted(x[:few], values, slots[:few]).admits(run(config)[:few])
        return gathered(values, slots[:few], weights[:few]).admits(run(config)[:few])

    return Trial(run, agrees)


def _topk_trial(op: str, key: Key, generator: torch.Generator) -> Trial:
    heads, half_dim = 4, 128
    query = _normal(generator, key.n // heads, heads, 2 * half_dim).to(key.dtype)
    sub_keys = _normal(generator, heads, 2, key.width, half_dim).to(key.dtype)
    few = min(query.shape[0], 16)

    def run(config: Config) -> tuple[Tensor, Tensor]:
        return product_key_topk.product_key_topk(query, sub_keys, key.k, **{op.partition(".")[2]: config})

    def agrees(config: Config) -> bool:
        scores, slots = (part[:few] for part in run(config))
        expected = slot_scores(query[:few], sub_keys, slots)
        best = torch.ops.memforge.product_key_topk(query[:few].double(), sub_keys.double(), key.k)[0]
        return expected.admits(scores) and Expected(best, expected.bound).admits(scores)

    return Trial(run, agrees)


def _row_trial(op: str, key: Key, generator: torch.Generator) -> Trial:
    """Every fourth row is touched, by k entries each."""
    (u, v), device, entries = (key.n, key.width), generator.device, key.n * key.k
    tables = (
        _normal(generator, 4 * u, v).to(key.dtype),
        _normal(generator, 4 * u, v),
        _normal(generator, 4 * u, v) ** 2,
    )
    touched, starts = torch.arange(u, device=device) * 4, torch.arange(u + 1, device=device) * key.k
    rows, weights = _normal(generator, max(1, entries // 32), v), _normal(generator, entries)
    row_idx = torch.randint(len(rows), (entries,), generator=generator, device=device)
    factors = (rows, row_idx, weights, starts)
    steps = row_update.RowSteps(*torch.tensor([1e-2, 2, 1, 1, 1, 0], device=device)[:, None].expand(6, u))
    numbers = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "scale": 0.5}

    def run(config: Config) -> Tensor | None:
        if op == "row_update.segment_sum":
            return row_update.segment_sum(*factors, config=config)
        if op == "row_update.squared_norm":
            return row_update.squared_norm(*factors, config=config)
        entry = (touched, starts, row_idx, weights, rows)
        if op == "row_update.sgd":
            settings = {"lr": 1e-2, "weight_decay": 0.1, "scale": 0.5, "seed": 0}
            return row_update.sgd_(tables[0], *entry, **settings, config=config)
        return row_update.adamw_(*tables, *entry, **steps._asdict(), **numbers, seed=0, config=config)

    def agrees(config: Config) -> bool:
        sums = segment_sums(*factors)
        if op == "row_update.adamw":
            expected = adamw(tables, touched, sums, steps, **numbers)
        elif op == "row_update.sgd":
            expected = (sgd(tables[0], touched, sums, shrink=1 - 1e-3, step=0.5e-2),)
        else:
            expected = (sums if op == "row_update.segment_sum" else squared_norms(*factors),)
        out = run(config)
        got = [out] if out is not None else [table[touched] for table in tables]
        return all(e.rounded_to(g.dtype).admits(g) for e, g in zip(expected, got, strict=False))

    return Trial(run, agrees)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)
