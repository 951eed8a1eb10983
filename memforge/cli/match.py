"""memforge match."""

import os
import re
import shlex
from dataclasses import replace
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

    loaded = load(spec, set_, spec_root)
    baseline = make_plan(load_baseline(to, spec_root=spec_root))
    wanted = dict.fromkeys(_axes(axis), DEFAULT_TOLERANCE) | tolerances(tolerance)
    keys = [parse_free(loaded, text, multiple_of) for text in free or ()]
    length = report_seq_len(make_plan(loaded), seq_len, baseline.model)
    found = solve(loaded, baseline.name, baseline.model, keys, wanted, length)
    best = found.candidates[:top]
    if json_:
        print_json(_record(loaded.model.name, baseline.name, length, found, top))
    else:
        _print(loaded.model.name, baseline.name, length, found, best)
    if json_ and not found.best.ok:
        raise typer.Exit(1)
    require_match(found, loaded.model.name, baseline.name)
    if out is not None:
        _write(out, loaded, spec, to, found, wanted, spec_root)
        plain(f"wrote {printable(str(out))}; next: memforge check {printable(str(out))}", stderr=True)
    elif not json_:
        plain("nothing was written; --out FILE writes the first one as a spec", stderr=True)


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
    from memforge.plan import make_model_plan
    from memforge.spec import load_spec, with_values
    from memforge.spec.render import derived_toml

    if out.exists():
        raise StorageError(f"{out}: exists already")
    name = re.sub(r"[^A-Za-z0-9._-]", "-", out.stem)[:64] or "matched"
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
    except BaseException:
        out.unlink()
        raise


def _overridden(spec: Any) -> list[Any]:
    """Keys that --set changed: they are not in the file that is extended."""
    document = spec._document
    return [path for path, span in document.spans.items() if span.source.path is None and path[0] in document.values]


def with_fix(parity: Any, spec: Any, path: Path, baseline_path: Path | None = None) -> Any:
    """The verdict with the command that would match a model that fails, if a size of its blocks can be solved for."""
    from memforge.match import DEFAULT_TOLERANCE, suggest
    from memforge.plan import make_model_plan
    from memforge.spec import load_baseline

    if parity is None or parity.ok:
        return parity
    to = Path(baseline_path or spec.baseline_path or "")
    baseline = spec.baseline if baseline_path is None else load_baseline(baseline_path, spec_root=baseline_path.parent)
    assert baseline is not None
    allowed = {axis.name: max(axis.tolerance, 1e-9) for axis in parity.axes if axis.tolerance is not None}
    model = make_model_plan(baseline)
    for wanted in ({name: min(x, DEFAULT_TOLERANCE) for name, x in allowed.items()}, allowed):
        found = suggest(spec, parity.baseline, model, wanted, parity.seq_len)
        if found is not None:
            break
    words = ["memforge", "match", str(path), "--to", str(to)]
    for name in allowed:
        words += ["--axis", name]
    for name, x in wanted.items():
        words += ["--tolerance", f"{name}={x:g}"] if x != DEFAULT_TOLERANCE else []
    if found is None:
        return replace(parity, fix=f"{shlex.join(words)} --free KEY ..")
    for free in found.free:
        words += ["--free", free.key.name]
    return replace(parity, fix=shlex.join([*words, "--seq-len", str(parity.seq_len)]))


COMMANDS = {"match": match}
