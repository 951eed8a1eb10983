"""Measures the curves of a Calibration on this CPU: each op alone, at several sizes, the median of several runs."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memforge.blocks import registry
from memforge.blocks.base import Kind
from memforge.blocks.pools import Pools
from memforge.build import build_model
from memforge.cost.calibration import Calibration, Curve, Passes, kept_bytes, op_seconds
from memforge.machine import cpu_name, keep_memory
from memforge.plan import make_model_plan
from memforge.spec.schema import Spec
from memforge_kernels import Tape, gather_dot, product_key_topk, weighted_gather
from memforge_kernels.row_update.gradient import Read, sorted_gradient
from memforge_kernels.row_update.op import adamw_, squared_norm

# Tokens that the ops are given; small batches of narrow models leave the caches no more than this does.
TOKENS = 2048
# Side of the matrices of a product of TOKENS rows: 1 MFLOP to 17 GFLOP.
WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
SEQUENCES = (16, 32, 64, 128, 256, 512, 1024)
SUB_KEYS = (16, 64, 256, 1024)
TABLE_ROWS = (2**8, 2**12, 2**16, 2**20)
SIZES = (2**14, 2**17, 2**20, 2**23, 2**26)
COPIED = 2**26
BLOCK_TOKENS = (16, 128, 1024, 4096)
REPEATS, LEAST_SECONDS = 5, 2e-3
Step = Callable[[str], None]


def calibrate(progress: Step = lambda _: None) -> Calibration:
    """Under a minute on two cores; the largest table takes 3 GiB with its optimizer state."""
    torch.manual_seed(0)
    keep_memory()
    ops = Calibration(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        torch=version("torch"),
        matmul=_passes(progress, "matrix products", WIDTHS, _matmul, size=lambda width: 2.0 * TOKENS * width**2),
        stream=_stream(progress),
        attention=_passes(progress, "attention", SEQUENCES, _attention),
        scoring=_passes(progress, "product keys", SUB_KEYS, _scoring),
        rows=_passes(progress, "rows of tables", TABLE_ROWS, _rows, size=lambda rows: rows * ROW_BYTES),
        frame=tuple(_curve(progress, "norms and adds", SIZES, _frame)),
        loss=tuple(_curve(progress, "the loss", SIZES, _loss)),
        update=tuple(_curve(progress, "updates", (2**8, 2**12, 2**16, 2**20, 2**24), _update)),
        blocks={},
        **_row_updates(progress),
    )
    return replace(
        ops, blocks={kind.name: _block(progress, kind, ops) for kind in registry().values() if kind.role != "pool"}
    )


def _passes(
    progress: Step,
    what: str,
    sizes: tuple[int, ...],
    build: Callable[[int], tuple[Callable[[], Any], Callable[[], Any], float, float]],
    size: Callable[[int], float] = float,
) -> Passes:
    """`build` gives, for a size, both passes and the units of work in each."""
    forward, backward = [], []
    for number in sizes:
        progress(f"{what}, {number:,}")
        run, back, work, back_work = build(number)
        forward.append((size(number), _seconds(run) / work))
        backward.append((size(number), _seconds(back) / back_work))
    return Passes(tuple(forward), tuple(backward))


def _curve(
    progress: Step,
    what: str,
    sizes: tuple[int, ...],
    build: Callable[[int], tuple[Callable[[], Any], float]],
    size: Callable[[int], float] = float,
) -> Iterator[tuple[float, float]]:
    for number in sizes:
        progress(f"{what}, {number:,}")
        run, work = build(number)
        yield size(number), _seconds(run) / work


def _seconds(run: Callable[[], Any]) -> float:
    """Of one run: the median of several, each long enough to be timed."""
    run()
    start = time.perf_counter()
    run()
    loops = max(1, int(LEAST_SECONDS / max(time.perf_counter() - start, 1e-9)))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(loops):
            run()
        times.append((time.perf_counter() - start) / loops)
    return median(times)


def _backward(output: Tensor, inputs: list[Tensor]) -> Callable[[], Any]:
    """The backward pass alone, over and over."""
    grad = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True)


def _matmul(width: int) -> tuple[Callable[[], Any], Callable[[], Any], float, float]:
    x = torch.randn(TOKENS, width, requires_grad=True)
    weight = torch.randn(width, width, requires_grad=True)
    flops = 2.0 * TOKENS * width * width
    return lambda: F.linear(x, weight), _backward(F.linear(x, weight), [x, weight]), flops, 2 * flops


def _stream(progress: Step) -> float:
    progress("a copy")
    source = torch.ones(COPIED)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source)) / (2 * 4 * COPIED)


HEADS, HEAD_DIM = 4, 32


def _attention(tokens: int) -> tuple[Callable[[], Any], Callable[[], Any], float, float]:
    shape = (max(1, TOKENS // tokens), HEADS, tokens, HEAD_DIM)
    given = [torch.randn(shape, requires_grad=True) for _ in range(3)]

    def run() -> Tensor:
        return F.scaled_dot_product_attention(*given, is_causal=True)

    flops = 4.0 * shape[0] * HEADS * tokens * tokens * HEAD_DIM
    return run, _backward(run(), given), flops, 2 * flops


QUERY, CHOSEN = 64, 16


def _scoring(sub_keys: int) -> tuple[Callable[[], Any], Callable[[], Any], float, float]:
    query = torch.randn(TOKENS, HEADS, QUERY, requires_grad=True)
    keys, k = torch.randn(HEADS, 2, sub_keys, QUERY // 2, requires_grad=True), min(CHOSEN, sub_keys)
    scores, _ = product_key_topk(query, keys, k)
    work = TOKENS * HEADS * QUERY
    run = lambda: product_key_topk(query, keys, k)  # noqa: E731  called later
    return run, _backward(scores, [query, keys]), float(work * sub_keys), float(work * k)


ROW_WIDTH, READ = 256, 64
ROW_BYTES = 4 * ROW_WIDTH


def _bags(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A table, and slots and weights of every token."""
    return torch.randn(rows, ROW_WIDTH), torch.randint(rows, (TOKENS, READ)), torch.rand(TOKENS, READ)


def _rows(rows: int) -> tuple[Callable[[], Any], Callable[[], Any], float, float]:
    (table, slots, weights), grad = _bags(rows), torch.randn(TOKENS, ROW_WIDTH)
    moved = float(slots.numel() * ROW_BYTES)
    return lambda: weighted_gather(table, slots, weights), lambda: gather_dot(grad, table, slots), moved, moved


def _row_updates(progress: Step) -> dict[str, Curve]:
    """Sorting and summing what was read, per byte; and the update of what was touched, without the sums it makes."""
    sums, updates = [], []
    for rows in TABLE_ROWS:
        progress(f"updates of rows, {rows:,}")
        (table, slots, weights), grad = _bags(rows), torch.randn(TOKENS, ROW_WIDTH)
        moments = torch.zeros_like(table), torch.zeros_like(table)
        coefficients = torch.tensor([[1e-3, 1.0, 1.0, 1.0, 1.0, 0.0]])
        read, rates = Read(slots, weights, grad), {"betas": (0.9, 0.95), "eps": 1e-8}
        gradient = sorted_gradient([read])
        sorting = _seconds(lambda read=read: sorted_gradient([read]))
        summing = _seconds(lambda gradient=gradient: squared_norm(gradient))
        whole = _seconds(
            lambda t=table, m=moments, g=gradient, c=coefficients, r=rates: adamw_(t, *m, g, c, **r)  # type: ignore[arg-type]
        )
        size = float(rows * ROW_BYTES)
        sums.append((size, (sorting + 2 * summing) / (slots.numel() * ROW_BYTES)))
        updates.append((size, max(whole - summing, 0.1 * whole) / (len(gradient.touched) * ROW_BYTES)))
    return {"row_sums": tuple(sums), "row_update": tuple(updates)}


def _frame(size: int) -> tuple[Callable[[], Any], float]:
    """Two norms and two residual adds on a stream of `size` bytes."""
    x = torch.randn(max(1, size // 4 // DIM), DIM, requires_grad=True)
    first, second = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
    grad = torch.randn_like(x)

    def run() -> None:
        y = x + first(x)
        torch.autograd.grad(y + second(y), [x, *first.parameters(), *second.parameters()], grad)

    return run, float(x.numel() * 4)


def _loss(size: int) -> tuple[Callable[[], Any], float]:
    vocab = 1024
    logits = torch.randn(max(1, size // 4 // vocab), vocab, requires_grad=True)
    targets = torch.randint(vocab, (logits.shape[0],))
    return lambda: torch.autograd.grad(F.cross_entropy(logits, targets), [logits]), float(logits.numel() * 4)


MATRICES = 8


def _update(elements: int) -> tuple[Callable[[], Any], float]:
    """Several parameters of so many elements each."""
    parameters = [nn.Parameter(torch.randn(elements)) for _ in range(MATRICES)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, 1e-4, fused=True)

    def run() -> None:
        grads = [p.grad for p in parameters if p.grad is not None]
        nn.utils.get_total_norm(grads)
        torch._foreach_mul_(grads, 0.999)
        optimizer.step()

    return run, float(MATRICES * elements)


DIM, SEQUENCE = 128, 64


def _block(progress: Step, kind: Kind, ops: Calibration) -> Curve:
    """What a block takes beside its ops, per byte that it keeps."""
    mixer = {"num_heads": HEADS} | (dict(kind.examples[0]) if kind.role == "mixer" else {})
    block = dict(kind.examples[0]) if kind.role == "block" else {"hidden_dim": DIM}
    model = {"name": "one", "dim": DIM, "num_layers": 1, "vocab_size": 16, "max_seq_len": SEQUENCE}
    place = [
        {"layers": "all", "block": {"kind": "ffn"} | block | ({"kind": kind.name} if kind.role == "block" else {})}
    ]
    plan = make_model_plan(Spec.model_validate({"model": model, "attention": mixer, "place": place}))
    layer, part = build_model(plan).train().layers[0], next(p for p in plan.layers[0].parts if p.kind == kind.name)
    points = []
    for tokens in BLOCK_TOKENS:
        progress(f"{kind.name}, {tokens:,} tokens")
        batch, length = max(1, tokens // SEQUENCE), min(tokens, SEQUENCE)
        x = torch.randn(batch, length, DIM, requires_grad=True)
        run = _both_passes(layer, part.kind, x)
        seconds, kept = _seconds(run), kept_bytes(part, batch, length)
        expected = sum(op_seconds(cost, ops) for cost in part.costs(batch, length))
        points.append((float(kept), max(seconds - expected, 0.02 * seconds) / kept))
    return tuple(points)


def _both_passes(layer: Any, kind: str, x: Tensor) -> Callable[[], Any]:
    module = getattr(layer, kind)
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> None:
        y, losses = (module(x), {}) if kind == layer.mixer_kind else module(x, Pools(nn.ModuleDict(), Tape()))
        torch.autograd.grad(y.sum() + sum(losses.values(), torch.zeros(())), inputs, allow_unused=True)

    return run
