"""Sub-keys that choose no slot any more get a new start beside one that is busy."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memforge.blocks.product_keys.module import ProductKeys
from memforge.training.optimizer import Stepper, derived_seed
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
        layers = {}
        for path, block in stepper.model.named_modules():
            if isinstance(block, ProductKeys):
                keys = block.sub_keys
                layers[path] = _Layer(block, torch.zeros(keys.shape[:3], dtype=torch.int64, device=keys.device))
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
            total += self._revive(layer, generator)
            layer.chosen.zero_()
        return total

    def _revive(self, layer: _Layer, generator: torch.Generator) -> int:
        keys, dead = layer.block.sub_keys, layer.chosen == 0
        if not dead.any():
            return 0
        # One model for each sub-key, drawn by how often it was chosen.
        chances = layer.chosen.double().flatten(0, 1).cpu().clamp(min=1e-9)
        models = torch.multinomial(chances, chances.shape[1], replacement=True, generator=generator).to(keys.device)
        near = keys.flatten(0, 1).gather(1, models[..., None].expand(-1, -1, keys.shape[-1])).view_as(keys)
        size = near.float().square().mean(dim=-1, keepdim=True).sqrt()
        noise = torch.randn(keys.shape, generator=generator).to(keys.device) * NOISE * size
        keys[dead] = (near + noise)[dead].to(keys.dtype)
        self._forget(keys, dead)
        return int(dead.sum())

    def _forget(self, keys: nn.Parameter, dead: Tensor) -> None:
        """The moments of a restarted sub-key are those of another place."""
        for value in self.stepper.dense.state[keys].values():
            if isinstance(value, Tensor) and value.shape == keys.shape:
                value[dead] = 0

    def state(self) -> dict[str, Tensor]:
        return {f"{path}.chosen": layer.chosen for path, layer in self.layers.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for path, layer in self.layers.items():
            layer.chosen.copy_(state[f"{path}.chosen"])
