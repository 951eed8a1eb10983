"""What named devices can do at most, from their makers' datasheets."""

from collections.abc import Mapping
from dataclasses import dataclass

from memforge.blocks.base import DType


@dataclass(frozen=True)
class Device:
    """Peak dense matrix FLOPs per second in `dtype`, memory bandwidth in bytes per second, and memory in bytes."""

    name: str
    dtype: DType
    flops_per_second: int
    bytes_per_second: int
    memory_bytes: int
    source: str


TERA, GIGA = 10**12, 10**9

# Dense rates, without the factor of two that datasheets print for structured sparsity.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("H100", "bfloat16", 989 * TERA, 3350 * GIGA, 80 * GIGA, "NVIDIA H100 datasheet, SXM5"),
        Device("H200", "bfloat16", 989 * TERA, 4800 * GIGA, 141 * GIGA, "NVIDIA H200 datasheet, SXM"),
        Device("B200", "bfloat16", 2250 * TERA, 8000 * GIGA, 180 * GIGA, "NVIDIA DGX B200 datasheet, one of 8"),
        Device("A100", "bfloat16", 312 * TERA, 2039 * GIGA, 80 * GIGA, "NVIDIA A100 80GB datasheet, SXM4"),
        Device("MI300X", "bfloat16", 1307 * TERA, 5300 * GIGA, 192 * GIGA, "AMD Instinct MI300X datasheet"),
        Device(
            "RTX4090", "bfloat16", 165 * TERA, 1008 * GIGA, 24 * GIGA, "NVIDIA Ada architecture whitepaper, table 2"
        ),
    )
}
