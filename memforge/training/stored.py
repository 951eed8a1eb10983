"""What the files of a checkpoint hold: tensors that each rank has written its part of, read in any other parts."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from memforge.pieces import Piece
from memforge.plan import ModelPlan, ParamRow
from memforge.storage import storage_errors
from memforge.training.ranks import Ranks

# The moment that has a number for each row of a table, and not for each element.
COUNTER = "last"

# As a manifest has it: dimension, start, length and step of the part, and the size of the whole along the dimension.
Cut = list[int]


def own_parts(tensors: Mapping[str, Tensor], plan: ModelPlan, ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, Cut]]:
    """Of parameters and their moments, `path` or `path.moment`, what this rank writes, and of which part it is."""
    rows = {row.path: row for row in plan.params}
    found, cuts = dict[str, Tensor](), dict[str, Cut]()
    for name, tensor in tensors.items():
        row = rows.get(name) or rows[name.rpartition(".")[0]]
        whole = _shape(name, row)
        local, piece = ranks.local(tensor.detach()), _piece(whole, row, ranks)
        if piece is None or local.shape != piece.shape(whole):  # a moment that all ranks have, a count of steps
            if ranks.is_first:
                found[name] = local
        elif ranks.writes(row):
            found[name] = local
            cuts[name] = [piece.dim, piece.start, piece.length, piece.step, whole[piece.dim]]
    return found, cuts


def _shape(name: str, row: ParamRow) -> tuple[int, ...]:
    """That of a parameter, or of a moment of it if this is one that ranks share out as they do the parameter.

    A history of the steps of a table is not: that it may be as long as the table has rows, tells nothing.
    """
    return row.shape[:1] if name == f"{row.path}.{COUNTER}" else row.shape


def _piece(whole: tuple[int, ...], row: ParamRow, ranks: Ranks) -> Piece | None:
    """What a rank has of it; a number for each row is that of all columns."""
    piece = ranks.piece(row)
    return piece if piece is not None and piece.dim < len(whole) else None


def part_of(whole: Tensor, piece: Piece | None) -> Tensor:
    """The part of a tensor that a piece names, a view of it."""
    return whole if piece is None else whole[_index(piece.dim, piece.start, piece.length, piece.step)]


def _index(dim: int, start: int, length: int, step: int) -> tuple[slice, ...]:
    return (*[slice(None)] * dim, slice(start, start + length * step, step))


class Stored:
    """The tensors of one kind in the verified files of a checkpoint, by name."""

    def __init__(self, files: Iterable[Path], cuts: Mapping[str, Mapping[str, Cut]]) -> None:
        """`cuts` of each file by its name."""
        self._parts: dict[str, list[tuple[Path, Cut | None]]] = defaultdict(list)
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with storage_errors(path), safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  it is no mapping
                    cut = cuts.get(path.name, {}).get(name)
                    self._parts[name].append((path, cut))
                    if name not in self._shapes:
                        self._shapes[name] = _whole(opened.get_slice(name).get_shape(), cut)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the whole tensor."""
        return self._shapes[name]

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
            there, found = _overlap(Piece(*cut[:4]), wanted)
            if not there.length or not found.length:  # every rank reads, and as many may have written
                continue
            with storage_errors(path), safe_open(path, framework="pt") as opened:
                part_of(out, there).copy_(_cut(opened, name, found))
        return out


def _whole(part: Iterable[int], cut: Cut | None) -> tuple[int, ...]:
    """The shape of a tensor by that of a part of it."""
    return tuple(cut[4] if cut is not None and dim == cut[0] else size for dim, size in enumerate(part))


def own_tensors(stored: Stored, plan: ModelPlan, ranks: Ranks) -> dict[str, Tensor]:
    """All tensors of a kind by name; of parameters and their moments, the part that this rank has."""
    rows = {row.path: row for row in plan.params}
    found = {}
    for name in stored:
        row = rows.get(name) or rows.get(name.rpartition(".")[0])
        has_parts = row is not None and stored.shape(name) == _shape(name, row)
        found[name] = stored.read(name, _piece(stored.shape(name), row, ranks) if has_parts else None)
    return found


def _overlap(stored: Piece, wanted: Piece | None) -> tuple[Piece, Piece]:
    """Where a stored part goes in the wanted one, and what of it goes there."""
    all_of_it = Piece(stored.dim, stored.start, stored.length, stored.step)
    if wanted is None:
        return all_of_it, Piece(stored.dim, 0, stored.length)
    if wanted.dim != stored.dim:
        return all_of_it, wanted
    # Indices that both have are a progression too: those from the first on by the least common multiple of the steps.
    step = math.lcm(stored.step, wanted.step)
    low, high = max(stored.start, wanted.start), min(stored.indices.stop, wanted.indices.stop)
    candidates = range(low + (stored.start - low) % stored.step, high, stored.step)[: step // stored.step]
    first = next((idx for idx in candidates if idx in wanted.indices), high)
    length = len(range(first, high, step))

    def of(piece: Piece) -> Piece:
        return Piece(piece.dim, (first - piece.start) // piece.step if length else 0, length, step // piece.step)

    return of(wanted), of(stored)


def _cut(opened: safe_open, name: str, piece: Piece) -> Tensor:
    """Only what is asked for is read."""
    if not piece.length:
        return part_of(opened.get_tensor(name), piece)
    found: Tensor = opened.get_slice(name)[_index(piece.dim, piece.start, piece.length, piece.step)]
    return found.contiguous() if piece.step > 1 else found
