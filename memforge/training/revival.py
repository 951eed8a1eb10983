"""Sub-keys that choose no slot any more get a new start beside one that is busy."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memforge.blocks.product_keys.module import ProductKeys
from memforge.plan import ParamRow
from memforge.training.optimizer import Stepper, derived_seed
from memforge.training.stored import part_of
from memforge.training.tables import ReadSite
from memforge_kernels import Record
from memforge_kernels.tape import Gathered

# A revived sub-key is its model plus noise of this share of its size: near enough to be chosen for the same queries,
# far enough for the gradient to pull the two apart.
NOISE = 0.1


@dataclass
class _Layer:
    """How often each sub-key [h, 2, s] of one block was part of a chosen slot."""

    block: ProductKeys
    row: ParamRow
    chosen: Tensor


class Reviver:
    """Counts which sub-keys are chosen, and restarts those that never were.

    A slot is a pair of sub-keys: what revives a sub-key brings its whole row, or column, of slots back within reach of
    queries. Their values stay as they are. Ref: the restarts of codes in
    Dhariwal et al. 2020 (2005.00341), section 3.1.
    """

    def __init__(self, stepper: Stepper, layers: dict[str, _Layer]) -> None:
        self.stepper, self.layers = stepper, layers
        inner = stepper.on_read

        def on_read(site: ReadSite, record: Record) -> None:
            if inner is not None:
                inner(site, record)
            self.count(site, record)

        stepper.on_read = on_read

    @classmethod
    def of(cls, stepper: Stepper) -> "Reviver":
        layers, rows = {}, {row.path: row for row in stepper.plan.params}
        for path, block in stepper.model.named_modules():
            if isinstance(block, ProductKeys):
                keys = block.sub_keys
                chosen = torch.zeros(keys.shape[:3], dtype=torch.int64, device=keys.device)
                layers[path] = _Layer(block, rows[f"{path}.sub_keys"], chosen)
        return cls(stepper, layers)

    def count(self, site: ReadSite, record: Record) -> None:
        if not isinstance(record, Gathered):
            return
        layer = self.layers[site.reader]
        h, _, s = layer.chosen.shape
        slots = record.slots.view(len(record.slots), h, -1).transpose(0, 1).reshape(h, -1)
        for half, idx in enumerate((slots // s, slots % s)):
            first = torch.arange(h, device=idx.device)[:, None] * s
            counts = torch.bincount((idx + first).reshape(-1), minlength=h * s)
            layer.chosen[:, half] += counts.view(h, s)

    @torch.no_grad()
    def revive(self, step: int, seed: int) -> int:
        """Restart what was never chosen since the last call; how many sub-keys that were."""
        total = 0
        for path, layer in self.layers.items():
            generator = torch.Generator().manual_seed(derived_seed(seed, "revival", path, step))
            layer.chosen = self.stepper.ranks.total(layer.chosen)
            total += self._revive(layer, generator)
            layer.chosen.zero_()
        return total

    def _revive(self, layer: _Layer, generator: torch.Generator) -> int:
        ranks, dead = self.stepper.ranks, layer.chosen == 0
        if not dead.any():
            return 0
        keys = ranks.whole(layer.block.sub_keys.detach()).clone()
        # One model for each sub-key, drawn by how often it was chosen.
        chances = layer.chosen.double().flatten(0, 1).cpu().clamp(min=1e-9)
        models = torch.multinomial(chances, chances.shape[1], replacement=True, generator=generator).to(keys.device)
        near = keys.flatten(0, 1).gather(1, models[..., None].expand(-1, -1, keys.shape[-1])).view_as(keys)
        size = near.float().square().mean(dim=-1, keepdim=True).sqrt()
        noise = torch.randn(keys.shape, generator=generator).to(keys.device) * NOISE * size
        keys[dead] = (near + noise)[dead].to(keys.dtype)
        piece = ranks.piece(layer.row)
        ranks.local(layer.block.sub_keys).copy_(part_of(keys, piece))
        self._forget(layer.block.sub_keys, part_of(dead[..., None].expand_as(keys), piece))
        return int(dead.sum())

    def _forget(self, keys: nn.Parameter, dead: Tensor) -> None:
        """The moments of a restarted sub-key are those of another place; `dead` is of this rank's part."""
        for value in self.stepper.dense.state[keys].values():
            if isinstance(value, Tensor) and value.shape == keys.shape:
                self.stepper.ranks.local(value)[dead] = 0

    def state(self) -> dict[str, Tensor]:
        """All counts, summed over ranks."""
        return {f"{path}.chosen": self.stepper.ranks.total(layer.chosen) for path, layer in self.layers.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave: of what is summed over ranks, the first has all and the others nothing."""
        for path, layer in self.layers.items():
            layer.chosen.copy_(state[f"{path}.chosen"] if self.stepper.ranks.is_first else torch.zeros(()))
