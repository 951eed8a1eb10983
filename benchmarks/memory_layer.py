"""A training step of one memory layer: memforge beside plain and sparse PyTorch and the product-key-memory package.

    python benchmarks/memory_layer.py                      # 2**20 slots, all arms, and where the time goes
    python benchmarks/memory_layer.py --sub-keys 2048      # 2**22 slots; the dense arms take 20 GB
    python benchmarks/memory_layer.py --sweep slots        # 2**14 to 2**22, ours; --sweep tokens: 256 to 8,192
    python benchmarks/memory_layer.py --parts              # where the time of ours goes, alone

Every arm runs in a process of its own, and the processes take turns: A B C D, A B C D, .. A step is forward, backward
and update, all parameters in fp32 with AdamW, no clipping. Times are milliseconds, memory is what the process held at
most beyond parameters and optimizer state. Results are written to benchmarks/results/.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memforge.machine import ENVIRONMENT, cpu_name

HERE = Path(__file__).parent
DIM, HEADS, TOP_K, KEY_DIM = 256, 4, 32, 128
STEPS, WARM_UP = 6, 2
PHASES = ("forward", "backward", "update", "step")
# torch as it comes, and as memforge's command line sets it: see there.
SETTINGS = {"default": {}, "memforge": ENVIRONMENT}


class PlainMemory(nn.Module):
    """The layer as the paper has it, on torch's own operators."""

    def __init__(self, sub_keys: int, *, sparse: bool = False) -> None:
        super().__init__()
        self.sub_keys, self.sparse = sub_keys, sparse
        self.query = nn.Linear(DIM, HEADS * KEY_DIM)
        self.keys = nn.Parameter(torch.empty(HEADS, 2, sub_keys, KEY_DIM // 2).uniform_(-0.1, 0.1))
        self.values = nn.Parameter(table(sub_keys))
        self.w1, self.w2 = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        halves = self.query(x).view(n, HEADS, 2, KEY_DIM // 2)
        scores = torch.einsum("nhcd,hcsd->nhcs", halves, self.keys)
        first, i = scores[:, :, 0].topk(TOP_K, dim=-1)
        second, j = scores[:, :, 1].topk(TOP_K, dim=-1)
        best, pair = (first[..., :, None] + second[..., None, :]).flatten(2).topk(TOP_K, dim=-1)
        slots = (i[..., :, None] * self.sub_keys + j[..., None, :]).flatten(2).gather(2, pair)
        weights = best.softmax(-1).flatten(1)
        y = F.embedding_bag(slots.flatten(1), self.values, mode="sum", per_sample_weights=weights, sparse=self.sparse)
        return self.w2(y * F.silu(self.w1(x)))


def table(sub_keys: int) -> Tensor:
    """Values of all slots; a few thousand random rows over and over, so that a large table is made in seconds."""
    rows = torch.randn(min(4096, sub_keys**2), DIM) * DIM**-0.5
    return rows.repeat(-(-(sub_keys**2) // len(rows)), 1)[: sub_keys**2].contiguous()


class Arm:
    """A layer and its optimizers. `loss` is the sum of the output times a fixed random gradient."""

    def __init__(self, sub_keys: int, tokens: int) -> None:
        self.x, self.grad = torch.randn(tokens, DIM, requires_grad=True), torch.randn(tokens, DIM)
        self.build(sub_keys)

    def build(self, sub_keys: int) -> None:
        raise NotImplementedError

    def forward(self) -> Tensor:
        return self.layer(self.x)

    def backward(self, y: Tensor) -> None:
        y.backward(self.grad)

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


class Dense(Arm):
    def build(self, sub_keys: int) -> None:
        self.layer: nn.Module = PlainMemory(sub_keys)
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(self.layer.parameters(), 1e-3, fused=True)]


class Sparse(Arm):
    def build(self, sub_keys: int) -> None:
        self.layer = PlainMemory(sub_keys, sparse=True)
        rest = [p for p in self.layer.parameters() if p is not self.layer.values]
        self.optimizers = [
            torch.optim.AdamW(rest, 1e-3, fused=True),
            torch.optim.SparseAdam([self.layer.values], 1e-3),
        ]


class Package(Arm):
    """It has no gate, so it does less."""

    def build(self, sub_keys: int) -> None:
        from product_key_memory import PKM

        self.layer = PKM(DIM, heads=HEADS, num_keys=sub_keys, topk=TOP_K, dim_head=KEY_DIM // 2)
        self.optimizers = [torch.optim.AdamW(self.layer.parameters(), 1e-3, fused=True)]

    def forward(self) -> Tensor:
        return self.layer(self.x[None])[0]


class Ours(Arm):
    def build(self, sub_keys: int) -> None:
        from memforge.blocks.memory.module import Memory
        from memforge.blocks.memory.spec import MemoryPlan
        from memforge.blocks.values.module import Values
        from memforge.blocks.values.spec import ValuesPlan
        from memforge_kernels import RowAdamW

        rows = {"num_sub_keys": sub_keys, "value_dim": DIM, "dtype": "float32"}
        pool = Values(ValuesPlan(kind="values", path="m.pool", dim=DIM, num_layers=1, **rows))
        pool.values = nn.Parameter(table(sub_keys))
        heads = {"num_heads": HEADS, "top_k": TOP_K, "key_dim": KEY_DIM, "qk_norm": False, "gate": "swilu"}
        plan = MemoryPlan(kind="memory", path="m", dim=DIM, num_layers=1, pool="m.pool", **heads, **rows)
        self.layer = Memory(plan, 1e-5, pool)
        nn.init.uniform_(self.layer.sub_keys, -0.1, 0.1)
        rest = [p for p in self.layer.parameters() if p is not pool.values]
        self.rows = RowAdamW([pool.values], 1e-3)
        self.optimizers = [torch.optim.AdamW(rest, 1e-3, fused=True), self.rows]

    def forward(self) -> Tensor:
        from memforge.blocks.pools import Pools
        from memforge_kernels import Tape

        self.tape = Tape()
        return self.layer(self.x[None], Pools(nn.ModuleDict(), self.tape))[0][0]

    def backward(self, y: Tensor) -> None:
        super().backward(y)
        for table, record in zip(self.tape.tables, self.tape.records, strict=True):
            self.rows.add(table, record.read())


ARMS: Mapping[str, tuple[type[Arm], str]] = {
    "ours": (Ours, "memforge: rows that were read, and no others"),
    "dense": (Dense, "plain PyTorch: F.embedding_bag, dense gradient, fused AdamW"),
    "sparse": (Sparse, "PyTorch: embedding_bag(sparse=True), SparseAdam"),
    "package": (Package, "product-key-memory, dense gradient, fused AdamW; it has no gate"),
}


def held(field: str) -> int:
    """VmRSS, the memory held now, or VmHWM, the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def run_arm(name: str, sub_keys: int, tokens: int) -> dict[str, Any]:
    """Milliseconds of each phase of each step, and the memory beyond parameters and optimizer state."""
    torch.manual_seed(0)
    arm = ARMS[name][0](sub_keys, tokens)
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            # Gradients are gone; what is held is parameters, state and the interpreter.
            before = held("VmRSS")
        start = time.perf_counter()
        y = arm.forward()
        forward = time.perf_counter()
        arm.backward(y)
        del y
        backward = time.perf_counter()
        arm.update()
        end = time.perf_counter()
        if step >= WARM_UP:
            taken = (forward - start, backward - forward, end - backward, end - start)
            for phase, seconds in zip(PHASES, taken, strict=True):
                times[phase].append(1e3 * seconds)
    return {"times": times, "beyond_bytes": held("VmHWM") - before}


def in_process(name: str, sub_keys: int, tokens: int, setting: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", name, "--sub-keys", str(sub_keys), "--tokens", str(tokens)]
    env = {key: value for key, value in os.environ.items() if key not in SETTINGS["memforge"]} | SETTINGS[setting]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2] or "no message"
        return {"failed": f"{why} (exit {done.returncode})"}
    return json.loads(done.stdout)


def compare(arms: list[str], sub_keys: int, tokens: int, rounds: int, settings: list[str]) -> list[dict[str, Any]]:
    """All arms in all settings, taking turns."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number in range(rounds):
        for setting in settings:
            for name in arms:
                say(f"round {number + 1}/{rounds}  {name} ({setting})")
                runs.setdefault((name, setting), []).append(in_process(name, sub_keys, tokens, setting))
    return [{"arm": name, "setting": setting, **pooled(parts)} for (name, setting), parts in runs.items()]


def pooled(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Percentiles over all rounds, or why there are none."""
    if failed := next((part["failed"] for part in parts if "failed" in part), None):
        return {"failed": failed}
    row: dict[str, Any] = {p: percentiles([t for part in parts for t in part["times"][p]]) for p in PHASES}
    return row | {"beyond_bytes": max(part["beyond_bytes"] for part in parts)}


def percentiles(values: list[float]) -> list[float]:
    """The 20th, 50th and 80th."""
    cuts = quantiles(values, n=10, method="inclusive")
    return [round(cuts[i], 2) for i in (1, 4, 7)]


def parts(sub_keys: int, tokens: int) -> dict[str, Any]:
    """Each op of a step alone, on slots as the layer chooses them, beside torch's; and its share of the bandwidth."""
    from memforge_kernels import Read, product_key_topk
    from memforge_kernels.registry import BYTE_FORMULAS
    from memforge_kernels.row_update import adamw_, sorted_gradient, squared_norm

    torch.manual_seed(0)
    ops, values = torch.ops.memforge, table(sub_keys)
    query, keys = torch.randn(tokens, HEADS, KEY_DIM), torch.randn(HEADS, 2, sub_keys, KEY_DIM // 2)
    scores, slots = product_key_topk(query, keys, TOP_K)
    slots, weights, grad = slots.flatten(1), scores.softmax(-1).flatten(1), torch.randn(tokens, DIM)
    read = Read(slots, weights, grad)
    gradient = sorted_gradient([read])
    moments = [torch.zeros_like(values), torch.ones_like(values)]
    coefficients = torch.tensor([[1e-3, 1.0, 1.0, 1.0, 1.0, 0.0]])
    touched, num_bytes = len(gradient.touched), DIM * 4
    leaf_query, leaf_keys = query.clone().requires_grad_(), keys.clone().requires_grad_()
    chosen = product_key_topk(leaf_query, leaf_keys, TOP_K)[0]

    def naive() -> None:
        half = query.view(tokens, HEADS, 2, -1)
        found = torch.einsum("nhcd,hcsd->nhcs", half, keys)
        first, second = found[:, :, 0].topk(TOP_K)[0], found[:, :, 1].topk(TOP_K)[0]
        (first[..., :, None] + second[..., None, :]).flatten(2).topk(TOP_K)

    reads = int(BYTE_FORMULAS[ops.weighted_gather](values, slots, weights))
    dots = int(BYTE_FORMULAS[ops.gather_dot](grad, values, slots))
    work: dict[str, tuple[Callable[[], object], int]] = {
        "product_key_topk": (lambda: product_key_topk(query, keys, TOP_K), 0),
        "  einsum + three topk": (naive, 0),
        "weighted_gather": (lambda: ops.weighted_gather(values, slots, weights), reads),
        "  F.embedding_bag": (
            lambda: F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights),
            reads,
        ),
        "gradient of weights (gather_dot)": (lambda: ops.gather_dot(grad, values, slots), dots),
        "gradient of queries and sub-keys": (lambda: chosen.backward(scores, retain_graph=True), 0),
        "sort by slot": (lambda: sorted_gradient([read]), 0),
        "norm of the gradient, if clipped": (lambda: squared_norm(gradient), 0),
        "update of touched rows (row_adamw_)": (
            lambda: adamw_(values, *moments, gradient, coefficients, betas=(0.9, 0.999), eps=1e-8),
            6 * touched * num_bytes,
        ),
    }
    bandwidth = read_bandwidth()
    rows = {}
    for name, (run, moved) in work.items():
        milliseconds = timed(run)
        rate = moved / (milliseconds[1] / 1e3) if moved else None
        rows[name] = {"ms": milliseconds, "bytes": moved or None, "share": rate / bandwidth if rate else None}
    return {"bandwidth": bandwidth, "reads": slots.numel(), "distinct": touched, "rows": rows}


def timed(run: Callable[[], object], repeats: int = 11) -> list[float]:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return percentiles(times)


def read_bandwidth() -> float:
    """Bytes a second of reading 1 GiB in order: the sum of a vector, the fastest of several."""
    source = torch.ones(2**28)
    return 2**30 / (timed(source.sum, 7)[0] / 1e3)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True, check=False)
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": {name: version(name) for name in ("torch", "numba", "memforge")},
        "commit": commit.stdout.strip(),
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(results: list[dict[str, Any]], where: str) -> None:
    """A table of p20 / p50 / p80, and every step as a ratio to ours as memforge runs it."""
    head = "".join(f"{phase:>24}" for phase in PHASES)
    print(f"\n{where}\n{'arm':9}{'torch set':11}{head}{'beyond':>10}{'to ours':>9}")
    ours = [row["step"][1] for row in results if row["arm"] == "ours" and "step" in row]
    for row in results:
        name = f"{row['arm']:9}{row['setting']:11}"
        if "failed" in row:
            print(f"{name}not run: {row['failed']}")
            continue
        cells = "".join(f"{' / '.join(f'{t:,.0f}' for t in row[phase]):>24}" for phase in PHASES)
        ratio = f"{row['step'][1] / ours[-1]:.2f}" if ours else ""
        print(f"{name}{cells}{row['beyond_bytes'] / 1e6:>7,.0f} MB{ratio:>9}")


def show_parts(found: dict[str, Any]) -> None:
    reads, bandwidth = f"{found['reads']:,} reads of {found['distinct']:,} distinct rows", found["bandwidth"] / 1e9
    print(f"\n{reads}; the bandwidth is {bandwidth:.1f} GB/s")
    for name, row in found["rows"].items():
        share = f"{row['share']:.0%} of it" if row["share"] else ""
        print(f"{name:38}{' / '.join(f'{t:.1f}' for t in row['ms']):>22} ms  {share}")


def sweep(axis: str, rounds: int) -> list[dict[str, Any]]:
    """Ours over slots or tokens, in turns."""
    points = (
        [(s, 2048) for s in (128, 256, 512, 1024, 2048)]
        if axis == "slots"
        else [(1024, n) for n in (256, 1024, 2048, 8192)]
    )
    collected: dict[tuple[int, int], list[dict[str, Any]]] = {point: [] for point in points}
    for number in range(rounds):
        for point in points:
            say(f"round {number + 1}/{rounds}  {point[0] ** 2:,} slots, {point[1]:,} tokens")
            collected[point].append(in_process("ours", *point, "memforge"))
    rows = []
    for (sub_keys, tokens), runs in collected.items():
        row = {phase: percentiles([t for run in runs for t in run["times"][phase]]) for phase in PHASES}
        beyond = max(run["beyond_bytes"] for run in runs)
        rows.append(
            {"slots": sub_keys**2, "tokens": tokens, **row, "beyond_bytes": beyond, **parts_of(sub_keys, tokens)}
        )
    return rows


def parts_of(sub_keys: int, tokens: int) -> dict[str, Any]:
    found = json.loads(
        subprocess.run(
            [sys.executable, __file__, "--parts", "--json", "--sub-keys", str(sub_keys), "--tokens", str(tokens)],
            capture_output=True, text=True, check=True, env={**os.environ, **SETTINGS["memforge"]},
        ).stdout
    )  # fmt: skip
    rows = found["rows"]
    return {
        "distinct": found["distinct"],
        "scoring_ms": rows["product_key_topk"]["ms"][1],
        "row_update_ms": rows["update of touched rows (row_adamw_)"]["ms"][1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sub-keys", type=int, default=1024, help="slots are their square")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", default="ours,dense,sparse,package")
    parser.add_argument("--sweep", choices=("slots", "tokens"))
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--json", action="store_true", help="with --parts: print the record")
    parser.add_argument("--arm", choices=tuple(ARMS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.sub_keys, args.tokens)))
        return
    record: dict[str, Any] = {"machine": machine(), "tokens": args.tokens, "slots": args.sub_keys**2}
    heads = f"{HEADS} heads x {TOP_K}, key_dim {KEY_DIM}, swilu, fp32"
    where = f"{args.sub_keys**2:,} slots x {DIM}, {args.tokens:,} tokens, {heads}"
    if args.parts:
        found = parts(args.sub_keys, args.tokens)
        print(json.dumps(found)) if args.json else show_parts(found)
        return
    if args.sweep:
        record["sweep"] = sweep(args.sweep, args.rounds)
        name = f"memory_layer-{args.sweep}"
        for row in record["sweep"]:
            print(
                f"{row['slots']:>10,} slots {row['tokens']:>6,} tokens  step {row['step'][1]:>7,.0f} ms  "
                f"distinct rows {row['distinct']:>9,}  scoring {row['scoring_ms']:>6.1f} ms  "
                f"rows' update {row['row_update_ms']:>6.1f} ms  beyond {row['beyond_bytes'] / 1e6:,.0f} MB"
            )
    else:
        arms = [arm for arm in args.arms.split(",") if arm != "package" or find_spec("product_key_memory")]
        if "package" in args.arms and "package" not in arms:
            say('package: not run; pip install -c constraints.txt -e ".[bench]" brings it')
        record["arms"] = compare(arms, args.sub_keys, args.tokens, args.rounds, [*SETTINGS])
        name = f"memory_layer-{args.sub_keys}x{args.sub_keys}"
        show(record["arms"], where)
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
