"""The reference page of the spec grammar, written from the schema and the registry of kinds."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel

from memforge.blocks import kinds_of
from memforge.spec.placement import Centered, Every
from memforge.spec.schema import (
    EvalSpec,
    FactsSpec,
    MixtureSpec,
    ModelSpec,
    ParallelSpec,
    ParitySpec,
    PlaceRule,
    TextSpec,
    ToleranceSpec,
    TrainSpec,
)

INTRO = """\
# The spec, key by key

Written by `memforge schema --markdown`. A key marked **required** must be given; an empty default means that the
key is absent. `extends = "other.toml"` at the top of a file lays it over another one. `memforge schema` prints the
same as JSON Schema, for editors.
"""
TABLES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("[model]", ModelSpec),
    ("[[place]]", PlaceRule),
    ("layers = { centered, stride }", Centered),
    ("layers = { every, from }", Every),
    ("[parity]", ParitySpec),
    ("[parity] tolerance", ToleranceSpec),
    ('[data] kind = "facts"', FactsSpec),
    ('[data] kind = "text"', TextSpec),
    ('[data] kind = "mixture"', MixtureSpec),
    ("[train]", TrainSpec),
    ("[parallel]", ParallelSpec),
    ("[eval]", EvalSpec),
)
ROLES: Mapping[Literal["mixer", "block", "pool"], str] = {
    "mixer": "Mixers: `[attention]`, or `mixer` of a `[[place]]` rule",
    "block": "Blocks: `[ffn]`, or `block` of a `[[place]]` rule",
    "pool": "Pools: `[pool.NAME]`",
}


def reference() -> str:
    """Every table and every registered kind, those of installed packages included."""
    return "\n".join(_lines()).rstrip("\n") + "\n"


def _lines() -> Iterator[str]:
    yield INTRO
    for title, model in TABLES:
        yield from _section(f"## `{title}`", model.model_json_schema())
    for role, title in ROLES.items():
        yield f"## {title}\n"
        for kind in kinds_of(role):
            schema = kind.spec.model_json_schema()
            yield from _section(f"### `{kind.name}`: {kind.summary}", schema)
            for inner in schema.get("$defs", {}).values():
                yield from _section(f"#### `{kind.name}`, {inner['title']}", inner)
            yield "```toml"
            yield from (_inline({"kind": kind.name, **example}) for example in kind.examples)
            yield "```\n"


def _section(title: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield title + "\n"
    yield " ".join(schema.get("description", "").split()) + "\n"
    yield from _table(schema, schema.get("$defs", {}))


def _table(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, field in schema["properties"].items():
        required = key in schema.get("required", ())
        default = "" if required or field.get("default") is None else f"`{_toml(field['default'])}`"
        meaning = field.get("description", "").replace("|", "\\|")
        yield f"| `{key}` | {_value(field, definitions)} | {'**required**' if required else default} | {meaning} |"
    yield ""


def _value(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """What a key takes, in words."""
    if "$ref" in field:
        inner = definitions.get(field["$ref"].rpartition("/")[2], {}).get("properties", {})
        return f"table of a kind: `{inner['kind']['const']}`" if "kind" in inner else "table"
    if choices := field.get("anyOf") or field.get("oneOf"):
        if "discriminator" in field:
            return "table of a kind: " + ", ".join(f"`{name}`" for name in field["discriminator"]["mapping"])
        return " or ".join(_value(choice, definitions) for choice in choices if choice.get("type") != "null")
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if field.get("type") == "array":
        return f"list of {_value(field['items'], definitions)}"
    return f"{field.get('type', 'value')}{_bounds(field)}"


def _bounds(field: Mapping[str, Any]) -> str:
    """ ", from 1 to 1,024", ", above 0" and so on; nothing where there is no bound."""
    start, stop = _bound(field, "minimum", "from", "above"), _bound(field, "maximum", "to", "below")
    return f", {' '.join(part for part in (start, stop) if part)}" if start or stop else ""


def _bound(field: Mapping[str, Any], name: str, inclusive: str, exclusive: str) -> str:
    for key, word in ((name, inclusive), (f"exclusive{name.capitalize()}", exclusive)):
        if (value := field.get(key)) is not None:
            return f"{word} {int(value) if value == int(value) else value:,}"
    return ""


def _toml(value: Any) -> str:
    return _inline(value) if isinstance(value, dict) else json.dumps(value)


def _inline(table: Mapping[str, Any]) -> str:
    """A table as one line of TOML."""
    shown = {key: value for key, value in table.items() if value is not None}
    return "{ " + ", ".join(f"{key} = {_toml(value)}" for key, value in shown.items()) + " }"
