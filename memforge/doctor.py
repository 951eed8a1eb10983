"""What this machine has, and what memforge will use and why. Nothing here needs torch to be installed."""

import os
import platform
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from memforge import __version__
from memforge.blocks import ENTRY_POINTS
from memforge.machine import ENVIRONMENT, cpu_name, machine_memory
from memforge.storage import cache_dir

PACKAGES = ("torch", "triton", "numba", "numpy", "pydantic", "rich", "typer", "tomli", "tokenizers", "safetensors")
EXTRAS = ("transformers", "tensorboard", "torch-tb-profiler", "product-key-memory")
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", *ENVIRONMENT, "CXX", "CUDA_VISIBLE_DEVICES", "NO_COLOR")
SETTINGS += ("MEMFORGE_CHECKED", "MEMFORGE_TRACEBACK")

Section = Literal["versions", "machine", "devices", "compilers", "caches", "settings", "uses"]


@dataclass(frozen=True)
class Finding:
    """One line: a name, what was found, and whether training cannot go on like this."""

    section: Section
    name: str
    found: str
    broken: bool = False


def findings() -> Iterator[Finding]:
    """Everything in the order it is read: what is there first, what follows from it last."""
    yield from _versions()
    yield from _machine()
    devices = list(_devices())
    yield from devices
    yield from _compilers()
    yield from _caches()
    for name in SETTINGS:
        ours = (
            " (memforge's own, where nothing else was set)"
            if os.environ.get(name) == ENVIRONMENT.get(name, ...)
            else ""
        )
        yield Finding("settings", name, os.environ.get(name, "not set") + ours)
    yield from _uses([device for device in devices if not device.broken])


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "memforge", __version__)
    yield Finding("versions", "python", platform.python_version())
    for name in PACKAGES:
        found = _version(name)
        yield Finding("versions", name, found or "not installed", broken=found is None and name in ("torch", "numba"))
    for name in EXTRAS:
        yield Finding("versions", name, _version(name) or "not installed (optional)")
    for entry in entry_points(group=ENTRY_POINTS):
        yield Finding("versions", f"block kind {entry.name}", entry.value)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> Iterator[Finding]:
    yield Finding("machine", "system", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield Finding("machine", "cpu", f"{cpu_name()}, {len(os.sched_getaffinity(0))} usable cores")
    yield Finding("machine", "memory", f"{machine_memory() / 1e9:,.1f} GB")
    yield Finding("machine", "free disk here", f"{shutil.disk_usage('.').free / 1e9:,.1f} GB")


def _devices() -> Iterator[Finding]:
    if find_spec("torch") is None:
        yield Finding(
            "devices", "torch", "not installed: check, profile, match, explain and diff work, training does not"
        )
        return
    try:
        import torch
    except Exception as error:  # noqa: BLE001  a broken installation fails in any way
        yield Finding("devices", "torch", f"cannot be imported: {error}", broken=True)
        return
    yield Finding("devices", "cpu", f"{torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        capability = f"sm_{device.major}{device.minor}"
        yield Finding("devices", f"cuda:{i}", f"{device.name}, {device.total_memory / 1e9:,.1f} GB, {capability}")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield Finding("devices", "cuda", f"none; {built}")


def _compilers() -> Iterator[Finding]:
    for name, what in (("CXX", "C++"), ("CC", "C")):
        yield Finding("compilers", what, _compiler(name) or f"{os.environ.get(name, 'g++ or gcc')} not found")
    ptxas = _ptxas()
    yield Finding("compilers", "ptxas", str(ptxas) if ptxas else "not found: Triton has none for this platform")


def _compiler(variable: str) -> str | None:
    """Where the program is that an environment variable names, or by default g++ or gcc."""
    words = shlex.split(os.environ.get(variable, "")) or ["g++" if variable == "CXX" else "gcc"]
    return shutil.which(words[0])


def _ptxas() -> Path | None:
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("backends/nvidia/bin/ptxas"), None)


def _caches() -> Iterator[Finding]:
    home = Path.home()
    for name, path in (
        ("memforge", cache_dir()),
        ("torch.compile", Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/tmp") or "/tmp")),
        ("Triton", Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache"))),
    ):
        nearest = next(parent for parent in (path, *path.parents) if parent.exists())
        writable = os.access(nearest, os.W_OK)
        state = "" if path.exists() else ", made when it is needed" if writable else ""
        yield Finding("caches", name, f"{path}{state}{'' if writable else ', cannot be written: nothing is kept'}")


def _uses(devices: list[Finding]) -> Iterator[Finding]:
    """What follows from the above, in sentences."""
    gpus = [device for device in devices if device.name.startswith("cuda:")]
    if gpus:
        yield Finding("uses", "device", f"cuda: {gpus[0].found}; --device cpu for the processor")
        yield Finding(
            "uses", "kernels", "Triton, with the configs of the table nearest to the device (memforge kernels)"
        )
    elif any(device.name == "cpu" for device in devices):
        yield Finding("uses", "device", "cpu, since torch sees no CUDA device")
        yield Finding("uses", "kernels", "those of the CPU, compiled by numba at their first call")
    compiler = _compiler("CXX")
    why = f"since {compiler} is there" if compiler else "off, since there is no C++ compiler"
    yield Finding("uses", "torch.compile", f"for runs that are long enough, {why}" if compiler else why)
    from memforge.cost.calibration import calibration_file, read_calibration

    calibration = read_calibration()
    found = (
        f"of this machine, in {calibration_file()}" if calibration else "none: memforge doctor --calibrate measures it"
    )
    yield Finding("uses", "calibration", found)
