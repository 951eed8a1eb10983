"""memforge build."""

from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.cli.match import Given, with_fix
from memforge.cli.options import Json, MeshOption, NoParity, Set, SpecPath, SpecRoot, load
from memforge.errors import UsageError, printable
from memforge.report.console import console, plain, print_json


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
    gpus: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="TARGET", help="Compile the kernels for this GPU, e.g. sm_90; repeatable."),
    ] = None,
    json_: Json = False,
) -> None:
    """Validate, plan, prove the budget, export the graph; write the build directory."""
    from memforge.cost import estimate
    from memforge.mesh import parse_mesh
    from memforge.parity import claimed, report_seq_len, require
    from memforge.plan import make_plan
    from memforge.report.cost import cost_record

    _require_sense(emit, weights, seed)
    if plan_only and (emit is not None or out is not None or gpus is not None):
        raise UsageError("--plan-only writes nothing: --out, --emit and --target have no meaning with it")
    ranks = None if mesh is None else parse_mesh(mesh)
    loaded = load(spec, set_, spec_root)
    plan = make_plan(loaded)
    given = {"pools": plan.run.parallel.pools, "update": plan.run.pool_update}
    cost = estimate(plan.model, seq_len=report_seq_len(plan), mesh=ranks, **given).as_dict()
    parity = claimed(plan)
    if plan.parity is not None and not no_parity:
        parity = with_fix(parity, loaded, plan.parity.baseline, Given(spec, set_, spec_root))
    if not no_parity:
        require(parity)
    if plan_only:
        if json_:
            print_json(cost_record(plan.name, cost, [parity] if parity else []))
        else:
            _print_plan(plan, cost, parity)
        return
    target = out or Path("build") / plan.name
    with console(stderr=True).status("building on meta and exporting the graph"):
        from memforge.export.directory import Weights, write_build

        manifest = write_build(plan, target, aten=Weights(seed, weights) if emit else None, mesh=ranks, targets=gpus)
    if json_:
        print_json({"directory": str(target), "caveats": cost["caveats"], **manifest})
    else:
        _print_plan(plan, cost, parity)
        _print_written(cost, manifest, target)


def _require_sense(emit: str | None, weights: Path | None, seed: int | None) -> None:
    """Raises UsageError for options of --emit that do not go together."""
    if emit not in (None, "aten"):
        raise UsageError(f"--emit {printable(emit)}: the one form is aten")
    if emit is None and (weights is not None or seed is not None):
        raise UsageError("--weights and --seed say what --emit aten writes")
    if weights is not None and seed is not None:
        raise UsageError("--weights and --seed: give one of them")


def _print_plan(plan: Any, cost: dict[str, Any], parity: Any) -> None:
    from memforge.report.cost import kind_table, mesh_table, parity_table, show_tables

    page = console()
    page.print(f"{plan.name}  {plan.model.num_layers} layers  seq_len {cost['seq_len']}\n", soft_wrap=True)
    tables = [kind_table(cost)]
    if cost["mesh"] is not None:
        tables.append(mesh_table(cost["mesh"]))
    verdict = None if parity is None else parity.as_dict()
    if verdict is not None:
        tables.append(parity_table(verdict))
    show_tables(tables, cost, [verdict] if verdict else [])


def _print_written(cost: dict[str, Any], manifest: dict[str, Any], target: Path) -> None:
    counted, aten = manifest["counter"], manifest["aten"]
    plain(
        f"\nledger = built model: {cost['params']['total']:,} parameters; "
        f"{counted['forward']:,} + {counted['backward']:,} FLOPs executed on {counted['batch']} x "
        f"{counted['seq_len']} tokens, as counted by torch"
    )
    if aten is not None:
        plain(
            f"model.aten.pt2 = the model with the weights of {aten['weights']}; logits differ by at most "
            f"{aten['largest_logit_difference']:.3g}. torch.export.load(FILE).module()(tokens) gives (logits, {{}})"
        )
    plain(f"wrote {target}/: {', '.join([*manifest['files'], 'manifest.json'])}")


COMMANDS = {"build": build}
