"""Commands on runs: train, eval and generate."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.cli.match import Given, with_fix
from memforge.cli.options import (
    DataRoot,
    Device,
    Json,
    MeshOption,
    NoParity,
    Set,
    SpecPath,
    SpecRoot,
    is_other_rank,
    load,
    torch_device,
)
from memforge.errors import UsageError, is_text, printable
from memforge.mesh import MAX_RANKS, parse_mesh
from memforge.report.console import console, plain, print_json
from memforge.report.run import STEP

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)]


def train(
    spec: SpecPath,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Default: runs/NAME, or the next free runs/NAME-2, .."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="auto|step=N|PATH",
            help="Go on with the run in --out, or with SPEC if that is a run, from its newest sound checkpoint, from "
            "that of a step, or from the one at a path.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="If --out holds an earlier run, delete that.")] = False,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after this step of the run, and save.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after so many tokens of the run.")] = None,
    max_minutes: Annotated[float | None, typer.Option(min=0, help="Stop so many minutes after the start.")] = None,
    set_: Set = None,
    spec_root: SpecRoot = None,
    data_root: DataRoot = None,
    device: Device = None,
    mesh: MeshOption = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Start so many ranks on this machine, as torchrun would.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Walk through one step of one rank, and print what it holds; trains nothing."),
    ] = False,
    world_size: Annotated[int | None, typer.Option(min=1, max=MAX_RANKS, help="Ranks of a --dry-run.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Which of them is walked through; the last.")] = None,
    no_parity: NoParity = False,
    json_: Json = False,
) -> None:
    """Train a spec or a build directory; evaluate it; leave a run directory with checkpoints, metrics and a report."""
    from memforge.parity import claimed, require
    from memforge.plan import on_mesh

    if overwrite and out is None:
        raise UsageError("--overwrite needs --out: without it a run takes the next free directory")
    if overwrite and resume is not None:
        raise UsageError("--overwrite deletes a run and --resume goes on with it: give one of them")
    plan, loaded, root = _plan_of(spec, set_, spec_root, data_root)
    if not no_parity:
        parity = claimed(plan)
        if loaded is not None and plan.parity is not None:
            parity = with_fix(parity, loaded, plan.parity.baseline, Given(spec, set_, spec_root))
        require(parity)
    plan = plan if mesh is None else on_mesh(plan, parse_mesh(mesh))
    if dry_run:
        _walk(plan, world_size, rank, as_json=json_)
        return
    if world_size is not None or rank is not None:
        raise UsageError("--world-size and --rank are those of a --dry-run; --nproc starts ranks")
    target = out or _free_directory(Path("runs") / plan.name) if resume is None else _resumed(spec, out, resume)
    if nproc is not None and "MEMFORGE_LAUNCHED" not in os.environ:
        from memforge.launch import launch

        raise typer.Exit(launch(_of_each_rank(sys.argv[1:], target, out is None and resume is None), nproc))
    screen = console(stderr=True)
    with screen.status("starting torch"):
        from memforge.training import Budget
        from memforge.training import train as run_training
    from memforge.report.progress import RunReporter
    from memforge.report.runs import show_runs

    reporter = RunReporter(screen, str(target))
    try:
        summary = run_training(
            plan,
            target,
            data_root=root,
            device=torch_device(device),
            reporter=reporter,
            overwrite=overwrite,
            resume=resume,
            budget=Budget(max_steps, max_tokens, max_minutes),
        )
    finally:
        reporter.close()
    if is_other_rank():
        return
    if json_:
        print_json(summary)
    else:
        show_runs([summary])


def _walk(plan: Any, world_size: int | None, rank: int | None, *, as_json: bool) -> None:
    """Print what one rank of a run would hold, walked through beside the ledger."""
    from memforge.report.ranks import show_dry_run

    with console(stderr=True).status("walking through a step"):
        from memforge.profile.dry_run import dry_run, record
        from memforge.training.ranks import mesh_of

        known = plan.run.parallel
        size = world_size or known.dp_replicate * known.memory * (1 if known.dp_shard == "auto" else known.dp_shard)
        mesh = mesh_of(known, size)
        if rank is not None and rank >= mesh.ranks:
            raise UsageError(f"--rank {rank}: the ranks are 0 to {mesh.ranks - 1}")
        found = record(plan, mesh, dry_run(plan, mesh, rank))
    if as_json:
        print_json(found)
    else:
        show_dry_run(plan.name, found)


def _of_each_rank(arguments: list[str], target: Path, is_chosen: bool) -> list[str]:
    """The command that --nproc repeats in every rank, with the directory that was chosen for all of them."""
    return [*arguments, "--out", str(target)] if is_chosen else arguments


def _resumed(spec: Path, out: Path | None, resume: str) -> Path:
    """The run that --resume goes on with: the one the checkpoint's path lies in, or --out, or SPEC itself."""
    named = resume == "auto" or resume.startswith("step=")
    if not named and STEP.fullmatch(Path(resume).name) is None:
        raise UsageError(f"--resume {printable(resume)}: expected auto, step=N or the path of a checkpoint step-<n>")
    by_path = None if named else Path(resume).parent
    if by_path is not None and out is not None and by_path.resolve() != out.resolve():
        raise UsageError(f"--resume {printable(resume)} does not lie in --out {printable(str(out))}")
    target = by_path or out or (spec if (spec / "run.json").is_file() else None)
    if target is None:
        raise UsageError(f"--resume {printable(resume)}: which run? --out DIR says it")
    return target


def eval_(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.", show_default=False)],
    data_root: DataRoot = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Score the newest checkpoint of each run on its held-out data; print one table."""
    summaries = []
    screen = console(stderr=True)
    with screen.status("loading"):
        from memforge.training.evaluate import evaluate_run
    for run in runs:
        with screen.status(f"scoring {printable(str(run))}"):
            summaries.append(evaluate_run(run, data_root=data_root or Path(), device=torch_device(device)))
    if json_:
        print_json(summaries)
        return
    from memforge.report.runs import show_runs

    show_runs(summaries)


def generate(
    run: RunDir,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, max=100_000, help="Stop after so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Continue a text with the newest checkpoint of a run."""
    from memforge.training.checkpoint import open_run
    from memforge.training.data.tokenizer import end_id
    from memforge.training.evaluate import generate as sample

    if not is_text(prompt):
        raise UsageError("--prompt: not text in the encoding of this terminal")
    plan, model, tokenizer, _ = open_run(run, torch_device(device))
    end = end_id(tokenizer)
    given = [end, *tokenizer.encode(prompt).ids]
    tokens = sample(
        model,
        given,
        max_tokens=max_tokens,
        max_seq_len=plan.model.max_seq_len,
        temperature=temperature,
        seed=seed,
        end=end,
    )
    text = tokenizer.decode(tokens)
    if json_:
        print_json({"prompt": prompt, "text": text, "tokens": len(tokens)})
    else:
        plain(prompt + text)


def _plan_of(path: Path, overrides: list[str] | None, spec_root: Path | None, data_root: Path | None) -> Any:
    """The plan of a spec file or a build directory, the spec if it is one, and where its data path starts."""
    from memforge.plan import make_plan, read_plan

    if not path.exists() and path.suffix != ".toml":
        raise UsageError(f"{printable(str(path))}: no such spec, build or run directory")
    if not path.is_dir():
        spec = load(path, overrides, spec_root, data_root=data_root, require_data=True)
        return make_plan(spec), spec, data_root or spec_root or path.parent
    if not (path / "plan.json").is_file():
        raise UsageError(f"{path}: a directory without plan.json is not a build directory")
    if overrides:
        raise UsageError("--set changes a spec; a build directory is trained as it was built")
    return read_plan(path / "plan.json"), None, data_root or Path()


def _free_directory(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


COMMANDS = {"train": train, "eval": eval_, "generate": generate}
