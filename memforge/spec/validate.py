"""load_spec: everything that is wrong with a spec, at once, or a valid `Spec`."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from memforge.errors import Diagnostic, KeyPath, Problem, SpecError, printable
from memforge.spec.checks import check, check_baseline
from memforge.spec.document import Document
from memforge.spec.explain import problems_of, value_path
from memforge.spec.load import apply_overrides, data_path, read_document, resolve_inside
from memforge.spec.placement import MAX_LAYERS
from memforge.spec.schema import Spec

MAX_ROUNDS = 16


def load_spec(
    path: str | Path,
    *,
    overrides: Sequence[str] = (),
    spec_root: str | Path | None = None,
    data_root: str | Path | None = None,
    require_data: bool = False,
) -> Spec:
    """The spec at `path` with its `extends` chain, `overrides` ("a.b=value") and parity baseline resolved.

    `spec_root` bounds what `extends` and `against` may name; it is the directory of `path` unless given. With
    `require_data` the data path must exist too, under `data_root` (by default the spec root).

    Raises SpecError with every problem found, each at its file, line and column; UsageError for a malformed override.
    """
    path = Path(path)
    root = Path(spec_root) if spec_root is not None else path.parent
    document = read_document(path, root, str(path))
    apply_overrides(document, overrides)
    spec, problems = _validate(document.values)
    if require_data and spec is not None:
        problems += _check_data(spec, Path(data_root or root))
    diagnostics = [_locate(problem, document) for problem in problems]
    baseline, shown = None, None
    if isinstance(against := _get(document.values, ("parity", "against")), str) and against:
        try:
            target, shown = resolve_inside(document, ("parity", "against"), root)
            baseline = _baseline_at(target, shown, root)
        except SpecError as error:
            diagnostics += error.diagnostics
    if spec is not None and baseline is not None and not diagnostics:
        diagnostics += [_locate(problem, document) for problem in check_baseline(spec, baseline)]
    if diagnostics:
        raise SpecError(diagnostics)
    assert spec is not None
    spec._baseline, spec._baseline_path, spec._document = baseline, shown, document
    return spec


def load_baseline(path: str | Path, *, spec_root: str | Path | None = None) -> Spec:
    """The spec at `path` as something to compare with: what it claims itself does not matter.

    Raises SpecError with every other problem found.
    """
    path = Path(path)
    return _baseline_at(path, str(path), Path(spec_root) if spec_root is not None else path.parent)


def with_values(spec: Spec, changes: Mapping[KeyPath, Any]) -> Spec:
    """A loaded spec with the values at some keys changed. Raises SpecError when the result is not valid."""
    document: Document = spec._document
    values = copy.deepcopy(document.values)
    for path, value in changes.items():
        table: Any = values
        for part in path[:-1]:
            table = table.setdefault(part, {}) if isinstance(table, dict) else table[part]
        table[path[-1]] = value
    changed, problems = _validate(values)
    if problems:
        raise SpecError(_locate(problem, document) for problem in problems)
    assert changed is not None
    changed._baseline, changed._document = spec.baseline, document
    return changed


def _baseline_at(path: Path, shown: str, root: Path) -> Spec:
    """The baseline as it stands in its own file. Its own claim is not followed, so claims cannot form a cycle."""
    other = read_document(path, root, shown)
    other.values.pop("parity", None)
    spec, problems = _validate(other.values)
    if problems:
        raise SpecError(_locate(problem, other) for problem in problems)
    assert spec is not None
    return spec


def _check_data(spec: Spec, data_root: Path) -> Iterator[Problem]:
    """Data paths that lead nowhere, and tokenizers that are no files."""
    for key, name in _data_paths(spec):
        try:
            path = data_path(data_root, name)
        except ValueError as error:
            yield Problem(key, str(error))
            continue
        if key[-1] == "tokenizer" and not path.is_file():
            yield Problem(key, f"not a file: {printable(name)}", "a tokenizer is one JSON file, e.g. tokenizer.json")


def _data_paths(spec: Spec) -> Iterator[tuple[KeyPath, str]]:
    """Every path that [data] holds, by its key."""
    tables: list[tuple[KeyPath, Any]] = [(("data",), spec.data)]
    tables += [(("data", "parts", name), part) for name, part in getattr(spec.data, "parts", {}).items()]
    for key, table in tables:
        for name in ("path", "tokenizer"):
            if (value := getattr(table, name, None)) is not None:
                yield (*key, name), value


def _locate(problem: Problem, document: Document) -> Diagnostic:
    return Diagnostic(
        problem.message,
        document.position(problem.key, at_key=problem.at_key),
        problem.key,
        problem.help,
        # A key left at its default stands nowhere.
        tuple((document.position(key), label) for key, label in problem.related if key in document.spans),
    )


# What stands in for a required key that is wrong, so that the rest can still be checked; what a check finds in a
# stand-in is not reported.
_STAND_INS: dict[str, dict[str, Any]] = {
    "model": {"name": "x", "dim": 2**17, "num_layers": MAX_LAYERS, "vocab_size": 2**22, "max_seq_len": 2**24},
    "attention": {"num_heads": 1},
}


def _validate(values: dict[str, Any]) -> tuple[Spec | None, list[Problem]]:
    """The spec, or as much of it as is valid by itself, and all problems of `values`."""
    try:
        spec = Spec.model_validate(values)
    except ValidationError as error:
        problems = problems_of(error, values, Spec)
        partial, kept_rules, cut = _valid_part(values, error)
        if partial is not None:
            found = (_restored_problem(p, kept_rules) for p in check(partial))
            problems += [p for p in found if not _is_consequence(p, cut)]
        return partial, problems
    return spec, list(check(spec))


def _valid_part(values: dict[str, Any], error: ValidationError) -> tuple[Spec | None, list[int], list[KeyPath]]:
    """A spec without the offending keys, the rules it kept, and the known keys that were dropped or replaced."""
    values = copy.deepcopy(values)
    trial, kept = values, list(range(len(values["place"]) if isinstance(values.get("place"), list) else 0))
    cut: list[KeyPath] = []
    for _ in range(MAX_ROUNDS):
        paths = set()
        for item in error.errors(include_url=False):
            path = _restored(value_path(item, trial), kept)
            if item["type"] == "missing":
                cut.append(path)
                if _stand_in(values, path):
                    continue
                path = path[:-1]
            elif item["type"] == "extra_forbidden" and len(path) == 1:  # perhaps a table that has another name
                cut += [(name,) for name in get_close_matches(str(path[0]), Spec.model_fields)]
            elif item["type"] != "extra_forbidden":
                cut.append(path)
            paths.add(path)
        if () in paths:
            return None, [], cut
        for path in sorted(paths, key=len, reverse=True):
            _drop(values, path)
        trial = dict(values)
        if isinstance(rules := values.get("place"), list):
            kept = [i for i, rule in enumerate(rules) if rule is not None]
            trial["place"] = [rules[i] for i in kept]
        try:
            return Spec.model_validate(trial), kept, cut
        except ValidationError as again:
            error = again
    return None, [], cut


def _stand_in(values: dict[str, Any], missing: KeyPath) -> bool:
    """Put something harmless at a required key of [model] or [attention]; whether there was anything to put."""
    table = _STAND_INS.get(str(missing[0]), {})
    if len(missing) == 1 and table:
        values[str(missing[0])] = dict(table)
    elif len(missing) == 2 and missing[1] in table:
        values[str(missing[0])][missing[1]] = table[str(missing[1])]
    else:
        return False
    return True


def _drop(values: Any, path: KeyPath) -> None:
    parent = _get(values, path[:-1])
    if isinstance(parent, dict):
        parent.pop(path[-1], None)
    elif isinstance(parent, list) and path[:-1] == ("place",) and isinstance(path[-1], int):
        parent[path[-1]] = None
    elif isinstance(parent, list):
        _drop(values, path[:-1])


def _get(values: Any, path: KeyPath) -> Any:
    for part in path:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return None
    return values


def _restored(path: KeyPath, kept: list[int]) -> KeyPath:
    """The path in the whole spec of a path in the part of it that kept only some rules."""
    if path[:1] != ("place",) or len(path) < 2:
        return path
    return ("place", kept[int(path[1])], *path[2:])


def _restored_problem(problem: Problem, kept: list[int]) -> Problem:
    return replace(
        problem,
        key=_restored(problem.key, kept),
        related=tuple((_restored(key, kept), label) for key, label in problem.related),
        depends=tuple(_restored(key, kept) for key in problem.depends),
    )


def _is_consequence(problem: Problem, cut: list[KeyPath]) -> bool:
    """Whether the problem may only be there because something it reads was dropped or replaced."""
    return any(path[: len(key)] == key or key[: len(path)] == path for path in cut for key in problem.reads())
