"""Pydantic's errors in the words of a spec: one problem per key, with the nearest valid name."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from memforge.blocks import kinds_of
from memforge.errors import KeyPath, Problem
from memforge.spec.load import shown_value

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


# Nobody reads more hints than this, and finding the nearest of thirty names takes about 0.3 ms.
MAX_HINTS = 200


def problems_of(error: ValidationError, values: Any, model: type[BaseModel]) -> list[Problem]:
    """One problem per key path of `values`, in the order Pydantic found them."""
    by_path: dict[KeyPath, list[dict[str, Any]]] = defaultdict(list)
    for item in error.errors(include_url=False):
        by_path[value_path(item, values)].append(dict(item))
    schema, no_hints = _Schema(model.model_json_schema(), values), _Schema({}, values)
    problems = [
        _problem(path, items, schema if i < MAX_HINTS else no_hints) for i, (path, items) in enumerate(by_path.items())
    ]
    # A misspelt key is one mistake, not two: the key it was meant to be is not missing.
    unknown = [path for path, items in by_path.items() if items[0]["type"] == "extra_forbidden"][:MAX_HINTS]
    meant = {(*path[:-1], closest(str(path[-1]), sorted(schema.keys(path[:-1])))) for path in unknown}
    return [problem for problem in problems if problem.key not in meant]


def value_path(item: Mapping[str, Any], values: Any) -> KeyPath:
    """Pydantic's location without the union tags it puts in; a missing key stays as the last part."""
    loc = list(item["loc"])
    path: list[str | int] = []
    missing = loc.pop() if item["type"] == "missing" else None
    tagged = False
    for part in loc:
        if not tagged and _is_union(path) and isinstance(values, dict) and values.get("kind") == part:
            tagged = True
        elif (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        ):
            values = values[part]
            path.append(part)
    return (*path, missing) if missing is not None else tuple(path)


def _is_union(path: list[str | int]) -> bool:
    """Whether the table at `path` is one of several kinds, so that its kind follows it in Pydantic's location."""
    if path == ["data"]:
        return True
    if len(path) == 3 and path[0] == "place" and path[2] in ("block", "mixer"):
        return len(kinds_of("block" if path[2] == "block" else "mixer")) > 1
    return len(path) == 2 and path[0] == "pool" and len(kinds_of("pool")) > 1


def _problem(path: KeyPath, items: list[dict[str, Any]], schema: "_Schema") -> Problem:
    item = items[0]
    kind, ctx = item["type"], item.get("ctx", {})
    if kind == "missing":
        return _missing(path, schema)
    name = str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        return Problem(path, f"unknown key `{name}`", nearest(name, sorted(schema.keys(path[:-1]))), at_key=True)
    if kind == "union_tag_not_found":
        return Problem(path, "`kind` is required", f"known: {', '.join(schema.kinds(path))}", at_key=True)
    if kind == "union_tag_invalid":
        got = str(ctx.get("tag"))
        return Problem((*path, "kind"), f"unknown kind `{got}`", nearest(got, schema.kinds(path)))
    if item["loc"][-1:] == ("[key]",):
        return Problem(path, f"`{name}` {_BOUNDS['string_pattern_mismatch'](ctx)}", at_key=True)
    if kind == "value_error":  # a table that refuses itself says why
        return Problem(path, str(ctx["error"]))
    for bound in items:
        if bound["type"] in _BOUNDS:
            text = _BOUNDS[bound["type"]](bound.get("ctx", {}))
            counted = bound["type"] in ("too_short", "too_long")
            return Problem(path, text if counted else f"{text}, got {shown_value(bound['input'])}")
    words = schema.words(path)
    wanted = [f'"{word}"' for word in words] + [_expected(i) for i in items if i["type"] != "literal_error"]
    expected = " or ".join(dict.fromkeys(wanted)) or "something else"
    hint = nearest(item["input"], words) if isinstance(item["input"], str) and words else None
    described = schema.keys(path[:-1]).get(name) or None
    return Problem(path, f"expected {expected}, got {shown_value(item['input'])}", hint or described)


def _missing(path: KeyPath, schema: "_Schema") -> Problem:
    name = str(path[-1])
    if len(path) == 1:
        return Problem(path, f"the table [{name}] is required")
    described = schema.keys(path[:-1]).get(name)
    return Problem(path, f"`{name}` is required in {_table_name(path[:-1])}", described or None, at_key=True)


def _table_name(path: KeyPath) -> str:
    if path[0] == "place":
        return f"[[place]] rule {int(path[1]) + 1}" + (f", {path[-1]}" if len(path) > 2 else "")
    return f"[{'.'.join(map(str, path))}]"


def _expected(item: Mapping[str, Any]) -> str:
    message = str(item["msg"])
    return _EXPECTED.get(item["type"], message[:1].lower() + message[1:])


def closest(name: str, known: list[str]) -> str | None:
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.55)), None)


def nearest(name: str, known: list[str]) -> str | None:
    """A hint towards the nearest of `known`, or all of them when they are few."""
    if close := closest(name, known):
        return f"did you mean `{close}`?"
    return f"known: {', '.join(known)}" if 0 < len(known) <= 24 else None


class _Schema:
    """The JSON schema beside the values, to find what a table may hold."""

    def __init__(self, root: dict[str, Any], values: Any) -> None:
        self.root, self.values = root, values
        self._known: dict[KeyPath, dict[str, str]] = {}

    def keys(self, path: KeyPath) -> dict[str, str]:
        """Keys that the table at `path` may have, with their descriptions."""
        if path not in self._known:
            self._known[path] = {
                key: str(field.get("description", ""))
                for node, values in self._nodes(path)
                for option in self._options(node, values)
                for key, field in option.get("properties", {}).items()
            }
        return self._known[path]

    def words(self, path: KeyPath) -> list[str]:
        """The words that the value at `path` may be."""
        return [
            word
            for node, values in self._nodes(path)
            for option in self._options(node, values)
            for word in option.get("enum", [option["const"]] if "const" in option else [])
        ]

    def kinds(self, path: KeyPath) -> list[str]:
        """The kinds that the table at `path` may be."""
        return [
            kind
            for node, _ in self._nodes(path)
            for option in (node, *node.get("anyOf", []))
            for kind in option.get("discriminator", {}).get("mapping", {})
        ]

    def _nodes(self, path: KeyPath) -> list[tuple[dict[str, Any], Any]]:
        """The schema at `path`, unions not yet resolved, and the value there."""
        found = [(self.root, self.values)]
        for part in path:
            found = [
                (child, _get(values, part))
                for node, values in found
                for option in self._options(node, values)
                for child in _children(option, part)
            ]
        return found

    def _options(self, node: dict[str, Any], values: Any) -> Iterator[dict[str, Any]]:
        """The schemas that `node` stands for, with references followed and unions narrowed by `kind`."""
        if ref := node.get("$ref"):
            yield from self._options(self.root["$defs"][ref.rsplit("/", 1)[-1]], values)
            return
        mapping = node.get("discriminator", {}).get("mapping", {})
        kind = _get(values, "kind")
        if isinstance(kind, str) and kind in mapping:
            yield from self._options({"$ref": mapping[kind]}, values)
            return
        union = node.get("anyOf", []) + node.get("oneOf", [])
        for option in union:
            yield from self._options(option, values)
        if not union:
            yield node


def _children(node: dict[str, Any], part: str | int) -> Iterator[dict[str, Any]]:
    child = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
    child = child or node.get("additionalProperties")
    if isinstance(child, dict):
        yield child


def _get(values: Any, part: str | int) -> Any:
    try:
        return values[part]
    except (KeyError, IndexError, TypeError):
        return None
