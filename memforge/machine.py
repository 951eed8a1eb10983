"""The machine this process runs on."""

import os

from memforge.errors import DeviceError


def machine_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(needed: int, what: str, *, available: int | None = None, device: str = "this machine") -> None:
    """Raises DeviceError, saying `what` takes how much, when that is more than is available (default: main memory)."""
    available = machine_memory() if available is None else available
    if needed > available:
        raise DeviceError(f"{what} takes {needed / 1e9:,.1f} GB; {device} has {available / 1e9:,.1f} GB")
