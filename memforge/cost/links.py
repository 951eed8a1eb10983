"""The least time that collectives take on the links of a machine and on the network between machines.

Ranks fill one machine after the other, so that a memory group is the first to fit in one, then the shards of the dense
parameters, then copies. Within a machine every rank sends what memforge.cost.wire counts. Of a group that spans
machines, what a gather or a sum brings into a machine enters it once, through the ports of all members there, and goes
on by its links; an exchange sends each rank its own. Latencies are none.
Measured by others, two machines of eight H100 with ports of 200 Gb/s: nccl-tests sums 8.59 GB in 47.5 ms, at least 43.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from memforge.cost.devices import Device, Interconnect
from memforge.cost.wire import Group, Total, ranks_of
from memforge.mesh import Mesh


@cache
def members(group: Group, mesh: Mesh, per_machine: int) -> int:
    """How many ranks of a group are in the machine that has fewest of them; of all groups, where that is least."""
    size = len(ranks_of(group, mesh, 0))
    firsts = range(0, mesh.ranks, size) if group in ("shards", "memory") else range(mesh.ranks // size)
    # Groups whose first ranks are in the same place of their machines lie alike: after so many they repeat.
    groups = (ranks_of(group, mesh, first) for first in firsts[:per_machine])
    return min(min(Counter(rank // per_machine for rank in ranks).values()) for ranks in groups)


def seconds(row: Total, mesh: Mesh, by: Interconnect) -> tuple[float, float | None]:
    """On the links and on the network; None where that is not known."""
    inside = members(row.group, mesh, by.per_machine)
    if inside == row.size:
        return row.sent / by.within(inside), 0.0
    leaving = row.sent * (row.size - inside) / (row.size - 1)
    if row.op != "all_to_all":
        leaving /= inside
    linked = (row.sent - leaving) / by.within(inside) if inside > 1 else 0.0
    return linked, None if by.network is None else leaving / by.network


@dataclass(frozen=True)
class RankRoofline:
    """Seconds of a step of one rank. `link` and `network` are busy for so long; `wire` is the sum over collectives of
    the longer of both. Those of the network are None where it is not known.
    """

    device: Device
    forward: float
    backward: float
    update: float
    link: float
    network: float | None
    wire: float | None

    @property
    def computing(self) -> float:
        return self.forward + self.backward + self.update

    @property
    def overlapped(self) -> float | None:
        """Where all that can be busy at once is."""
        return None if self.network is None else max(self.computing, self.link, self.network)

    @property
    def in_turn(self) -> float | None:
        """Where nothing is sent while anything is computed."""
        return None if self.wire is None else self.computing + self.wire

    def as_dict(self, peak: int, peak_checkpointed: int) -> dict[str, Any]:
        by = self.device.interconnect
        names = ("forward", "backward", "update", "computing", "link", "network", "wire", "overlapped", "in_turn")
        return {
            "device": self.device.name,
            "source": None if by is None else by.source,
            "per_machine": None if by is None else by.per_machine,
            "link_bytes_per_second": None if by is None else by.link,
            "network_bytes_per_second": None if by is None else by.network,
            "fits": peak <= self.device.memory_bytes,
            "fits_checkpointed": peak_checkpointed <= self.device.memory_bytes,
            "seconds": {name: getattr(self, name) for name in names},
        }


def rank_roofline(
    computing: tuple[float, float, float], rows: Sequence[Total], mesh: Mesh, device: Device
) -> RankRoofline:
    """`computing` are the seconds of forward pass, backward pass and update."""
    by = device.interconnect
    if by is None:
        known = None if rows else 0.0
        return RankRoofline(device, *computing, 0.0, known, known)
    times = [seconds(row, mesh, by) for row in rows]
    link = sum(on_link for on_link, _ in times)
    over = [(on_link, on_network) for on_link, on_network in times if on_network is not None]
    if len(over) < len(times):
        return RankRoofline(device, *computing, link, None, None)
    return RankRoofline(device, *computing, link, sum(network for _, network in over), sum(map(max, over)))
