"""What the files of a checkpoint hold: tensors that each rank has written its part of, read in any other parts."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from memforge.pieces import Piece
from memforge.plan import ModelPlan
from memforge.storage import storage_errors
from memforge.training.ranks import Ranks

# As a manifest has it: dimension, start, length and step of the part, and the size of the whole along the dimension.
Cut = list[int]


def own_parts(tensors: Mapping[str, Tensor], plan: ModelPlan, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Cut]]:
    """Of parameters and their moments, `path` or `path.moment`, what this rank writes, and of which part it is."""
    rows = {row.path: row for row in plan.params}
    found, cuts = dict[str, Tensor](), dict[str, Cut]()
    for name, tensor in tensors.items():
        row = rows.get(name) or rows[name.rpartition(".")[0]]
        local, piece = ranks.local(tensor.detach()), ranks.piece(row)
        if piece is None or local.shape != piece.shape(row.shape):  # a moment that all ranks have, a count of steps
            if ranks.is_first:
                found[name] = local
        elif ranks.writes(row):
            found[name] = local
            cuts[name] = [piece.dim, piece.start, piece.length, piece.step, row.shape[piece.dim]]
    return found, cuts


def part_of(whole: Tensor, piece: Piece | None) -> Tensor:
    """The part of a tensor that a piece names."""
    if piece is None:
        return whole
    if piece.step == 1:
        return whole.narrow(piece.dim, piece.start, piece.length)
    return whole.index_select(piece.dim, torch.tensor(piece.indices, device=whole.device))


class Stored:
    """The tensors of one kind in the verified files of a checkpoint, by name."""

    def __init__(self, files: Iterable[Path], cuts: Mapping[str, Mapping[str, Cut]]) -> None:
        """`cuts` of each file by its name."""
        self._parts: dict[str, list[tuple[Path, Cut | None]]] = defaultdict(list)
        for path in files:
            with storage_errors(path), safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  it is no mapping
                    self._parts[name].append((path, cuts.get(path.name, {}).get(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the whole tensor."""
        path, cut = self._parts[name][0]
        with storage_errors(path), safe_open(path, framework="pt") as opened:
            shape = list(opened.get_slice(name).get_shape())
        if cut is not None:
            shape[cut[0]] = cut[4]
        return tuple(shape)

    def read(self, name: str, wanted: Piece | None = None) -> Tensor:
        """A tensor, or the wanted part of it, put together from those that were stored."""
        parts = self._parts[name]
        path, cut = parts[0]
        if cut is None:
            with storage_errors(path), safe_open(path, framework="pt") as opened:
                return _cut(opened, name, wanted) if wanted is not None else opened.get_tensor(name)
        with storage_errors(path), safe_open(path, framework="pt") as opened:
            sample = opened.get_slice(name)[0:0]
        whole = self.shape(name)
        out: Tensor = sample.new_empty(whole if wanted is None else wanted.shape(whole))
        for path, cut in parts:
            assert cut is not None
            stored = Piece(*cut[:4])
            with storage_errors(path), safe_open(path, framework="pt") as opened:
                found = _overlap(opened, name, stored, wanted)
            if found is not None:
                out.index_copy_(stored.dim, *found)
        return out


def own_tensors(stored: Stored, plan: ModelPlan, ranks: Ranks) -> dict[str, Tensor]:
    """All tensors of a kind by name; of parameters and their moments, the part that this rank has."""
    rows = {row.path: row for row in plan.params}
    found = {}
    for name in stored:
        row = rows.get(name) or rows.get(name.rpartition(".")[0])
        has_parts = row is not None and stored.shape(name) == row.shape
        found[name] = stored.read(name, ranks.piece(row) if has_parts else None)  # type: ignore[arg-type]
    return found


def _overlap(opened: safe_open, name: str, stored: Piece, wanted: Piece | None) -> tuple[Tensor, Tensor] | None:
    """What a stored part has of the wanted one, and where that goes along the dimension it is cut; None: nothing."""
    if wanted is None:
        return torch.tensor(stored.indices), opened.get_tensor(name)
    if wanted.dim != stored.dim:
        return torch.tensor(stored.indices), _cut(opened, name, wanted)
    if stored.step == wanted.step == 1:
        start = max(stored.start, wanted.start)
        length = min(stored.start + stored.length, wanted.start + wanted.length) - start
        if length <= 0:
            return None
        where = torch.arange(start - wanted.start, start - wanted.start + length)
        return where, _cut(opened, name, Piece(stored.dim, start - stored.start, length))
    both = [idx for idx in stored.indices if idx in wanted.indices]
    if not both:
        return None
    here = torch.tensor([stored.indices.index(idx) for idx in both])
    there = torch.tensor([wanted.indices.index(idx) for idx in both])
    return there, opened.get_tensor(name).index_select(stored.dim, here)


def _cut(opened: safe_open, name: str, piece: Piece) -> Tensor:
    """Only what is asked for is read."""
    sliced = opened.get_slice(name)
    if piece.step != 1 or not piece.length:
        return part_of(opened.get_tensor(name), piece)
    index = [slice(None)] * len(sliced.get_shape())
    index[piece.dim] = slice(piece.start, piece.start + piece.length)
    return sliced[tuple(index)]  # type: ignore[no-any-return]
