"""The machine this process runs on."""

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

from memforge.errors import DeviceError


def cpu_name() -> str:
    """As the system calls it, with what tells processors of one name apart: a virtual machine may say no more than
    "AMD EPYC" of any, and other instructions sum in another order.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    first = {key.strip(): value.strip() for key, _, value in pairs}
    name = first.get("model name") or platform.processor() or platform.machine()
    which = [f"{key.removeprefix('cpu ')} {first[key]}" for key in ("cpu family", "model", "stepping") if key in first]
    flags = first.get("flags", "").split()
    which += [flag for flag in ("avx512f", "avx2") if flag in flags][:1]
    return f"{name} ({', '.join(which)})" if which else name


# Of the environment, and to be set before torch is loaded. OpenMP's threads wait for the next operator by spinning, by
# default for up to 15 ms, on cores that the kernels of memforge_kernels need; asleep at once they are woken for every
# operator. So many turns are about half a millisecond: on two cores a step of the dense demo takes 124 ms (133 by
# default, 187 asleep), one of three memory layers with 2**20 slots 300 ms (370, 420). Large tensors in large pages:
# rows that lie anywhere in a table are read a quarter faster.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}


def set_environment() -> None:
    """What the user has set stays; who sets OpenMP's wait policy has said how threads should wait."""
    for name, value in ENVIRONMENT.items():
        if name != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault(name, value)


# As <malloc.h> numbers them.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_memory() -> None:
    """Have the C library keep what is freed for the next allocation, where it can be told to.

    By default large tensors are returned to the system when they are freed, and a training step asks for the same pages
    again, to be cleared: a fifth of a step of a 134M-parameter model on two cores.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        # Older versions take at most 32 MiB; and once one threshold is set, neither follows what is freed any more.
        if libc.mallopt(M_MMAP_THRESHOLD, 2**30) or libc.mallopt(M_MMAP_THRESHOLD, 2**25):
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def machine_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(needed: int, what: str, *, available: int | None = None, device: str = "this machine") -> None:
    """Raises DeviceError, saying `what` takes how much, when that is more than is available (default: main memory)."""
    available = machine_memory() if available is None else available
    if needed > available:
        raise DeviceError(f"{what} takes {needed / 1e9:,.1f} GB; {device} has {available / 1e9:,.1f} GB")
