"""A trace of training steps in which every block appears under its spec path, forward and backward."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule, tensorboard_trace_handler

from memforge.build import build_model
from memforge.machine import keep_memory
from memforge.plan import ModelPlan, Plan
from memforge.profile.measure import train_plan
from memforge.storage import storage_errors
from memforge.training.optimizer import Stepper
from memforge.training.schedule import PEAK

WARM_UP, ACTIVE = 2, 3


def write_trace(plan: Plan, directory: Path, batch: int, seq_len: int, report: dict[str, Any]) -> list[Path]:
    """Run a few steps on the CPU, as [train] has them; the files that were written.

    NAME.*.pt.trace.json is for Perfetto, chrome://tracing and the profiler page of TensorBoard; with tensorboard
    installed, an event file holds the ledger (`report`) by block. Raises StorageError where they cannot be written.
    """
    keep_memory()
    before = set(directory.iterdir())
    train = train_plan(plan, batch, seq_len)
    model = build_model(plan.model).train()
    stepper = Stepper(model, plan.model, train)
    handler = tensorboard_trace_handler(str(directory), worker_name=plan.name)
    windows = torch.Generator().manual_seed(0)
    with (
        storage_errors(directory),
        named_blocks(model, plan.model),
        profile(
            activities=[ProfilerActivity.CPU],
            schedule=schedule(wait=0, warmup=WARM_UP, active=ACTIVE),
            on_trace_ready=handler,
            record_shapes=True,
            profile_memory=True,
        ) as trace,
    ):
        for _ in range(WARM_UP + ACTIVE):
            window = torch.randint(plan.model.vocab_size, (batch, seq_len + 1), generator=windows)
            with record_function("forward and backward"):
                norm = stepper.backward(window).norm
            with record_function("update"):
                stepper.update(norm, PEAK)
            trace.step()
        _write_events(directory, report)
    return sorted(set(directory.iterdir()) - before)


@contextmanager
def named_blocks(model: nn.Module, plan: ModelPlan) -> Iterator[None]:
    """Inside, the profiler sees each mixer and block as a range called by its path, `.backward` added in that pass."""
    handles = []
    for layer in plan.layers:
        for part in layer.parts:
            handles += _ranges(model.get_submodule(part.path), part.path)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ranges(module: nn.Module, path: str) -> list[Any]:
    open_ranges: dict[str, Any] = {}

    def begin(name: str) -> None:
        end(name)  # of a pass that ended elsewhere
        open_ranges[name] = record_function(name)
        open_ranges[name].__enter__()

    def end(name: str) -> None:
        if name in open_ranges:
            open_ranges.pop(name).__exit__(None, None, None)

    back = f"{path}.backward"
    return [
        module.register_forward_pre_hook(lambda *_: begin(path)),
        module.register_forward_hook(lambda *_: end(path)),
        module.register_full_backward_pre_hook(lambda *_: begin(back)),
        module.register_full_backward_hook(lambda *_: end(back)),
    ]


def _write_events(directory: Path, report: dict[str, Any]) -> None:
    """The ledger as TensorBoard scalars, over layers; nothing without tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return
    with SummaryWriter(str(directory)) as events:
        for layer in report["layers"]:
            for block in layer["blocks"]:
                for name in ("params", "active_params", "bytes_read"):
                    events.add_scalar(f"ledger/{name}/{block['kind']}", block[name], layer["idx"])
                flops = block["flops_per_token"]["total"]
                events.add_scalar(f"ledger/flops_per_token/{block['kind']}", flops, layer["idx"])
        for device in report["roofline"]:
            for phase, seconds in device["seconds"].items():
                events.add_scalar(f"roofline/{device['device']}/{phase}_ms", seconds * 1e3, 0)
