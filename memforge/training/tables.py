"""The value tables that training updates by rows, and how a model reads them in each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memforge.build import build_model
from memforge.plan import LayerPlan, ModelPlan
from memforge_kernels import Read, Record, RowOptimizer, Tape, new_tap


@dataclass(frozen=True)
class ReadSite:
    """One read of a table in a forward pass: the block that makes it, and the shape of what it returns."""

    table: str
    reader: str
    shape: torch.Size


# The reads of each layer in their order.
Sites = list[list[ReadSite]]


def read_sites(plan: ModelPlan, batch: int, seq_len: int) -> Sites:
    """The reads of value tables of each layer in their order, found by running the model on meta."""
    model = build_model(plan, device="meta").train()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tapes = [Tape() for _ in plan.layers]
    with torch.no_grad():
        tokens = torch.zeros(batch, seq_len, dtype=torch.int64, device="meta")
        model.forward_with(tokens, [lambda tape=tape: tape for tape in tapes])
    return [
        [_site(names[id(table)], record, layer) for table, record in zip(tape.tables, tape.records, strict=True)]
        for tape, layer in zip(tapes, plan.layers, strict=True)
    ]


def _site(table: str, record: Record, layer: LayerPlan) -> ReadSite:
    """Blocks of one layer are of different kinds, and so are their pools: a table says which block reads it."""
    reader = next(block for block in layer.blocks if table.startswith(f"{block.pool_path()}."))
    assert record.tap is not None
    return ReadSite(table, reader.path, record.tap.shape)


class RowTables:
    """The tables that a model reads through its tapes, and one row-sparse optimizer for them."""

    def __init__(self, model: nn.Module, names: Sequence[str], optimizer: RowOptimizer) -> None:
        self.optimizer = optimizer
        self.tables = {name: model.get_parameter(name) for name in names}

    def new_taps(self, sites: Sites) -> list[list[Tensor]]:
        """A tap for each read of each layer. Its gradient is in fp32 or better, or the type of the autocast region."""
        return [[new_tap(site.shape, self._full(self.tables[site.table])) for site in layer] for layer in sites]

    @staticmethod
    def _full(table: Tensor) -> Tensor:
        return table.new_zeros((), dtype=torch.promote_types(table.dtype, torch.float32))

    def touched(self) -> dict[str, Tensor]:
        """The rows [u] of each table that the coming update will move."""
        return {name: self.optimizer.touched(table) for name, table in self.tables.items()}

    def add(
        self,
        sites: Sites,
        records: Sequence[Sequence[Record]],
        of_all_copies: Callable[[Tensor, Read], Read] = lambda table, read: read,
    ) -> None:
        """Hand the optimizer the gradients of all reads, after the backward pass; `of_all_copies` adds the reads that
        other ranks have made of the same part of a table.

        Raises ValueError for a table that is read both through a tape and by autograd.
        """
        for layer, made in zip(sites, records, strict=True):
            for site, record in zip(layer, made, strict=True):
                if (read := record.read()) is not None:
                    table = self.tables[site.table]
                    self.optimizer.add(table, of_all_copies(table, read))
        for name, table in self.tables.items():
            if table.grad is not None:
                raise ValueError(f"{name} is read without the reader that its block was given")
