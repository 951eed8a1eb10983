"""What named devices can do at most, from their makers' datasheets."""

from collections.abc import Mapping
from dataclasses import dataclass

from memforge.blocks.base import DType

TERA, GIGA = 10**12, 10**9


@dataclass(frozen=True)
class Interconnect:
    """What one device sends to others at most, in one direction and bytes per second.

    `link` is what it sends within a machine of `per_machine` devices, `peer` what goes to one other: as much through a
    switch, less where every two have a link of their own. `network` is what it sends to other machines, None where no
    system is named.
    """

    link: int
    peer: int
    per_machine: int
    network: int | None
    source: str

    def within(self, ranks: int) -> int:
        """What one of so many devices of a machine sends to the others."""
        return min(self.link, self.peer * (ranks - 1))


@dataclass(frozen=True)
class Device:
    """Peak dense matrix FLOPs per second in `dtype`, memory bandwidth in bytes per second, and memory in bytes."""

    name: str
    dtype: DType
    flops_per_second: int
    bytes_per_second: int
    memory_bytes: int
    source: str
    interconnect: Interconnect | None = None


# Datasheets print what links carry in both directions together, twice the rates here; ports are in bits.
HOPPER = Interconnect(
    450 * GIGA, 450 * GIGA, 8, 50 * GIGA, "NVIDIA DGX H100 and H200 datasheets: NVLink 4, eight ConnectX-7 of 400 Gb/s"
)
BLACKWELL = Interconnect(
    900 * GIGA, 900 * GIGA, 8, 50 * GIGA, "NVIDIA DGX B200 datasheet: NVLink 5, eight ConnectX-7 of 400 Gb/s"
)
AMPERE = Interconnect(
    300 * GIGA, 300 * GIGA, 8, 25 * GIGA, "NVIDIA DGX A100 datasheet: NVLink 3, eight ConnectX-6 of 200 Gb/s"
)
CDNA3 = Interconnect(
    448 * GIGA,
    64 * GIGA,
    8,
    50 * GIGA,
    "AMD Instinct MI300X datasheet: seven Infinity Fabric links; AMD Instinct MI300 Series Cluster Reference Guide "
    "(63916): eight ports of 400 Gb/s",
)
# 16 lanes of 16 GT/s in 128b/130b, and as many cards as the 128 lanes of one processor reach.
CARD = Interconnect(31_507_692_307, 31_507_692_307, 8, None, "PCI Express 4.0 x16; AMD EPYC 7003 datasheet: 128 lanes")

# Dense rates, without the factor of two that datasheets print for structured sparsity.
DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("H100", "bfloat16", 989 * TERA, 3350 * GIGA, 80 * GIGA, "NVIDIA H100 datasheet, SXM5", HOPPER),
        Device("H200", "bfloat16", 989 * TERA, 4800 * GIGA, 141 * GIGA, "NVIDIA H200 datasheet, SXM", HOPPER),
        Device(
            "B200", "bfloat16", 2250 * TERA, 8000 * GIGA, 180 * GIGA, "NVIDIA DGX B200 datasheet, one of 8", BLACKWELL
        ),
        Device("A100", "bfloat16", 312 * TERA, 2039 * GIGA, 80 * GIGA, "NVIDIA A100 80GB datasheet, SXM4", AMPERE),
        Device("MI300X", "bfloat16", 1307 * TERA, 5300 * GIGA, 192 * GIGA, "AMD Instinct MI300X datasheet", CDNA3),
        Device(
            "RTX4090",
            "bfloat16",
            165 * TERA,
            1008 * GIGA,
            24 * GIGA,
            "NVIDIA Ada architecture whitepaper, table 2",
            CARD,
        ),
    )
}
