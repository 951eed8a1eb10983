"""A spec as TOML again: resolved, with the origin of each key that stands elsewhere."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import tomlkit
from tomlkit.items import Table

from memforge.errors import KeyPath, printable
from memforge.spec.document import Document
from memforge.spec.schema import Spec

Comment = Callable[[KeyPath], str | None]


def render_toml(spec: Spec, *, defaults: bool = False) -> str:
    """The spec without `extends`. A comment `file:line` marks keys that come from another file or --set."""
    document: Document = spec._document
    values = spec.model_dump(mode="json", by_alias=True, exclude_unset=not defaults, exclude_none=True)

    def origin(path: KeyPath) -> str | None:
        span = document.spans.get(path)
        if span is None or span.source.name == document.source.name:
            return None
        return printable(f"{span.source.name}:{span.key[0] + 1}")

    if spec.parity is not None:
        values["parity"]["against"] = _beside(document, spec.parity.against)

    return to_toml(values, origin)


def derived_toml(spec: Spec, keys: Iterable[KeyPath], extends: str, claim: dict[str, Any], name: str) -> str:
    """A spec named `name` that extends the file `spec` came from: the tables that hold `keys`, and a [parity] claim.

    Tables are written whole: one that was written inline would be replaced, not merged.
    """
    values = spec.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
    inline = spec._document.inline
    named = {**values["model"], "name": name} if ("model",) in inline else {"name": name}
    out: dict[str, Any] = {"extends": extends, "model": named}
    for path in keys:
        top = str(path[0])
        if top == "model":
            out["model"] = values["model"] | {"name": name}
        elif top == "pool" and len(path) > 1 and ("pool",) not in inline:
            out.setdefault("pool", {})[path[1]] = values["pool"][path[1]]
        else:
            out[top] = values[top]
    return to_toml({**out, "parity": claim}, lambda _: None)


def _beside(document: Document, against: str) -> str:
    """The baseline's path as it reads beside the rendered spec: it may have been written in another directory."""
    here, origin = document.source.path, document.source_of(("parity", "against")).path
    if here is None or origin is None or origin.parent == here.parent:
        return against
    return os.path.relpath(origin.parent / against, here.parent)


def to_toml(values: dict[str, Any], comment: Comment) -> str:
    """Top-level tables and [pool.NAME] are tables, [[place]] an array of tables, everything deeper inline."""
    out = tomlkit.document()
    for key, value in values.items():
        out.add(key, _item(value, (key,), comment))
    return tomlkit.dumps(out)


def _item(value: Any, path: KeyPath, comment: Comment) -> Any:
    if isinstance(value, dict) and (len(path) == 1 or path[0] == "pool"):
        table = tomlkit.table(is_super_table=path == ("pool",))
        for key, inner in value.items():
            _add(table, key, inner, (*path, key), comment)
        return table
    if path == ("place",):
        rules = tomlkit.aot()
        for i, rule in enumerate(value):
            table = tomlkit.table()
            for key, inner in rule.items():
                _add(table, key, inner, (*path, i, key), comment)
            rules.append(table)
        return rules
    return _inline(value)


def _add(table: Any, key: str, value: Any, path: KeyPath, comment: Comment) -> None:
    item = _item(value, path, comment)
    if (note := comment(path)) and not isinstance(item, Table):
        item.comment(note)
    table.add(key, item)


def _inline(value: Any) -> Any:
    if isinstance(value, dict):
        table = tomlkit.inline_table()
        for key, inner in value.items():
            table.append(key, _inline(inner))
        return table
    return tomlkit.item(value)
