"""Commands on the architecture: build and profile."""

from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.cli.options import Json, Set, SpecPath, SpecRoot, load
from memforge.errors import UsageError
from memforge.report.console import console, plain, print_json

NoParity = Annotated[bool, typer.Option("--no-parity", help="Go on although the [parity] claim fails.")]


def build(
    spec: SpecPath,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: build/NAME.")] = None,
    set_: Set = None,
    spec_root: SpecRoot = None,
    no_parity: NoParity = False,
    json_: Json = False,
) -> None:
    """Validate, plan, prove the budget, export the graph; write the build directory."""
    from memforge.cost import estimate
    from memforge.parity import claimed, require
    from memforge.plan import make_plan
    from memforge.report.cost import kind_table, parity_table

    plan = make_plan(load(spec, set_, spec_root))
    parity = claimed(plan)
    if not no_parity:
        require(parity)
    target = out or Path("build") / plan.name
    screen = console(stderr=True)
    with screen.status("building on meta and exporting the graph"):
        from memforge.build import write_build

        manifest = write_build(plan, target)
    if json_:
        print_json({"directory": str(target), **manifest})
        return
    page = console()
    page.print(f"{plan.name}  {plan.model.num_layers} layers  seq_len {plan.model.max_seq_len}\n", soft_wrap=True)
    page.print(kind_table(estimate(plan.model).as_dict()))
    if parity is not None:
        page.print()
        page.print(parity_table(parity.as_dict()))
    counted = manifest["counter"]
    plain(
        f"\nledger = built model: {sum(row.numel for row in plan.model.params):,} parameters; "
        f"{counted['forward']:,} + {counted['backward']:,} FLOPs executed on {counted['batch']} x "
        f"{counted['seq_len']} tokens, as counted by torch"
    )
    plain(f"wrote {target}/: {', '.join([*manifest['files'], 'manifest.json'])}")


def profile(
    spec: SpecPath,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="SPEC", help="Compare with this spec; exit 1 unless matched."),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option("--tolerance", metavar="AXIS=X", help="Judge AXIS (params, active_params, flops, bytes)."),
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a sequence; default: model.max_seq_len.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    set_: Set = None,
    spec_root: SpecRoot = None,
    json_: Json = False,
) -> None:
    """The ledger: parameters, FLOPs and bytes by kind and layer, and the verdict on parity. No torch needed."""
    from memforge import __version__
    from memforge.cost import estimate
    from memforge.parity import claimed, compare, require
    from memforge.plan import make_plan
    from memforge.spec.schema import DEFAULT_TOLERANCE

    if tolerance and against is None:
        raise UsageError("--tolerance needs --against; a spec's own claim has its tolerance in [parity]")
    plan = make_plan(load(spec, set_, spec_root))
    report = estimate(plan.model, batch=batch, seq_len=seq_len)
    if against is None:
        parity = claimed(plan, seq_len)
    else:
        other = make_plan(load(against, None, spec_root))
        allowed = plan.parity.tolerance if plan.parity is not None else DEFAULT_TOLERANCE
        allowed = _tolerance(tolerance) if tolerance else allowed
        parity = compare(plan.name, plan.model, other.name, other.model, allowed, seq_len)
    cost = report.as_dict()
    if json_:
        head = {"memforge": __version__, "name": plan.name}
        print_json({**head, **cost, "parity": parity.as_dict() if parity else None})
    else:
        _print_profile(plan.name, cost, parity.as_dict() if parity else None)
    if against is not None:
        if json_ and parity is not None and not parity.ok:
            raise typer.Exit(1)
        require(parity)


def _tolerance(given: list[str]) -> Any:
    from pydantic import ValidationError

    from memforge.cost import AXES
    from memforge.spec.schema import ToleranceSpec

    try:
        pairs = [item.split("=") for item in given]
        return ToleranceSpec.model_validate({axis.strip(): float(number) for axis, number in pairs})
    except (ValueError, ValidationError):
        raise UsageError(f"--tolerance {' '.join(given)}: expected AXIS=X with AXIS in {', '.join(AXES)}") from None


def _print_profile(name: str, cost: dict[str, Any], parity: dict[str, Any] | None) -> None:
    from memforge.report.cost import conventions, kind_table, layer_table, parity_table, si

    page = console()
    flops, params = cost["flops_per_token"], cost["params"]
    page.print(
        f"{name}  seq_len {cost['seq_len']}  {si(params['bytes'], 'B')} of parameters, "
        f"{si(cost['bytes_per_token']['read'], 'B')} read per token  "
        f"FLOPs/token {si(flops['forward'])} forward + {si(flops['backward'])} backward\n",
        soft_wrap=True,
    )
    page.print(kind_table(cost))
    page.print()
    page.print(layer_table(cost))
    if parity is not None:
        page.print()
        page.print(parity_table(parity))
    page.print()
    for line in conventions():
        page.print(line, style="dim", soft_wrap=True)


COMMANDS = {"build": build, "profile": profile}
