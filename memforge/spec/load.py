"""From a path to one merged document: `extends` chains and `--set` options, with the origin of every key."""

import copy
import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from memforge.errors import KeyPath, UsageError, is_text, printable
from memforge.spec.document import Document, Source, parse, read_source

MAX_EXTENDS = 8
SET_SOURCE = "--set"


def read_document(path: Path, spec_root: Path, shown: str, chain: tuple[Path, ...] = ()) -> Document:
    """The document at `path` laid over the one it `extends`.

    Raises SpecError for cycles, chains longer than MAX_EXTENDS and paths outside `spec_root`.
    """
    document = parse(read_source(path, shown))
    if "extends" not in document.values:
        return document
    base_path, base_shown = resolve_inside(document, ("extends",), spec_root)
    here = path.resolve()
    if base_path in (*chain, here):
        raise document.fail(("extends",), "extends itself, directly or through other files")
    if len(chain) + 1 >= MAX_EXTENDS:
        raise document.fail(("extends",), f"more than {MAX_EXTENDS} files extend each other")
    base = read_document(base_path, spec_root, base_shown, (*chain, here))
    del document.values["extends"]
    return overlay(base, document)


def resolve_inside(document: Document, key: KeyPath, spec_root: Path) -> tuple[Path, str]:
    """The spec file that the string at `key` names, and how to show it.

    The path is relative to the file the key stands in (for `--set`, to the file named on the command line) and
    must stay inside `spec_root` after links are resolved. Raises SpecError otherwise.
    """
    value = value_at(document.values, key)
    if not isinstance(value, str) or not value:
        raise document.fail(key, f"expected the path of a spec, got {shown_value(value)}")
    if Path(value).is_absolute() or "://" in value or "\0" in value:
        raise document.fail(key, "must be a relative path to a file beside this spec")
    origin = document.source_of(key)
    if origin.path is None:
        origin = document.source
    assert origin.path is not None
    target = resolved(origin.path.parent / value)
    if target is None:
        raise document.fail(key, "is not a path that can be followed")
    if not target.is_relative_to(spec_root.resolve()):
        raise document.fail(
            key,
            f"leads outside the spec root {printable(os.path.relpath(spec_root))}",
            "pass --spec-root DIR with a directory that holds both files",
        )
    if not target.is_file():
        raise document.fail(key, f"no such file: {printable(value)}")
    return target, os.path.normpath(str(Path(origin.name).parent / value))


def resolved(path: Path) -> Path | None:
    """The path with links followed; None for a loop of links or a name that the system cannot hold."""
    try:
        target = path.resolve()
        target.is_file()
    except (OSError, RuntimeError, ValueError):
        return None
    return target


def data_path(root: Path, name: str) -> Path:
    """Where a data path leads: relative, inside `root` after links are resolved. Raises ValueError saying why not."""
    if Path(name).is_absolute() or "\0" in name or "://" in name:
        raise ValueError("must be a relative path; --data-root DIR says where it starts")
    if not root.is_dir():
        raise ValueError(f"starts at {printable(str(root))}, which is no directory; --data-root DIR says where")
    target = resolved(root / name)
    if target is None:
        raise ValueError("is not a path that can be followed")
    if not target.is_relative_to(root.resolve()):
        raise ValueError("leads outside the data root; --data-root DIR moves it")
    if not (target.is_file() or target.is_dir()):
        raise ValueError(f"no such file or directory: {name}")
    return target


def overlay(base: Document, top: Document) -> Document:
    """`top` over `base`: tables merge key by key; arrays, inline tables and scalars are replaced whole."""
    merged = Document(top.source, copy.deepcopy(base.values), dict(base.spans), set(base.inline))
    _merge(merged, top, ())
    return merged


def _merge(merged: Document, top: Document, path: KeyPath) -> None:
    table, over = value_at(merged.values, path), value_at(top.values, path)
    for key, value in over.items():
        here = (*path, key)
        both = isinstance(value, dict) and isinstance(table.get(key), dict)
        if both and here not in top.inline and here not in merged.inline:
            if here in top.spans:
                merged.spans[here] = top.spans[here]
            _merge(merged, top, here)
        else:
            merged.replace(here, copy.deepcopy(value), top, here)


def apply_overrides(document: Document, assignments: Sequence[str]) -> None:
    """Apply `a.b=value` assignments in place. The value is TOML; a bare word is a string.

    Raises UsageError when an assignment is not KEY=VALUE, SpecError when its path leads nowhere.
    """
    lines = [_as_toml(text) for text in assignments]
    source = Source(SET_SOURCE, "\n".join(lines))
    for row, line in enumerate(lines):
        one = parse(Source(SET_SOURCE, "\n" * row + line))
        for path in _leaf_paths(one, ()):
            _assign(document, path, one, source)


def _as_toml(assignment: str) -> str:
    key, equals, value = (part.strip() for part in assignment.partition("="))
    if not equals or not key or "\n" in assignment or "#" in key or not is_text(assignment):
        raise UsageError(f"--set {printable(assignment)}: expected KEY=VALUE, for example train.steps=100")
    if re.fullmatch(r"""[^\d\s"'\[\]{}=,#+-][^\s"'\[\]{}=,#]*""", value) and value not in _TOML_WORDS:
        value = json.dumps(value, ensure_ascii=False)
    # A list index such as place.0.block is a bare key in TOML too, so no second grammar is needed.
    return f"{key} = {value}"


_TOML_WORDS = ("true", "false", "inf", "nan")


def _leaf_paths(document: Document, path: KeyPath) -> list[KeyPath]:
    value = value_at(document.values, path)
    if isinstance(value, dict) and path not in document.inline:
        return [leaf for key in value for leaf in _leaf_paths(document, (*path, key))]
    return [path]


def _assign(document: Document, path: KeyPath, one: Document, source: Source) -> None:
    target: Any = document.values
    real: KeyPath = ()
    for depth, part in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(target, list):
            index = int(part) if re.fullmatch(r"[0-9]{1,6}", str(part)) else -1
            if not 0 <= index < len(target):
                raise one.fail(
                    path,
                    f"{'.'.join(map(str, path[:depth]))} has {len(target)} items; "
                    f"{printable(str(part))} is not the index of one",
                )
            part = index
        elif isinstance(target, dict):
            if not last:
                target.setdefault(part, {})
        else:
            raise one.fail(path, f"{'.'.join(map(str, path[:depth]))} is a value, not a table")
        real = (*real, part)
        if not last:
            target = target[part]
            document.spans.setdefault(real, replace(one.spans[path[: depth + 1]], source=source))
    document.replace(real, value_at(one.values, path), one, path)
    for p, span in list(document.spans.items()):
        if p[: len(real)] == real:
            document.spans[p] = replace(span, source=source)


def value_at(values: Any, path: KeyPath) -> Any:
    for part in path:
        values = values[part]
    return values


def shown_value(value: object) -> str:
    """A value as it would stand in the spec, shortened."""
    plain = isinstance(value, str | bool)
    text = printable(json.dumps(value, ensure_ascii=False) if plain else str(value))
    return text if len(text) <= 40 else text[:37] + "..."
