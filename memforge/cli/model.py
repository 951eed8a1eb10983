"""Commands on the architecture: build and profile."""

from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.cli.options import Json, Set, SpecPath, SpecRoot, load
from memforge.errors import UsageError, printable
from memforge.report.console import console, plain, print_json

MeshOption = Annotated[
    str | None,
    typer.Option("--mesh", metavar="AXIS=N,..", help="What a rank holds; axes dp_replicate, dp_shard, memory."),
]
NoParity = Annotated[bool, typer.Option("--no-parity", help="Go on although the [parity] claim fails.")]


def build(
    spec: SpecPath,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: build/NAME.")] = None,
    set_: Set = None,
    spec_root: SpecRoot = None,
    no_parity: NoParity = False,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Stop before torch: plan and ledger, nothing written.")
    ] = False,
    mesh: MeshOption = None,
    emit: Annotated[
        str | None,
        typer.Option("--emit", metavar="aten", help="Also write a .pt2 with weights that runs with torch alone."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="RUN", help="Of --emit: the newest checkpoint of a run.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of --emit: initial weights; default: train.seed, or 0.")
    ] = None,
    json_: Json = False,
) -> None:
    """Validate, plan, prove the budget, export the graph; write the build directory."""
    from memforge.cost import estimate
    from memforge.cost.mesh import parse_mesh
    from memforge.parity import claimed, require
    from memforge.plan import make_plan

    if emit not in (None, "aten"):
        raise UsageError(f"--emit {printable(emit)}: the one form is aten")
    if emit is None and (weights is not None or seed is not None):
        raise UsageError("--weights and --seed say what --emit aten writes")
    if weights is not None and seed is not None:
        raise UsageError("--weights and --seed: give one of them")
    plan = make_plan(load(spec, set_, spec_root))
    cost = estimate(plan.model, mesh=None if mesh is None else parse_mesh(mesh)).as_dict()
    parity = claimed(plan)
    if not no_parity:
        require(parity)
    if plan_only:
        if json_:
            print_json(_record(plan, cost, parity))
        else:
            _print_build(plan, cost, parity)
        return
    target = out or Path("build") / plan.name
    with console(stderr=True).status("building on meta and exporting the graph"):
        from memforge.export.directory import Weights, write_build

        first = plan.run.train.seed if seed is None and plan.run.train is not None else seed or 0
        manifest = write_build(plan, target, aten=Weights(seed=first, run=weights) if emit else None)
    if json_:
        print_json({"directory": str(target), **manifest})
        return
    _print_build(plan, cost, parity)
    counted = manifest["counter"]
    plain(
        f"\nledger = built model: {cost['params']['total']:,} parameters; "
        f"{counted['forward']:,} + {counted['backward']:,} FLOPs executed on {counted['batch']} x "
        f"{counted['seq_len']} tokens, as counted by torch"
    )
    if manifest["aten"] is not None:
        plain(
            f"model.aten.pt2 = the model with the weights of {manifest['aten']['weights']}; logits differ by at most "
            f"{manifest['aten']['largest_logit_difference']:.3g}"
        )
    plain(f"wrote {target}/: {', '.join([*manifest['files'], 'manifest.json'])}")


def _print_build(plan: Any, cost: dict[str, Any], parity: Any) -> None:
    from memforge.report.cost import kind_table, mesh_table, parity_table

    page = console()
    page.print(f"{plan.name}  {plan.model.num_layers} layers  seq_len {plan.model.max_seq_len}\n", soft_wrap=True)
    tables = [kind_table(cost)]
    if cost["mesh"] is not None:
        tables.append(mesh_table(cost["mesh"]))
    if parity is not None:
        tables.append(parity_table(parity.as_dict()))
    _print_tables(tables, cost)


def _print_tables(tables: list[Any], cost: dict[str, Any]) -> None:
    """Tables with a blank line between them, then what every report must say about the model."""
    page = console()
    for i, table in enumerate(tables):
        if i:
            page.print()
        page.print(table)
    for caveat in cost["caveats"]:
        plain(f"\nnote: {caveat}")


def _record(plan: Any, cost: dict[str, Any], parity: Any) -> dict[str, Any]:
    from memforge import __version__

    return {
        "memforge": __version__,
        "name": plan.name,
        **cost,
        "parity": None if parity is None else parity.as_dict(),
    }


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
    batch: Annotated[int | None, typer.Option(help="Sequences; default: train.batch_size, or 1.")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="DEVICE", help="Of the roofline; default: all known. cpu is measured."),
    ] = None,
    mesh: MeshOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run two training steps on this CPU and count what they hold.")
    ] = False,
    set_: Set = None,
    spec_root: SpecRoot = None,
    json_: Json = False,
) -> None:
    """The ledger: parameters, FLOPs, bytes, memory and time, and the verdict on parity. No torch needed."""
    from memforge.cost import estimate
    from memforge.cost.mesh import parse_mesh
    from memforge.parity import claimed, compare, require
    from memforge.plan import make_plan
    from memforge.spec.schema import DEFAULT_TOLERANCE

    if tolerance and against is None:
        raise UsageError("--tolerance needs --against; a spec's own claim has its tolerance in [parity]")
    plan = make_plan(load(spec, set_, spec_root))
    trained = plan.run.train.batch_size if plan.run.train is not None else 1
    report = estimate(
        plan.model,
        batch=trained if batch is None else batch,
        seq_len=seq_len,
        mesh=None if mesh is None else parse_mesh(mesh),
        devices=_devices(device),
    )
    if against is None:
        parity = claimed(plan, seq_len)
    else:
        other = make_plan(load(against, None, spec_root))
        allowed = plan.parity.tolerance if plan.parity is not None else DEFAULT_TOLERANCE
        allowed = _tolerance(tolerance) if tolerance else allowed
        parity = compare(plan.name, plan.model, other.name, other.model, allowed, seq_len)
    measured = _measured(plan, report) if measure else None
    cost = report.as_dict()
    if json_:
        print_json({**_record(plan, cost, parity), **({"measured": measured} if measured else {})})
    else:
        _print_profile(plan.name, cost, parity.as_dict() if parity else None, measured)
    if against is not None:
        if json_ and parity is not None and not parity.ok:
            raise typer.Exit(1)
        require(parity)


def _devices(names: list[str] | None) -> list[Any]:
    """The devices of the roofline. Raises UsageError with the known ones."""
    from memforge.cost.devices import DEVICES

    known = {name.lower(): device for name, device in DEVICES.items()}
    chosen = []
    for name in DEVICES if names is None else names:
        if name.lower() == "cpu":
            with console(stderr=True).status("measuring this CPU"):
                from memforge.profile.probe import probe_cpu

                chosen.append(probe_cpu())
        elif name.lower() in known:
            chosen.append(known[name.lower()])
        else:
            raise UsageError(f"--device {printable(name)}: known are {', '.join(DEVICES)} and cpu")
    return chosen


def _measured(plan: Any, report: Any) -> dict[str, int]:
    """Two real training steps at the shape of the report. Raises DeviceError where they would not fit."""
    from dataclasses import asdict

    from memforge.errors import DeviceError
    from memforge.machine import machine_memory

    if report.memory.peak > (available := machine_memory()):
        shape, needed = f"{report.batch} x {report.seq_len} tokens", f"{report.memory.peak / 1e9:,.1f} GB"
        raise DeviceError(
            f"{plan.name}: a step on {shape} takes {needed} and this machine has {available / 1e9:,.1f} GB; "
            "--batch and --seq-len make it smaller"
        )
    with console(stderr=True).status("measuring two training steps on this CPU"):
        from memforge.profile.measure import measure_step

        return asdict(measure_step(plan, report.batch, report.seq_len))


def _tolerance(given: list[str]) -> Any:
    from pydantic import ValidationError

    from memforge.cost import AXES
    from memforge.spec.schema import ToleranceSpec

    try:
        pairs = [item.split("=") for item in given]
        return ToleranceSpec.model_validate({axis.strip(): float(number) for axis, number in pairs})
    except (ValueError, ValidationError):
        raise UsageError(f"--tolerance {' '.join(given)}: expected AXIS=X with AXIS in {', '.join(AXES)}") from None


def _print_profile(
    name: str, cost: dict[str, Any], parity: dict[str, Any] | None, measured: dict[str, int] | None
) -> None:
    from memforge.report import cost as tables

    page, si = console(), tables.si
    flops, params = cost["flops_per_token"], cost["params"]
    page.print(
        f"{name}  seq_len {cost['seq_len']}  {si(params['bytes'], 'B')} of parameters, "
        f"{si(cost['bytes_per_token']['read'], 'B')} read per token  "
        f"FLOPs/token {si(flops['forward'])} forward + {si(flops['backward'])} backward\n",
        soft_wrap=True,
    )
    shown = [
        tables.kind_table(cost),
        tables.layer_table(cost),
        tables.traffic_table(cost),
        tables.memory_table(cost, measured),
        tables.roofline_table(cost),
    ]
    if cost["mesh"] is not None:
        shown.append(tables.mesh_table(cost["mesh"]))
    if parity is not None:
        shown.append(tables.parity_table(parity))
    _print_tables(shown, cost)
    page.print()
    for line in tables.conventions():
        page.print(line, style="dim", soft_wrap=True)


COMMANDS = {"build": build, "profile": profile}
