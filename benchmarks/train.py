"""How fast `memforge train` is beside loops that people write: nanoGPT's on stock PyTorch, with embedding_bag tables.

    python benchmarks/train.py                       # all arms in up to 14 minutes; writes results/train.json and .md
    python benchmarks/train.py --quick               # few steps, a small table, to see that it works; writes nothing
    python benchmarks/train.py --arm dense-plain --arm dense-memforge      # these alone; writes nothing

Every arm runs in a process of its own, and the processes take turns: A B C D, A B C D, .. `*-plain` arms are a loop
written here on torch's own operators; `*-memforge` are memforge.training.train() itself with data, telemetry, logs and
checkpoints as they come. Before anything is timed, both models are compared on the same weights: logits, loss and the
norm of all gradients. A time is that of a block of 10 steps between two lines of the log, logging included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest import mock

import torch
from memory_layer import SETTINGS, held, machine, percentiles, say
from plain_loop import PlainDecoder, PlainLoop
from torch import nn
from train_page import page

from memforge import build_model, load_spec, make_plan
from memforge.machine import keep_memory
from memforge.plan import Plan
from memforge.training import Budget, Reporter, loop, train
from memforge.training.data import Corpus, Prefetch, load_corpus
from memforge.training.logs import Logs
from memforge.training.optimizer import Stepper
from memforge.training.telemetry import Telemetry

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "specs" / "demo"
TABLE, SMALL_TABLE = ("pool.facts.num_sub_keys=1024",), ("pool.facts.num_sub_keys=256",)  # 2**20 and 2**16 slots
BLOCK = 10  # steps between two lines of the log: the default of train.log_every, and of nanoGPT
TOLERANCE = 1e-5
MOST_MINUTES = 14.0
# Compiling takes up to a minute with a cold cache; it is in the first step, which is not timed.
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Arm:
    """`loop` is plain, sparse, memforge or overhead; `blocks` of 10 steps are timed after `warm_up` blocks, in every
    round or, where an arm compares within its own process, `once`. With `by_default` it also runs as torch comes.
    """

    loop: str
    spec: str
    overrides: tuple[str, ...] = ()
    compiled: bool = False
    warm_up: int = 2
    blocks: int = 4
    once: bool = False
    by_default: bool = False

    def plan(self) -> Plan:
        compiled = f'train.compile="{"on" if self.compiled else "off"}"'
        chosen = (*self.overrides, compiled, f"train.log_every={BLOCK}")
        return make_plan(load_spec(DEMO / f"{self.spec}.toml", overrides=chosen))

    def quick(self) -> "Arm":
        return replace(self, overrides=SMALL_TABLE if self.overrides else (), warm_up=1, blocks=2)

    @property
    def steps(self) -> int:
        return BLOCK * (self.warm_up + self.blocks)


FEW = {"warm_up": 1, "blocks": 2}  # of the arms whose steps take a second
ARMS = {
    "dense-plain": Arm("plain", "dense", by_default=True),
    "dense-memforge": Arm("memforge", "dense"),
    "dense-plain-compiled": Arm("plain", "dense", compiled=True, by_default=True),
    "dense-memforge-compiled": Arm("memforge", "dense", compiled=True),
    "memory-plain": Arm("plain", "memory", TABLE, by_default=True, **FEW),
    "memory-plain-sparse": Arm("sparse", "memory", TABLE, **FEW),
    "memory-memforge": Arm("memforge", "memory", TABLE, **FEW),
    "memory-plain-compiled": Arm("plain", "memory", TABLE, compiled=True, **FEW),
    "memory-memforge-compiled": Arm("memforge", "memory", TABLE, compiled=True, **FEW),
    "overhead-dense": Arm("overhead", "dense", once=True),
    "overhead-dense-compiled": Arm("overhead", "dense", compiled=True, once=True),
    "overhead-memory": Arm("overhead", "memory", once=True),
    "overhead-memory-compiled": Arm("overhead", "memory", compiled=True, once=True),
}
# Arm, the arm it is compared with, and the least ratio of the latter's time to the former's; None is not judged.
RATIOS: tuple[tuple[str, str, float | None], ...] = (
    ("dense-memforge", "dense-plain", 0.97),
    ("dense-memforge-compiled", "dense-plain-compiled", 0.97),
    ("memory-memforge", "memory-plain", 3.0),
    ("memory-memforge-compiled", "memory-plain-compiled", 3.0),
    ("memory-memforge", "memory-plain-sparse", None),
)
MOST_OVERHEAD = 0.03


def timed_plain(plain: PlainLoop, arm: Arm) -> dict[str, Any]:
    at, losses = [], []
    for step in range(arm.steps):
        loss = plain.step(step)
        if (step + 1) % BLOCK == 0:
            losses.append(loss.item())
            at.append(time.perf_counter())
            if step + 1 == BLOCK * arm.warm_up:
                reset_peak()
    blocks = [(after - before) / BLOCK for before, after in pairwise(at)]
    return {"seconds": blocks[arm.warm_up - 1 :], "peak_bytes": held("VmHWM"), "loss": losses[-1]}


class Rows(Reporter):
    """Takes the time at each row of the log, after it was written."""

    def __init__(self, arm: Arm) -> None:
        self.arm, self.at = arm, list[float]()
        self.seconds, self.told = list[float](), list[float]()
        self.peak_bytes, self.last = 0, dict[str, Any]()

    def start(self, plan: Plan, corpus: Corpus, step: int) -> None:
        run = plan.run.train
        assert run is not None
        self.plan, self.corpus, self.tokens = plan, corpus, run.batch_size * run.seq_len

    def row(self, metrics: dict[str, Any], speed: dict[str, Any], total_steps: int) -> None:
        now, step = time.perf_counter(), metrics["step"]
        if step % BLOCK:  # the first step has a row of its own
            return
        if step > BLOCK * self.arm.warm_up:
            self.measured(now - self.at[-1], speed)
            self.peak_bytes, self.last = held("VmHWM"), metrics
        elif step == BLOCK * self.arm.warm_up:
            reset_peak()
        self.between(step)
        self.at.append(time.perf_counter())

    def measured(self, seconds: float, speed: dict[str, Any]) -> None:
        self.seconds.append(seconds / BLOCK)
        self.told.append(self.tokens / speed["tokens_per_second"])

    def between(self, step: int) -> None:
        """What happens between two blocks, outside of any time."""

    def figures(self) -> dict[str, Any]:
        used = [value for name, value in self.last.items() if name.endswith(".slots_used")]
        found = {"seconds": self.seconds, "told": self.told, "peak_bytes": self.peak_bytes, "loss": self.last["loss"]}
        return found | ({"slots_used": used} if used else {})


class Clock:
    """Seconds by what they went to; what is timed within something else counts there alone."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._within = [0.0]

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._within.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.perf_counter() - start
                self.seconds[name] += taken - self._within.pop()
                self._within[-1] += taken

        return run


# What the loop does in a step. `work` is what any loop has to do; all else is overhead. The norms that a compiled model
# takes of what its memory layers read are part of its graph and stay in `work`.
PARTS: tuple[tuple[str, object, str], ...] = (
    ("work", Stepper, "backward"),
    ("work", Stepper, "update"),
    ("data", Prefetch, "batch"),
    ("slots read", Telemetry, "read"),
    ("observations", Telemetry, "observe"),
    ("figures of a row", Telemetry, "figures"),
    ("updates of a row", loop, "update_figures"),
    ("logs", Logs, "row"),
)


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Times the parts of train() in this process, whose code stays as it is."""
    with ExitStack() as stack:
        for name, owner, attribute in PARTS:
            timed = clock.timed(name, getattr(owner, attribute))
            stack.enter_context(mock.patch.object(owner, attribute, timed))
        yield


class Overhead(Rows):
    """Where the time of train() goes; and after each block the same steps on a bare Stepper, in the same process."""

    def __init__(self, arm: Arm, clock: Clock) -> None:
        super().__init__(arm)
        self.clock, self.before = clock, dict[str, float]()
        self.parts: list[dict[str, float]] = []
        self.bare: list[float] = []

    def start(self, plan: Plan, corpus: Corpus, step: int) -> None:
        super().start(plan, corpus, step)
        run = plan.run.train
        assert run is not None
        self.stream = corpus.stream(run.seq_len + 1, run.seed)
        model = build_model(plan.model, seed=run.seed).train()
        self.stepper = Stepper(model, plan.model, run)
        if self.arm.compiled:
            self.stepper.forward = torch.compile(model.forward_taped, fullgraph=True, dynamic=False)

    def measured(self, seconds: float, speed: dict[str, Any]) -> None:
        super().measured(seconds, speed)
        parts = {name: value - self.before.get(name, 0.0) for name, value in self.clock.seconds.items()}
        parts["the rest"] = seconds - sum(parts.values())
        self.parts.append({name: value / BLOCK for name, value in parts.items()})

    def between(self, step: int) -> None:
        run = self.plan.run.train
        assert run is not None
        steps, b = range(step - BLOCK, step), run.batch_size
        windows = [torch.from_numpy(self.stream.windows(i * b, b)).to(torch.int64) for i in steps]
        shares = [loop.rate_shares(i, run) for i in steps]
        start = time.perf_counter()
        for i, window, share in zip(steps, windows, shares, strict=True):
            self.stepper.update(self.stepper.backward(window, step=i).norm, share)
        if step > BLOCK * self.arm.warm_up:
            self.bare.append((time.perf_counter() - start) / BLOCK)
        self.before = dict(self.clock.seconds)

    def figures(self) -> dict[str, Any]:
        found = super().figures() | {"parts": self.parts, "bare": self.bare}
        del found["told"]  # the run counts what happens between its blocks
        return found


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def run_arm(arm: Arm, setting: str) -> dict[str, Any]:
    """The times of one process."""
    plan = arm.plan()
    if arm.loop in ("plain", "sparse"):
        if setting == "memforge":
            keep_memory()
        corpus = load_corpus(plan, Path())
        torch.manual_seed(1)
        return timed_plain(PlainLoop(plan, corpus, sparse=arm.loop == "sparse", compiled=arm.compiled), arm)
    clock = Clock()
    rows = Overhead(arm, clock) if arm.loop == "overhead" else Rows(arm)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if arm.loop == "overhead":
            stack.enter_context(clocked(clock))
        train(plan, Path(folder) / "run", device="cpu", reporter=rows, budget=Budget(max_steps=arm.steps))
    return rows.figures()


def differences(arm: Arm) -> dict[str, float]:
    """How far the plain model and ours are apart on the same weights and window.

    In fp64, where no two scores are so close that rounding decides which slot is read.
    """
    plan = arm.plan()
    run = plan.run.train
    assert run is not None
    window = torch.from_numpy(load_corpus(plan, Path()).stream(run.seq_len + 1, run.seed).windows(0, 4)).long()
    ours = build_model(plan.model, seed=run.seed).double().train()
    plain = PlainDecoder(plan.model).double()
    plain.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        our_logits = ours(window[:, :-1])[0]
    found = Stepper(ours, plan.model, run).backward(window)
    logits, loss = plain(window[:, :-1], window[:, 1:])
    loss.backward()
    logits, loss = logits.detach(), loss.detach()
    norm = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    return {
        "logits": float((logits - our_logits).abs().max()),
        "loss": abs(float(loss) - float(found.loss)),
        "gradient norm": abs(float(norm) - float(found.norm)) / float(norm),
    }


def require_same(specs: Sequence[str], *, quick: bool) -> dict[str, dict[str, float]]:
    """Raises SystemExit where a plain model is not the same function as ours."""
    found = {}
    for spec in specs:
        say(f"comparing the two {spec} models")
        result = child("--check", f"{spec}-plain", *quickly(quick), setting="memforge")
        if "failed" in result:
            sys.exit(f"the {spec} models cannot be compared: {result['failed']}")
        if not all(value <= TOLERANCE for value in result.values()):  # NaN is not
            sys.exit(f"the plain {spec} model is not the same function, nothing was timed: {result}")
        found[spec] = result
    return found


def child(*arguments: str, setting: str) -> dict[str, Any]:
    """What a process of this script's own prints, or why it did not."""
    env = {key: value for key, value in os.environ.items() if key not in SETTINGS["memforge"]} | SETTINGS[setting]
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {TIMEOUT_SECONDS} s"}
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2] or "no message"
        return {"failed": f"{why} (exit {done.returncode})"}
    return json.loads(done.stdout)


def quickly(quick: bool) -> tuple[str, ...]:
    return ("--quick",) if quick else ()


def measured(names: Sequence[str], rounds: int, *, quick: bool, minutes: float) -> list[dict[str, Any]]:
    """All arms, taking turns. No round begins that would not be done after so many minutes."""
    every = [(name, "memforge") for name in names if not ARMS[name].once]
    once = [] if quick else [(name, "default") for name in names if ARMS[name].by_default]
    once += [(name, "memforge") for name in names if ARMS[name].once]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {turn: [] for turn in (*every, *once)}
    began, longest = time.perf_counter(), 0.0
    for number in range(rounds):
        start = time.perf_counter()
        if start + longest - began > 60 * minutes:
            say(f"{number} of {rounds} rounds: another would take longer than {minutes:g} minutes in all")
            break
        for turn in every:
            runs[turn].append(in_process(*turn, f"round {number + 1}/{rounds}", quick=quick))
        longest = max(longest, time.perf_counter() - start)
        for turn in once if number == 0 else ():
            runs[turn].append(in_process(*turn, "once", quick=quick))
    return [{"arm": name, "setting": setting, **pooled(parts)} for (name, setting), parts in runs.items()]


def in_process(name: str, setting: str, when: str, *, quick: bool) -> dict[str, Any]:
    load, start = os.getloadavg()[0], time.perf_counter()
    found = child("--in-process", name, "--setting", setting, *quickly(quick), setting=setting)
    say(f"{when}  {name} ({setting}): {time.perf_counter() - start:.0f} s, load {load:.2f} before")
    return found | {"load": round(load, 2)}


def pooled(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Percentiles over the blocks of all rounds in milliseconds a step, or why there are none."""
    if failed := next((part["failed"] for part in parts if "failed" in part), None):
        return {"failed": failed}
    row: dict[str, Any] = {
        "step": percentiles([1e3 * t for part in parts for t in part["seconds"]]),
        "rounds": [round(1e3 * median(part["seconds"]), 2) for part in parts],
        "load": [part["load"] for part in parts],
        "peak_bytes": max(part["peak_bytes"] for part in parts),
        "loss": parts[0]["loss"],
    }
    if "told" in parts[0]:
        row["told"] = percentiles([1e3 * t for part in parts for t in part["told"]])
    if "slots_used" in parts[0]:
        row["slots_used"] = fmean(parts[0]["slots_used"])
    if "parts" in parts[0]:
        row |= overhead([block for part in parts for block in part["parts"]])
        pairs = [bare / t for part in parts for bare, t in zip(part["bare"], part["seconds"], strict=True)]
        row["beside_bare_percent"] = round(100 * (1 - median(pairs)), 2)
    return row


def overhead(blocks: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The share of a step that is not work, p20/p50/p80 over blocks in percent, and milliseconds of each part."""
    shares = [100 * (1 - block["work"] / sum(block.values())) for block in blocks]
    names = dict.fromkeys(name for block in blocks for name in block)
    parts = {name: round(1e3 * fmean(block.get(name, 0.0) for block in blocks), 4) for name in names}
    return {"overhead_percent": percentiles(shares), "parts": parts}


def judged(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every claim with what was found: ratios of p50 and the range over the rounds, and overheads."""
    rows = {(row["arm"], row["setting"]): row for row in arms if "failed" not in row}
    found = []
    for ours, other, least in RATIOS:
        for setting in SETTINGS:
            if (us := rows.get((ours, "memforge"))) and (them := rows.get((other, setting))):
                ratio = them["step"][1] / us["step"][1]
                rounds = [b / a for a, b in zip(us["rounds"], them["rounds"], strict=False)]  # some run once
                target = None if least is None else f">= {least:g}"
                holds = None if least is None else ratio >= least
                what = f"{other} ({setting}) / {ours}"
                spread = f"{min(rounds):.2f} to {max(rounds):.2f}"
                row = {"what": what, "found": f"{ratio:.3f}", "rounds": spread, "target": target, "holds": holds}
                found.append({**row, "value": round(ratio, 4)})
    for (name, _), row in rows.items():
        if "overhead_percent" in row:
            share, bare = row["overhead_percent"][1], row["beside_bare_percent"]
            holds = share < 100 * MOST_OVERHEAD
            what = f"{name}: what is not Stepper.backward or update"
            spread = f"{bare:.2f}% beside the bare Stepper"
            target = f"< {100 * MOST_OVERHEAD:g}%"
            row = {"what": what, "found": f"{share:.2f}%", "rounds": spread, "target": target, "holds": holds}
            found.append({**row, "value": share})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=MOST_MINUTES, help="no round begins that would end later")
    parser.add_argument("--quick", action="store_true", help="one round of few steps; nothing is written")
    parser.add_argument("--arm", action="append", choices=tuple(ARMS), help="only this one; may be repeated")
    parser.add_argument("--check", choices=tuple(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--in-process", choices=tuple(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="memforge", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        arm = ARMS[args.check]
        print(json.dumps(differences(arm.quick() if args.quick else arm)))
    elif args.in_process:
        arm = ARMS[args.in_process]
        print(json.dumps(run_arm(arm.quick() if args.quick else arm, args.setting)))
    else:
        compared(args)


def compared(args: argparse.Namespace) -> None:
    """Check, time, judge, print; a whole run at full length is written down."""
    names, rounds = args.arm or list(ARMS), 1 if args.quick else args.rounds
    began = time.perf_counter()
    record: dict[str, Any] = {"machine": machine()}
    record["same"] = require_same(list(dict.fromkeys(ARMS[name].spec for name in names)), quick=args.quick)
    spent = (time.perf_counter() - began) / 60
    record["arms"] = measured(names, rounds, quick=args.quick, minutes=args.minutes - spent)
    record["rounds"] = max(len(row.get("rounds", ())) for row in record["arms"])
    record["claims"] = [row | ({"holds": None} if args.quick else {}) for row in judged(record["arms"])]
    record |= {"load_after": round(os.getloadavg()[0], 2), "minutes": round((time.perf_counter() - began) / 60, 1)}
    print(page(record))
    if args.quick or args.arm:
        say("nothing was written: that takes all arms at full length")
        return
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "train.json").write_text(json.dumps(record, indent=1) + "\n")
    (results / "train.md").write_text(page(record))


if __name__ == "__main__":
    main()
