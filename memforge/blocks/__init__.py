"""The registry of block kinds: one folder per kind, one line here, and nothing else to touch.

Installed packages add kinds of their own through the entry-point group `memforge.blocks`; each entry point is a
`Kind`. Importing this module never imports torch.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Field

from memforge.blocks.attention.spec import KIND as ATTENTION
from memforge.blocks.base import Kind
from memforge.blocks.experts.spec import KIND as EXPERTS
from memforge.blocks.ffn.spec import KIND as FFN
from memforge.blocks.memory.spec import KIND as MEMORY
from memforge.blocks.moe.spec import KIND as MOE
from memforge.blocks.peer.spec import KIND as PEER
from memforge.blocks.values.spec import KIND as VALUES
from memforge.errors import DeviceError

BUILTIN: tuple[Kind, ...] = (ATTENTION, FFN, MEMORY, PEER, MOE, VALUES, EXPERTS)
ENTRY_POINTS = "memforge.blocks"


@cache
def registry() -> Mapping[str, Kind]:
    """Every kind by name, built-in ones first. Raises DeviceError for a plug-in that cannot be used."""
    kinds = [*BUILTIN, *(_loaded(entry) for entry in entry_points(group=ENTRY_POINTS))]
    by_name = {kind.name: kind for kind in kinds}
    if len(by_name) != len(kinds):
        twice = sorted({k.name for k in kinds if sum(o.name == k.name for o in kinds) > 1})
        raise DeviceError(f"two installed packages define the block kind {', '.join(twice)}")
    return by_name


def _loaded(entry: EntryPoint) -> Kind:
    try:
        kind = entry.load()
    except Exception as error:  # a plug-in may fail in any way
        raise DeviceError(f"the block kind {entry.name} ({entry.value}) cannot be loaded: {error}") from error
    if not isinstance(kind, Kind):
        raise DeviceError(f"the block kind {entry.name} ({entry.value}) is not a Kind")
    return kind


def kinds_of(role: Literal["mixer", "block", "pool"]) -> tuple[Kind, ...]:
    return tuple(kind for kind in registry().values() if kind.role == role)


def union_of(role: Literal["mixer", "block", "pool"], part: Literal["spec", "plan"], default: str | None = None) -> Any:
    """The Pydantic type of all kinds of a role, told apart by `kind`; a table without it is of the `default` kind."""
    types = tuple(getattr(kind, part) for kind in kinds_of(role))

    def with_kind(value: Any) -> Any:
        return {"kind": default, **value} if isinstance(value, dict) and "kind" not in value else value

    one = Annotated[Union[types], Field(discriminator="kind")] if len(types) > 1 else types[0]  # noqa: UP007
    return Annotated[one, BeforeValidator(with_kind)] if default else one


def load_module(kind: Kind) -> Any:
    """The nn.Module class of a kind. Imports torch."""
    module, _, name = kind.module.partition(":")
    return getattr(import_module(module), name)
