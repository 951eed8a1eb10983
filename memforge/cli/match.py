"""memforge match."""

import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.cli.options import Json, Set, SpecPath, SpecRoot, load, tolerances
from memforge.errors import StorageError, UsageError, printable
from memforge.report.console import console, plain, print_json


def match(
    spec: SpecPath,
    to: Annotated[Path, typer.Option("--to", metavar="SPEC", help="The baseline.", show_default=False)],
    axis: Annotated[
        list[str] | None,
        typer.Option("--axis", metavar="AXIS", help="params, active_params, flops or bytes; default: flops."),
    ] = None,
    free: Annotated[
        list[str] | None,
        typer.Option("--free", metavar="KEY[=LOW..HIGH]", help="An integer to solve for, e.g. ffn.hidden_dim; 1 to 3."),
    ] = None,
    multiple_of: Annotated[int, typer.Option(min=1, max=2**16, help="Of every free key.")] = 1,
    tolerance: Annotated[
        list[str] | None, typer.Option("--tolerance", metavar="AXIS=X", help="Largest |ratio - 1|; default: 0.005.")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a sequence; default as in profile.")] = None,
    top: Annotated[int, typer.Option(min=1, max=1000, help="Candidates to print.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the best one as a spec.")] = None,
    set_: Set = None,
    spec_root: SpecRoot = None,
    json_: Json = False,
) -> None:
    """Solve for the sizes at which a model matches another one. Exit 1 when nothing is within the tolerance."""
    from memforge.match import DEFAULT_TOLERANCE, parse_free, require_match, solve
    from memforge.parity import report_seq_len
    from memforge.plan import make_plan
    from memforge.spec import load_baseline

    if out is not None:
        _require_free(out, spec, to, spec_root)
    loaded = load(spec, set_, spec_root)
    baseline = make_plan(load_baseline(to, spec_root=spec_root))
    wanted = dict.fromkeys(_axes(axis), DEFAULT_TOLERANCE) | tolerances(tolerance)
    keys = [parse_free(loaded, text, multiple_of) for text in free or ()]
    length = report_seq_len(make_plan(loaded), seq_len, baseline.model)
    found = solve(loaded, baseline.name, baseline.model, keys, wanted, length)
    if out is not None and found.best.ok:
        _write(out, loaded, spec, to, found, wanted, spec_root)
    if json_:
        print_json(_record(loaded.model.name, baseline.name, length, found, top))
        raise typer.Exit(0 if found.best.ok else 1)
    _print(loaded.model.name, baseline.name, length, found, found.candidates[:top])
    require_match(found, loaded.model.name, baseline.name)
    if out is not None:
        plain(f"wrote {printable(str(out))}; next: memforge check {printable(str(out))}", stderr=True)
    else:
        plain("nothing was written; --out FILE writes the first one as a spec", stderr=True)


def _require_free(out: Path, spec: Path, to: Path, spec_root: Path | None) -> None:
    """Raises StorageError or UsageError before anything is searched where the result could not be written."""
    if out.exists():
        raise StorageError(f"{out}: exists already")
    if not out.parent.is_dir():
        raise StorageError(f"{out}: no such directory: {out.parent}")
    root = (spec_root or out.parent).resolve()
    for path in (spec, to):
        if not path.resolve().is_relative_to(root):
            raise UsageError(
                f"--out {printable(str(out))}: {printable(str(path))} is not below {printable(str(root))}, which "
                "bounds what the new spec may name; --spec-root DIR widens it"
            )


def _axes(names: list[str] | None) -> list[str]:
    from memforge.cost import AXES

    for name in names or ():
        if name not in AXES:
            raise UsageError(f"--axis {printable(name)}: known are {', '.join(AXES)}")
    return list(dict.fromkeys(names or ["flops"]))


def _record(name: str, baseline: str, seq_len: int, found: Any, top: int) -> dict[str, Any]:
    return {
        "name": name,
        "baseline": baseline,
        "seq_len": seq_len,
        "ok": found.best.ok,
        "searched": {f.key.name: {"low": f.first, "high": f.high, "multiple_of": f.step} for f in found.free},
        "candidates": [
            {
                "values": {f.key.name: v for f, v in zip(found.free, c.values, strict=True)},
                "ok": c.ok,
                "axes": {axis.name: axis.as_dict() for axis in c.axes},
            }
            for c in found.candidates[:top]
        ],
    }


def _print(name: str, baseline: str, seq_len: int, found: Any, best: Any) -> None:
    from memforge.report.console import print_whole
    from memforge.report.match import match_table

    print_whole(console(), match_table(name, baseline, seq_len, found, best))


def _write(
    out: Path, spec: Any, spec_path: Path, to: Path, found: Any, wanted: dict[str, float], spec_root: Path | None
) -> None:
    """A spec that extends `spec_path` and claims parity with `to`; both must be below the directory that bounds it."""
    from memforge.match import changes
    from memforge.parity import claimed, require
    from memforge.plan import make_model_plan, make_plan
    from memforge.spec import load_spec, with_values
    from memforge.spec.render import derived_toml

    name = re.sub(r"[^A-Za-z0-9._-]", "-", out.stem).lstrip("._-")[:64] or "matched"
    changed = changes(found)
    matched = with_values(spec, changed)
    paths = [Path(os.path.relpath(path, out.parent)).as_posix() for path in (spec_path, to)]
    claim = {"against": paths[1], "tolerance": wanted}
    text = derived_toml(matched, [*changed, *_overridden(spec)], paths[0], claim, name)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise StorageError(f"{out}: {error.strerror}") from None
    try:
        again = load_spec(out, spec_root=spec_root)
        assert make_model_plan(again) == make_model_plan(matched), "what was written is what was found"
        require(claimed(make_plan(again)))
    except BaseException:
        out.unlink()
        raise


def _overridden(spec: Any) -> list[Any]:
    """Keys that --set changed: they are not in the file that is extended."""
    document = spec._document
    return [path for path, span in document.spans.items() if span.source.path is None and path[0] in document.values]


@dataclass(frozen=True)
class Given:
    """A spec as the command line has it."""

    path: Path
    overrides: list[str] | None
    spec_root: Path | None


def with_fix(parity: Any, spec: Any, baseline: Any, given: Given, *, to: Path | None = None) -> Any:
    """The verdict with the command that matches a model that fails, if one or two sizes of its blocks can.

    `to` is where the baseline is, for one that is not that of the spec's own claim.
    """
    from memforge.match import DEFAULT_TOLERANCE, suggest
    from memforge.parity import report_seq_len
    from memforge.plan import make_plan

    if parity is None or parity.ok:
        return parity
    allowed = {axis.name: axis.tolerance for axis in parity.axes if axis.tolerance is not None}
    wanted = {name: min(x, DEFAULT_TOLERANCE) for name, x in allowed.items()}
    found = suggest(spec, parity.baseline, baseline, wanted, parity.seq_len)
    if found is None and allowed != wanted:
        wanted = allowed
        found = suggest(spec, parity.baseline, baseline, wanted, parity.seq_len)
    words = ["memforge", "match", str(given.path), "--to", str(to or spec.baseline_path)]
    for override in given.overrides or ():
        words += ["--set", override]
    if given.spec_root is not None:
        words += ["--spec-root", str(given.spec_root)]
    for name, x in wanted.items():
        words += ["--axis", name, *(("--tolerance", f"{name}={x:g}") if x != DEFAULT_TOLERANCE else ())]
    if parity.seq_len != report_seq_len(make_plan(spec), None, baseline):
        words += ["--seq-len", str(parity.seq_len)]
    for name in found if found is not None else ["ffn.hidden_dim"]:
        words += ["--free", name]
    command = shlex.join(words)
    return replace(parity, fix=command if found else f"no one or two sizes do; the nearest by {command}")


COMMANDS = {"match": match}
