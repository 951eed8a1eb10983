"""memforge profile."""

from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.cli.match import with_fix
from memforge.cli.options import (
    Json,
    MeshOption,
    NoParity,
    Set,
    SpecPath,
    SpecRoot,
    end_with,
    load,
    tolerances,
)
from memforge.errors import UsageError, printable
from memforge.report.console import console, print_json


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
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence; default: train.seq_len, or the longest that all models take."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences; default: train.batch_size, or 1.")] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="DEVICE", help="Of the roofline; default: all known. cpu is measured."),
    ] = None,
    mesh: MeshOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run training steps on this CPU and count what they hold.")
    ] = False,
    set_: Set = None,
    spec_root: SpecRoot = None,
    no_parity: NoParity = False,
    json_: Json = False,
) -> None:
    """The ledger: parameters, FLOPs, bytes, memory and time, and the verdict on parity. Torch only to measure."""
    from memforge.cost import estimate
    from memforge.cost.mesh import parse_mesh
    from memforge.parity import claimed, report_seq_len
    from memforge.plan import make_plan
    from memforge.report import cost as tables
    from memforge.spec import load_baseline

    if tolerance and against is None:
        raise UsageError("--tolerance needs --against; a spec's own claim has its tolerance in [parity]")
    if no_parity and against is not None:
        raise UsageError("--no-parity is about the spec's own claim; --against compares with another spec instead")
    loaded = load(spec, set_, spec_root)
    plan = make_plan(loaded)
    other = None if against is None else make_plan(load_baseline(against, spec_root=spec_root))
    length = report_seq_len(plan, seq_len, None if other is None else other.model)
    run = plan.run.train
    report = estimate(
        plan.model,
        batch=batch if batch is not None else run.batch_size if run is not None else 1,
        seq_len=length,
        mesh=None if mesh is None else parse_mesh(mesh),
        devices=_devices(device),
        dense_values=plan.run.dense_values,
    )
    parity = claimed(plan, length) if other is None else _compared(plan, other, tolerance, length)
    if not no_parity:
        parity = with_fix(parity, loaded, spec, against)
    measured = _measured(plan, report) if measure else None
    cost = report.as_dict()
    if json_:
        print_json(tables.cost_record(plan.name, cost, parity) | {"measured": measured})
    else:
        _print_profile(plan.name, cost, parity.as_dict() if parity else None, measured)
    if not no_parity:
        end_with(parity, as_json=json_)


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


def _measured(plan: Any, report: Any) -> dict[str, Any]:
    """Real training steps at the shape of the report. Raises DeviceError where they would not fit."""
    from dataclasses import asdict

    from memforge.machine import require_memory

    run, memory = plan.run.train, report.memory
    checkpointed = run is not None and run.activation_checkpointing
    peak = memory.peak_checkpointed if checkpointed else memory.peak
    require_memory(peak, f"{plan.name}: a step on {report.batch} x {report.seq_len} tokens (--batch, --seq-len)")
    with console(stderr=True).status("measuring training steps on this CPU"):
        from memforge.profile.measure import measure_step

        step = measure_step(plan, report.batch, report.seq_len, checkpoint_layers=checkpointed)
    return {"activation_checkpointing": checkpointed, **asdict(step)}


def _compared(plan: Any, other: Any, tolerance: list[str] | None, seq_len: int) -> Any:
    """The verdict on --against, with the tolerance of the command line, of the spec's own claim, or the default."""
    from memforge.parity import compare
    from memforge.spec.schema import DEFAULT_TOLERANCE, ToleranceSpec

    allowed = plan.parity.tolerance if plan.parity is not None else DEFAULT_TOLERANCE
    allowed = ToleranceSpec.model_validate(tolerances(tolerance)) if tolerance else allowed
    return compare(plan.name, plan.model, other.name, other.model, allowed, seq_len)


def _print_profile(
    name: str, cost: dict[str, Any], parity: dict[str, Any] | None, measured: dict[str, Any] | None
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
    tables.show_tables(shown, cost, parity)
    page.print()
    for line in tables.conventions():
        page.print(line, style="dim", soft_wrap=True)


COMMANDS = {"profile": profile}
