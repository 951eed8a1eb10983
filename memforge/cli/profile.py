"""memforge profile."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.cli.match import Given, with_fix
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
from memforge.errors import CheckFailedError, StorageError, UsageError, printable
from memforge.report.console import console, plain, print_json
from memforge.storage import storage_errors


def profile(
    spec: SpecPath,
    against: Annotated[
        list[Path] | None,
        typer.Option("--against", metavar="SPEC", help="Compare with this spec; exit 1 unless matched. Repeatable."),
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option("--tolerance", metavar="AXIS=X", help="Judge AXIS (params, active_params, flops, bytes)."),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens in a sequence; default: train.seq_len, or the longest that all models take."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Sequences, with --mesh of each rank; default: train.micro_batch_size, or 1.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option("--device", metavar="DEVICE", help="Of the roofline; default: all known. cpu is measured."),
    ] = None,
    mesh: MeshOption = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run training steps on this CPU and count what they hold.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="DIR", help="Run steps; write a trace for Perfetto, Chrome and TensorBoard."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write the report as one page with figures.")
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print one row for every block, pool and table instead.")] = False,
    set_: Set = None,
    spec_root: SpecRoot = None,
    no_parity: NoParity = False,
    json_: Json = False,
) -> None:
    """The ledger: parameters, FLOPs, bytes, memory and time, and the verdict on parity. Torch only to measure."""
    from memforge.cost import estimate
    from memforge.mesh import parse_mesh
    from memforge.parity import claimed, report_seq_len
    from memforge.plan import make_plan
    from memforge.report import cost as tables
    from memforge.report.csv import ledger_csv
    from memforge.spec import load_baseline

    if tolerance and not against:
        raise UsageError("--tolerance needs --against; a spec's own claim has its tolerance in [parity]")
    if no_parity and against:
        raise UsageError("--no-parity is about the spec's own claim; --against compares with another spec instead")
    if csv and json_:
        raise UsageError("--csv and --json: give one of them")
    if csv and measure and html is None:
        raise UsageError("--csv has no place for what --measure finds; --html or --json has")
    if html is not None and not html.parent.is_dir():
        raise StorageError(f"{html}: no such directory: {html.parent}")
    loaded, given = load(spec, set_, spec_root), Given(spec, set_, spec_root)
    plan = make_plan(loaded)
    others = [make_plan(load_baseline(path, spec_root=spec_root)) for path in against or ()]
    shortest = min((other.model for other in others), key=lambda model: model.max_seq_len, default=None)
    length = report_seq_len(plan, seq_len, shortest)
    run = plan.run.train
    report = estimate(
        plan.model,
        batch=batch if batch is not None else run.micro_batch_size if run is not None else 1,
        seq_len=length,
        mesh=None if mesh is None else parse_mesh(mesh),
        pools=plan.run.parallel.pools,
        devices=_devices(device),
        update=plan.run.pool_update,
        dropout=run is not None and run.dropout > 0,
    )
    if others:
        verdicts = [
            with_fix(_compared(plan, other, tolerance, length), loaded, other.model, given, to=path)
            for other, path in zip(others, against or (), strict=True)
        ]
    else:
        claim = claimed(plan, length)
        if plan.parity is not None and not no_parity:
            claim = with_fix(claim, loaded, plan.parity.baseline, given)
        verdicts = [] if claim is None else [claim]
    if trace is not None:
        _require_writable(trace)
    if measure or trace is not None:
        _require_room(plan, report)
    measured = _measured(plan, report) if measure else None
    cost = report.as_dict()
    if trace is not None:
        _write_trace(plan, report, cost, trace)
    record = tables.cost_record(plan.name, cost, verdicts) | {"measured": measured}
    if html is not None:
        _write_html(html, record)
    if json_:
        print_json(record)
    elif csv:
        sys.stdout.write(ledger_csv(cost))
    else:
        _print_profile(plan.name, cost, record["comparisons"], measured)
    if not no_parity:
        end_with(verdicts, as_json=json_)


def _write_html(path: Path, record: dict[str, Any]) -> None:
    from memforge.report.html import profile_page

    with storage_errors(path):
        path.write_text(profile_page(record), encoding="utf-8")
    plain(f"wrote {printable(str(path))}", stderr=True)


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


def _require_room(plan: Any, report: Any) -> None:
    """Raises DeviceError where a training step would not fit this machine."""
    from memforge.machine import require_memory

    run, memory = plan.run.train, report.memory
    peak = memory.peak_checkpointed if run is not None and run.activation_checkpointing else memory.peak
    require_memory(peak, f"{plan.name}: a step on {report.batch} x {report.seq_len} tokens (--batch, --seq-len)")


def _require_writable(directory: Path) -> None:
    """Raises StorageError before anything is run."""
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()


def _write_trace(plan: Any, report: Any, cost: dict[str, Any], directory: Path) -> None:
    with console(stderr=True).status("tracing training steps"):
        from memforge.profile.trace import write_trace

        files = write_trace(plan, directory, report.batch, report.seq_len, cost)
    for file in files:
        plain(f"wrote {printable(str(file))}", stderr=True)


def _measured(plan: Any, report: Any) -> dict[str, Any]:
    """Real training steps at the shape of the report. Raises CheckFailedError where torch counts other FLOPs."""
    from dataclasses import asdict

    from memforge.machine import cpu_name

    run = plan.run.train
    checkpointed = run is not None and run.activation_checkpointing
    with console(stderr=True).status("measuring training steps on this CPU") as status:
        from memforge.profile.counter import count_flops
        from memforge.profile.measure import measure_step, time_step

        shape = (report.batch, report.seq_len)
        step = measure_step(plan, *shape, checkpoint_layers=checkpointed)
        status.update("timing training steps on this CPU")
        times = time_step(plan, *shape, checkpoint_layers=checkpointed)
        status.update("counting FLOPs on the meta device")
        counted = count_flops(plan.model, *shape)
    if counted != report.flops(executed=True):
        raise CheckFailedError(f"executed FLOPs: the ledger has {report.flops(executed=True)}, torch counted {counted}")
    return {
        "device": cpu_name(),
        "activation_checkpointing": checkpointed,
        **asdict(step),
        "flops": {"forward": counted[0], "backward": counted[1]},
        "steps": times.steps,
        **_beside_prediction(plan, report, times, checkpointed),
    }


def _beside_prediction(plan: Any, report: Any, times: Any, checkpointed: bool) -> dict[str, Any]:
    """Measured seconds of each phase beside the predicted ones, or why there are none."""
    from dataclasses import asdict

    from memforge.cost.calibration import predict, read_calibration

    machine = read_calibration()
    why = None
    if checkpointed or plan.run.pool_update.dense:
        why = "steps that run layers again or update every row are not predicted"
    elif machine is None or not machine.is_of_this_machine():
        why = "memforge doctor --calibrate measures this machine"
    predicted = predict(plan.model, report, machine) if machine is not None and why is None else None
    phases = {"forward_and_backward": times.forward_and_backward, "update": times.update, "total": times.total}
    seconds = {
        name: {**asdict(spread), "predicted": getattr(predicted, name) if predicted else None}
        for name, spread in phases.items()
    }
    return {"seconds": seconds, "unpredicted": why}


def _compared(plan: Any, other: Any, tolerance: list[str] | None, seq_len: int) -> Any:
    """The verdict on --against, with the tolerance of the command line, of the spec's own claim, or the default."""
    from memforge.parity import compare
    from memforge.spec.schema import DEFAULT_TOLERANCE, ToleranceSpec

    allowed = plan.parity.tolerance if plan.parity is not None else DEFAULT_TOLERANCE
    allowed = ToleranceSpec.model_validate(tolerances(tolerance)) if tolerance else allowed
    return compare(plan.name, plan.model, other.name, other.model, allowed, seq_len)


def _print_profile(
    name: str, cost: dict[str, Any], verdicts: list[dict[str, Any]], measured: dict[str, Any] | None
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
        shown += [tables.mesh_table(cost["mesh"]), tables.wire_table(cost), tables.rank_roofline_table(cost["mesh"])]
    if measured is not None:
        shown.append(tables.time_table(measured))
    for verdict in verdicts:
        shown.append(tables.parity_table(verdict))
        if verdict["swaps"]:
            shown.append(tables.swap_table(verdict))
    if len(verdicts) > 1:
        shown.append(tables.comparison_table(name, verdicts))
    tables.show_tables(shown, cost, verdicts)
    page.print()
    for line in tables.conventions():
        page.print(line, style="dim", soft_wrap=True)


COMMANDS = {"profile": profile}
