"""Keys of a spec by name: as they stand in it (place.0.block.top_k), or as a field of a kind (moe.num_experts)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from memforge.blocks.base import KindSpec
from memforge.errors import Diagnostic, KeyPath, SpecError, dotted, printable
from memforge.spec.document import Source
from memforge.spec.explain import nearest
from memforge.spec.schema import Spec


@dataclass(frozen=True)
class Key:
    """One name and every place of the spec it stands for; a field of a kind may be in several tables."""

    name: str
    places: tuple[KeyPath, ...]

    def values(self, spec: Spec) -> tuple[Any, ...]:
        """What stands at each of its places, defaults included."""
        return tuple(value_of(spec, place) for place in self.places)


def find_key(spec: Spec, name: str, option: str) -> Key:
    """The key called `name`. Raises SpecError, positioned in the option it was given in, with the nearest known one."""
    name = name.strip()
    known = known_keys(spec)
    if name in known:
        return Key(name, known[name])
    column, head = 0, ""
    for part in name.split("."):
        longer = f"{head}.{part}" if head else part
        if not any(key == longer or key.startswith(f"{longer}.") for key in known):
            break
        column, head = len(longer) + 1, longer
    if column > len(name) > 0:
        column, message = 0, f"`{printable(name)}` is a table, not a key"
    else:
        message = f"unknown key `{printable(name)}`"
    hint = nearest(name, list(known)) or "`memforge render --defaults` prints every key"
    where = Source(option, name).position(0, min(column, max(0, len(name) - 1)), len(name))
    raise SpecError([Diagnostic(message, where, (), hint)])


def known_keys(spec: Spec) -> dict[str, tuple[KeyPath, ...]]:
    """Every name, with its places: each key of the spec, defaults included, and KIND.FIELD for the tables of a kind.

    A name that stands in the spec is that key alone: ffn.hidden_dim is that of [ffn], where there is one.
    """
    literal: dict[str, tuple[KeyPath, ...]] = {dotted(path): (path,) for path in leaves(spec)}
    found: dict[str, tuple[KeyPath, ...]] = {}
    for path, table in tables(spec):
        if isinstance(table, KindSpec):
            for field, _ in _items(table):
                name, place = f"{table.kind}.{field}", (*path, field)
                if field != "kind" and name not in literal:
                    found[name] = (*found.get(name, ()), place)
    return literal | found


def tables(spec: Spec) -> Iterator[tuple[KeyPath, BaseModel]]:
    """Every table of the spec with its path, outer ones first."""
    yield from _tables(spec, ())


def _tables(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, BaseModel]]:
    if isinstance(value, BaseModel) and path:
        yield path, value
    for name, inner in _items(value):
        yield from _tables(inner, (*path, name))


def leaves(spec: Spec) -> Iterator[KeyPath]:
    """Every key, defaults included; an array of values is one key, the rules of [[place]] are not."""
    yield from _leaves(spec, ())


def _leaves(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    is_table = isinstance(value, BaseModel) or path in (("place",), ("pool",))
    items = list(_items(value)) if is_table else []
    for name, inner in items:
        yield from _leaves(inner, (*path, name))
    if not is_table and path:
        yield path


def _items(value: Any) -> Iterator[tuple[str | int, Any]]:
    """What a table or an array holds, by the names it has in TOML."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            yield field.alias or name, getattr(value, name)
    elif isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)


def field_of(spec: Spec, path: KeyPath) -> FieldInfo | None:
    """What the grammar says of the key at `path`."""
    fields = getattr(type(value_of(spec, path[:-1])), "model_fields", {})
    return next((field for name, field in fields.items() if (field.alias or name) == path[-1]), None)


def value_of(spec: Spec, path: KeyPath) -> Any:
    value: Any = spec
    for part in path:
        value = dict(_items(value))[part]
    return value


def plain_value(value: Any) -> Any:
    """A value of a spec as JSON has it."""
    return value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value
