"""Pydantic's errors in the words of a spec: one problem per key, with the nearest valid name."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from memforge.errors import KeyPath, Problem, printable
from memforge.spec.load import shown_value, value_at

_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "an array",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "finite_number": "a finite number",
}
_BOUNDS: Mapping[str, Callable[[dict[str, Any]], str]] = {
    "greater_than_equal": lambda ctx: f"must be at least {ctx['ge']:,}",
    "greater_than": lambda ctx: f"must be more than {ctx['gt']:,}",
    "less_than_equal": lambda ctx: f"must be at most {ctx['le']:,}",
    "less_than": lambda ctx: f"must be less than {ctx['lt']:,}",
    "too_short": lambda ctx: f"needs at least {ctx['min_length']} items",
    "too_long": lambda ctx: f"may have at most {ctx['max_length']} items",
    "string_too_short": lambda ctx: "must not be empty",
    "string_too_long": lambda ctx: f"may have at most {ctx['max_length']} characters",
    "string_pattern_mismatch": lambda ctx: (
        "must be letters, digits, '.', '_' and '-', at most 64, letter or digit first"
    ),
}


def problems_of(error: ValidationError, values: Any, model: type[BaseModel]) -> list[Problem]:
    """One problem per key path of `values`, in the order Pydantic found them."""
    by_path: dict[KeyPath, list[dict[str, Any]]] = defaultdict(list)
    for item in error.errors(include_url=False):
        by_path[data_path(item, values)].append(dict(item))
    schema = model.model_json_schema()
    problems = [_problem(path, items, values, schema) for path, items in by_path.items()]
    # A misspelt key is one mistake, not two: the key it was meant to be is not missing.
    meant = {(*p.key[:-1], p.help) for p in problems if p.message.startswith("unknown key")}
    return [p for p in problems if (*p.key[:-1], _did_you_mean(p.key)) not in meant]


def _did_you_mean(key: KeyPath) -> str:
    return f"did you mean `{key[-1]}`?" if key else ""


def data_path(item: Mapping[str, Any], values: Any) -> KeyPath:
    """Pydantic's location without the union tags it puts in; a missing key stays as the last part."""
    loc, path = list(item["loc"]), []
    missing = loc.pop() if item["type"] == "missing" else None
    for part in loc:
        if (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        ):
            values = values[part]
            path.append(part)
    return (*path, missing) if missing is not None else tuple(path)


def _problem(path: KeyPath, items: list[dict[str, Any]], values: Any, schema: dict[str, Any]) -> Problem:
    item = items[0]
    kind, ctx = item["type"], item.get("ctx", {})
    name = printable(str(path[-1])) if path else ""
    if kind == "missing":
        return _missing(path, values, schema)
    if kind == "extra_forbidden":
        known = sorted(_keys_at(path[:-1], values, schema))
        return Problem(path, f"unknown key `{name}`", nearest(str(path[-1]), known), at_key=True)
    if kind == "union_tag_not_found":
        return Problem(path, "`kind` is required", f"known: {', '.join(_tags(item))}", at_key=True)
    if kind == "union_tag_invalid":
        got, known = str(ctx.get("tag")), _tags(item)
        return Problem((*path, "kind"), f"unknown kind `{printable(got)}`", nearest(got, known))
    if item["loc"][-1:] == ("[key]",):
        return Problem(path, f"`{name}` {_BOUNDS['string_pattern_mismatch'](ctx)}", at_key=True)
    for bound in items:
        if bound["type"] in _BOUNDS:
            return Problem(path, f"{_BOUNDS[bound['type']](bound.get('ctx', {}))}, got {shown_value(bound['input'])}")
    expected = " or ".join(dict.fromkeys(_expected(i) for i in items))
    words = [word for i in items for word in _literals(i)]
    hint = nearest(item["input"], words) if isinstance(item["input"], str) and words else None
    return Problem(path, f"expected {expected}, got {shown_value(item['input'])}", hint)


def _missing(path: KeyPath, values: Any, schema: dict[str, Any]) -> Problem:
    name = path[-1]
    if len(path) == 1:
        return Problem(path, f"the table [{name}] is required")
    described = _keys_at(path[:-1], values, schema).get(str(name), "")
    return Problem(path, f"`{name}` is required in {_table_name(path[:-1])}", described or None, at_key=True)


def _table_name(path: KeyPath) -> str:
    if path[0] == "place":
        return f"[[place]] rule {int(path[1]) + 1}" + (f", {path[-1]}" if len(path) > 2 else "")
    return f"[{'.'.join(map(str, path))}]"


def _expected(item: Mapping[str, Any]) -> str:
    if words := _literals(item):
        return " or ".join(f'"{w}"' for w in words)
    message = str(item["msg"])
    return _EXPECTED.get(item["type"], message[:1].lower() + message[1:])


def _literals(item: Mapping[str, Any]) -> list[str]:
    if item["type"] != "literal_error":
        return []
    return [word.strip("'") for word in item["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _tags(item: Mapping[str, Any]) -> list[str]:
    expected = item.get("ctx", {}).get("expected_tags", "")
    return [tag.strip().strip("'") for tag in expected.split(",") if tag.strip()]


def nearest(name: str, known: list[str]) -> str | None:
    """A hint towards the nearest of `known`, or all of them when they are few."""
    close = get_close_matches(name, known, n=1, cutoff=0.55)
    if close:
        return _did_you_mean((close[0],))
    return f"known: {', '.join(known)}" if 0 < len(known) <= 24 else None


def _keys_at(path: KeyPath, values: Any, schema: dict[str, Any]) -> dict[str, str]:
    """Keys that the schema allows in the table at `path`, with their descriptions."""
    nodes = [schema]
    for part in path:
        nodes = [child for node in nodes for child in _children(node, part, schema)]
        values = value_at(values, (part,)) if isinstance(values, dict | list) else None
        nodes = [n for node in nodes for n in _options(node, values, schema)]
    return {
        key: str(field.get("description", "")) for node in nodes for key, field in node.get("properties", {}).items()
    }


def _children(node: dict[str, Any], part: str | int, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    child = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
    child = child or node.get("additionalProperties")
    if isinstance(child, dict):
        yield child


def _options(node: dict[str, Any], values: Any, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema nodes that `node` stands for, with references followed and unions narrowed by `kind`."""
    if ref := node.get("$ref"):
        yield from _options(schema["$defs"][ref.rsplit("/", 1)[-1]], values, schema)
        return
    mapping = node.get("discriminator", {}).get("mapping", {})
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind in mapping:
        yield from _options({"$ref": mapping[kind]}, values, schema)
        return
    union = node.get("anyOf", []) + node.get("oneOf", [])
    for option in union:
        yield from _options(option, values, schema)
    if not union:
        yield node
