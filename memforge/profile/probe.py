"""What this machine's CPU does: the rate of a large matrix product and of a large copy, measured."""

import time
from collections.abc import Callable

import torch

from memforge.cost.devices import Device
from memforge.machine import machine_memory

# A product of 2048 x 2048 matrices and a copy of 256 MiB: both beyond the caches, both under a second.
SIDE, COPIED = 2048, 2**28
REPEATS = 5


def probe_cpu() -> Device:
    """The CPU as a device of the roofline, in fp32; takes about two seconds."""
    a, b = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    source = torch.zeros(COPIED, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    multiplying, copying = _best(lambda: torch.mm(a, b)), _best(lambda: target.copy_(source))
    how = f"measured: {SIDE}**3 matrix product and a copy of {COPIED >> 20} MiB, {torch.get_num_threads()} threads"
    # A copy reads and writes every byte.
    return Device("cpu", "float32", int(2 * SIDE**3 / multiplying), int(2 * COPIED / copying), machine_memory(), how)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs: what the machine can do, not what else it did."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])
