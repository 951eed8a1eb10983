"""Commands on the text of a spec: init, check, render, schema."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.cli.match import Given, with_fix
from memforge.cli.options import DataRoot, Json, Set, SpecPath, SpecRoot, end_with, load
from memforge.errors import StorageError, UsageError, printable
from memforge.report.console import plain, print_json


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("spec.toml"),
    preset: Annotated[str, typer.Option(help="dense, memory or moe.")] = "memory",
) -> None:
    """Write a commented spec to start from. An existing file is left alone."""
    from memforge.spec.presets import PRESETS, preset_text

    if preset not in PRESETS:
        raise UsageError(f"--preset {preset}: known presets are {', '.join(PRESETS)}")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(preset_text(preset))
    except FileExistsError:
        raise StorageError(f"{path}: exists already") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    plain(f"wrote {path}; next: memforge check {path}", stderr=True)


def check(
    spec: SpecPath,
    set_: Set = None,
    spec_root: SpecRoot = None,
    data_root: DataRoot = None,
    json_: Json = False,
) -> None:
    """Validate a spec; all errors at once, each with file, line and column. Exit 1 if its [parity] claim fails."""
    from memforge.cost import estimate
    from memforge.parity import claimed, report_seq_len
    from memforge.plan import make_plan

    loaded = load(spec, set_, spec_root, data_root=data_root, require_data=True)
    plan = make_plan(loaded)
    axes = estimate(plan.model, seq_len=report_seq_len(plan)).axes()
    parity = claimed(plan)
    if plan.parity is not None:
        parity = with_fix(parity, loaded, plan.parity.baseline, Given(spec, set_, spec_root))
    caveats = [*plan.model.caveats(), *(parity.caveats if parity else ())]
    if json_:
        print_json(_check_record(plan, axes, parity))
    else:
        plain(f"{printable(str(spec))}: {_check_line(plan, axes, parity)}")
        for caveat in caveats:
            plain(f"note: {caveat}", stderr=True)
    end_with([parity] if parity else [], as_json=json_)


def _check_record(plan: Any, axes: dict[str, Any], parity: Any) -> dict[str, Any]:
    """The ledger's axes and the verdict; the errors of a plan are those of its claim."""
    from memforge.report.diagnostics import error_record

    failures = parity.failures() if parity else ()
    return {
        "ok": not failures,
        "name": plan.name,
        "model_hash": plan.model.model_hash,
        "errors": [
            error_record({"message": f"parity fails: {why}", "key": "parity", "help": parity.fix}) for why in failures
        ],
        **axes,
        "parity": parity.as_dict() if parity else None,
        "caveats": list(plan.model.caveats()),
    }


def _check_line(plan: Any, axes: dict[str, Any], parity: Any) -> str:
    from memforge.report.cost import si

    matched = parity is None or parity.ok
    verdict = f"; parity with {parity.baseline} {'holds' if matched else 'FAILS'}" if parity else ""
    return (
        f"{'ok' if matched else 'not matched'}: {plan.name}, {plan.model.num_layers} layers, "
        f"{axes['params']:,} parameters ({axes['active_params']:,} active), "
        f"{si(axes['flops'], 'FLOP')} per token{verdict}"
    )


def render(
    spec: SpecPath,
    set_: Set = None,
    spec_root: SpecRoot = None,
    defaults: Annotated[bool, typer.Option("--defaults", help="Write the keys left at their default too.")] = False,
    json_: Json = False,
) -> None:
    """Print the spec with `extends` and --set resolved; a comment names the origin of each key from elsewhere."""
    from memforge.spec.render import render_toml

    loaded = load(spec, set_, spec_root)
    if json_:
        print_json(loaded.model_dump(mode="json", by_alias=True, exclude_unset=not defaults))
    else:
        plain(render_toml(loaded, defaults=defaults).rstrip("\n"))


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="A reference page to read instead.")] = False,
) -> None:
    """Print the JSON Schema of a spec, for editors and linters (#:schema in a TOML file)."""
    from memforge.spec.schema import Spec

    if markdown:
        from memforge.report.reference import reference

        plain(reference().rstrip("\n"))
        return

    record = Spec.model_json_schema()
    record["properties"]["extends"] = {"type": "string", "description": "a spec to lay this one over"}
    record["required"] = []  # a file that extends another may leave anything out
    plain(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **record}, indent=2))


COMMANDS = {"init": init, "check": check, "render": render, "schema": schema}
