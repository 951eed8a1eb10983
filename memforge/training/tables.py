"""The value tables that training updates by rows, and how a model reads them in each step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memforge.build import build_model
from memforge.plan import ModelPlan
from memforge_kernels import Record, RowOptimizer, Tape, new_tap


@dataclass(frozen=True)
class ReadSite:
    """One read of a table in a forward pass, and the shape of what it returns."""

    table: str
    shape: torch.Size


def read_sites(plan: ModelPlan, batch: int, seq_len: int) -> list[list[ReadSite]]:
    """The reads of value tables of each layer in their order, found by running the model on meta."""
    model = build_model(plan, device="meta").train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tapes = [Tape() for _ in plan.layers]
    with torch.no_grad():
        tokens = torch.zeros(batch, seq_len, dtype=torch.int64, device="meta")
        model.forward_with(tokens, [lambda tape=tape: tape for tape in tapes])
    return [
        [ReadSite(names[id(table)], tap.shape) for table, tap in zip(tape.tables, tape.taps, strict=True)]
        for tape in tapes
    ]


class RowTables:
    """The tables that a model reads through its tapes, and one row-sparse optimizer for them."""

    def __init__(self, model: nn.Module, sites: list[list[ReadSite]], optimizer: RowOptimizer) -> None:
        self.sites, self.optimizer = sites, optimizer
        self.tables = {site.table: model.get_parameter(site.table) for layer in sites for site in layer}

    def new_taps(self) -> list[list[Tensor]]:
        """A tap for each read of each layer. Its gradient is in fp32, or in the type of the autocast region."""
        like = next(iter(self.tables.values())).new_zeros((), dtype=torch.float32)
        return [[new_tap(site.shape, like) for site in layer] for layer in self.sites]

    def add(self, taps: list[list[Tensor]], records: Sequence[Sequence[Record]]) -> None:
        """Hand the optimizer the gradients of all reads, after the backward pass.

        Raises ValueError for a table that is read both through a tape and by autograd.
        """
        for layer, layer_taps, layer_records in zip(self.sites, taps, records, strict=True):
            for site, tap, record in zip(layer, layer_taps, layer_records, strict=True):
                if tap.grad is not None:
                    self.optimizer.add(self.tables[site.table], record.read(tap.grad))
        for name, table in self.tables.items():
            if table.grad is not None:
                raise ValueError(f"{name} is read without the reader that its block was given")
