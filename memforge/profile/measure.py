"""Real training steps on a CPU: the time they take, and their memory counted in three ways, over steps of their own.

They run in processes of their own, so that what a process holds (RSS) is theirs alone and nothing else is timed.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.profiler import profile

from memforge.build import build_model
from memforge.errors import DeviceError
from memforge.machine import keep_memory
from memforge.plan import Plan, TrainPlan, plan_from_json
from memforge.profile.live import LiveStorage, kept_bytes
from memforge.training.optimizer import Stepper
from memforge.training.schedule import PEAK

# What is measured does not depend on the rates and their schedules.
RATES = {"steps": 1, "learning_rate": 1e-4, "value_learning_rate": 1e-4, "value_schedule": "linear", "decay_steps": 1}
WARM_UP, LEAST_STEPS, MOST_STEPS, ENOUGH_SECONDS = 3, 5, 40, 8.0
# The profiler reports its own start and stop, and blocks that were allocated before, on stderr.
QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclass(frozen=True)
class MeasuredStep:
    """Bytes of a training step that is not the first one.

    `activations`: what the forward pass leaves alive for the backward pass, counted storage by storage.
    `peak`: the most that torch's CPU allocator had given out at once, weights and optimizer state included.
    `peak_tracked`: the same counted storage by storage under a dispatch mode, where gradients of a shared parameter
    are not added in place and temporaries inside torch's own kernels are not seen.
    `process`: the most memory the process held beyond what it held before the model was built (RSS).
    """

    activations: int
    peak: int
    peak_tracked: int
    process: int


@dataclass(frozen=True)
class Spread:
    """Seconds: the median of the steps, and the middle 60% of them."""

    p20: float
    median: float
    p80: float


@dataclass(frozen=True)
class MeasuredTime:
    """Seconds of the phases of a step, over `steps` of them after a warm-up."""

    steps: int
    forward_and_backward: Spread
    update: Spread
    total: Spread


def measure_step(plan: Plan, batch: int, seq_len: int, *, checkpoint_layers: bool = False) -> MeasuredStep:
    """Train the plan's model for a few steps of eager fp32 on a CPU. Raises DeviceError when that fails."""
    return MeasuredStep(**_in_process("memory", plan, batch, seq_len, checkpoint_layers))


def time_step(plan: Plan, batch: int, seq_len: int, *, checkpoint_layers: bool = False) -> MeasuredTime:
    """The same for the time of steps on random tokens."""
    found = _in_process("time", plan, batch, seq_len, checkpoint_layers)
    spreads = {name: Spread(*found[name]) for name in ("forward_and_backward", "update", "total")}
    return MeasuredTime(steps=found["steps"], **spreads)


def _in_process(what: str, plan: Plan, batch: int, seq_len: int, checkpoint_layers: bool) -> dict[str, Any]:
    shape = {"batch": batch, "seq_len": seq_len, "checkpoint_layers": checkpoint_layers}
    request = {"what": what, "plan": plan.to_json(), **shape}
    done = subprocess.run(
        [sys.executable, "-m", "memforge.profile.measure"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **QUIET},
    )
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"the process ended with {done.returncode}"
        raise DeviceError(f"{plan.name}: the step could not be measured: {reason}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def train_plan(plan: Plan, batch: int, seq_len: int, **changes: Any) -> TrainPlan:
    """[train] of a plan, or its defaults, for steps of one pass over [batch, seq_len] tokens."""
    given = {} if plan.run.train is None else plan.run.train.model_dump()
    shape = {"batch_size": batch, "micro_batch_size": batch, "seq_len": seq_len}
    return TrainPlan(**given | RATES | shape | changes)


class _Steps:
    """A model, its optimizer, and training steps, on zeros unless other windows are given."""

    def __init__(self, request: dict[str, Any]) -> None:
        plan = plan_from_json(request["plan"], "the request")
        batch, seq_len = request["batch"], request["seq_len"]
        self.shape = (batch, seq_len + 1)
        self.train = train_plan(plan, batch, seq_len, activation_checkpointing=request["checkpoint_layers"])
        self.plan = plan.model
        self.begin()

    def begin(self) -> None:
        self.model = build_model(self.plan).train()
        self.stepper = Stepper(self.model, self.plan, self.train)

    def step(self) -> None:
        norm = self.stepper.backward(torch.zeros(self.shape, dtype=torch.int64)).norm
        self.stepper.update(norm, PEAK)


def _held(field: str) -> int:
    """VmRSS, the memory held now, or VmHWM, the most since the program started; getrusage would add the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _tracked(steps: _Steps) -> int:
    """The peak of one more step, storage by storage."""
    optimizers = steps.stepper.optimizers
    kept = (value for optimizer in optimizers for moments in optimizer.state.values() for value in moments.values())
    state = [value for value in kept if isinstance(value, torch.Tensor)]
    with LiveStorage([*steps.model.parameters(), *state]) as live:
        steps.step()
    return live.peak


def _allocated(steps: _Steps) -> int:
    """The most that was allocated at once from the second step on; the model is made inside, so that it counts."""
    with profile(profile_memory=True) as trace:
        steps.begin()
        steps.step()
        marker = torch.zeros(12_345, dtype=torch.int8)  # its size marks the end of the first step
        steps.step()
        del marker
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    totals = list(accumulate(sizes))
    return max(totals[sizes.index(12_345) :]) - 12_345


def _times(request: dict[str, Any]) -> dict[str, Any]:
    steps, phases = _Steps(request), list[tuple[float, float, float]]()
    windows = torch.Generator().manual_seed(0)
    begin = time.perf_counter()
    while len(phases) < WARM_UP + LEAST_STEPS or (
        len(phases) < MOST_STEPS and time.perf_counter() - begin < ENOUGH_SECONDS
    ):
        window = torch.randint(steps.plan.vocab_size, steps.shape, generator=windows)
        start = time.perf_counter()
        norm = steps.stepper.backward(window).norm
        middle = time.perf_counter()
        steps.stepper.update(norm, PEAK)
        end = time.perf_counter()
        phases.append((middle - start, end - middle, end - start))
    measured = phases[WARM_UP:]
    spreads = [quantiles(times, n=5, method="inclusive") for times in zip(*measured, strict=True)]
    middles = [median(times) for times in zip(*measured, strict=True)]
    names = ("forward_and_backward", "update", "total")
    found = {name: (cuts[0], mid, cuts[-1]) for name, cuts, mid in zip(names, spreads, middles, strict=True)}
    return {"steps": len(measured), **found}


def _main() -> None:
    keep_memory()
    request = json.load(sys.stdin)
    json.dump(_times(request) if request["what"] == "time" else _memory(request), sys.stdout)


def _memory(request: dict[str, Any]) -> dict[str, Any]:
    before = _held("VmRSS")
    steps = _Steps(request)
    steps.step()
    steps.step()
    process = _held("VmHWM") - before
    tracked = _tracked(steps)
    kept = kept_bytes(steps.model, request["batch"], request["seq_len"])
    del steps.model, steps.stepper
    with ThreadPoolExecutor(1) as fresh:  # the room that kernels keep for each thread is not there yet and counts
        peak = fresh.submit(_allocated, steps).result()
    measured = MeasuredStep(activations=kept, peak=peak, peak_tracked=tracked, process=process)
    return asdict(measured)


if __name__ == "__main__":
    _main()
