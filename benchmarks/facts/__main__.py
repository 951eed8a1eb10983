"""The experiment runner.

python -m benchmarks.facts run EXPERIMENT.toml --minutes 38    # go on, for so long
python -m benchmarks.facts status EXPERIMENT.toml              # what is done, and what was chosen
python -m benchmarks.facts report EXPERIMENT.toml              # write the report of what is done
python -m benchmarks.facts brief EXPERIMENT.toml               # the table of it that other pages show
python -m benchmarks.facts repeat EXPERIMENT.toml --count 3    # train some finished runs again and compare
"""

import os
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.facts.corpora import require
from benchmarks.facts.experiment import Experiment, read_experiment
from benchmarks.facts.jobs import Jobs
from benchmarks.facts.records import Records
from benchmarks.facts.runner import Runner, State, environment, only_one, state
from memforge.errors import CheckFailedError, DeviceError, MemforgeError, StorageError, UsageError
from memforge.report.console import console, plain, print_whole
from memforge.report.cost import titled_table

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

File = Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="A TOML file.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Records and report; results/NAME beside the file.")
]
Scratch = Annotated[Path | None, typer.Option("--scratch", metavar="DIR", help="Runs under way; runs/facts/NAME.")]


class Bench:
    """An experiment with its records on disk."""

    def __init__(self, file: Path, out: Path | None, scratch: Path | None) -> None:
        self.experiment: Experiment = read_experiment(file)
        self.jobs = Jobs(self.experiment, file.parent)
        self.out = out or file.parent / "results" / self.experiment.name
        self.scratch = scratch or Path("runs") / "facts" / self.experiment.name
        self.records = Records(self.out / "runs")

    def at_once(self) -> int:
        return max(1, len(os.sched_getaffinity(0)) // self.experiment.threads)

    def state(self) -> State:
        return state(self.jobs, self.records)


@app.command()
def run(
    file: File,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so long, and save; default: all of it.")
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="Trainings at a time; default: as many as the cores have threads for.")
    ] = None,
    out: Out = None,
    scratch: Scratch = None,
) -> None:
    """Train what is left, in the order of the file, and write the report."""
    bench = Bench(file, out, scratch)
    bench.jobs.require_parity()
    require(bench.experiment.corpora)
    require_headline()
    require_findings(bench)
    with only_one(bench.scratch, bench.out):
        runner = Runner(bench.jobs, bench.records, bench.scratch, minutes, at_once or bench.at_once())
        now = runner.run()
        goes_on = ": the same command goes on" if now.left or now.waiting else ""
        plain(now.how_far(runner.at_once) + goes_on, stderr=True)
        write_report(bench, now)


@app.command()
def status(file: File, out: Out = None, scratch: Scratch = None) -> None:
    """What is done, what is left, and what the search chose."""
    bench = Bench(file, out, scratch)
    parity, now = bench.jobs.require_parity(), bench.state()
    table = titled_table(bench.experiment.title, ("arm", "FLOPs", "runs", "left", "chosen"), left=("chosen",))
    for arm in bench.experiment.arm:
        done = sum(record.arm == arm for record in now.done.values())
        left = sum(job.arm == arm for job in now.left)
        settings = now.chosen.get(bench.jobs.tuned_as(arm), {})
        chosen = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())
        table.add_row(arm, f"{parity[arm].ratio:.3f}", str(done), str(left), chosen)
    print_whole(console(), table)
    plain(now.how_far(bench.at_once()) + (f"; {now.waiting} of them wait for the search" if now.waiting else ""))
    if now.others:
        plain(f"of no run: {', '.join(now.others)}")


@app.command()
def report(file: File, out: Out = None, scratch: Scratch = None) -> None:
    """Write the report of what is done."""
    bench = Bench(file, out, scratch)
    write_report(bench, bench.state())


@app.command()
def brief(file: File, out: Out = None) -> None:
    """The table of the main study in Markdown, as other pages show it."""
    bench = Bench(file, out, None)
    require_headline()
    from benchmarks.facts.found import Found
    from benchmarks.facts.report import in_brief

    lines = in_brief(Found(bench.jobs, bench.state()))
    if not lines:
        raise UsageError(f"{file}: no run of the main study is finished")
    sys.stdout.write("\n".join(lines).rstrip() + "\n")


@app.command()
def repeat(
    file: File,
    count: Annotated[int, typer.Option(min=1, help="Finished runs, drawn at random.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    out: Out = None,
    scratch: Scratch = None,
) -> None:
    """Train some of the runs again that were finished on a machine like this one. Exit 1 where one does not come out
    the same to the byte, `made` aside.
    """
    bench = Bench(file, out, scratch)
    require(bench.experiment.corpora)
    now, ours = bench.state(), environment()
    # Another processor has other kernels, which add up in another order; so may another torch.
    names = [name for name, record in sorted(now.done.items()) if ours.items() <= record.made.items()]
    if not names:
        raise UsageError(
            f"{file}: of {len(now.done)} finished runs none was made with this processor and these packages"
        )
    drawn = random.Random(seed).sample(names, min(count, len(names)))
    plain(f"{len(drawn)} of {len(names)} runs that were made here, of {len(now.done)} in all", stderr=True)
    waiting = {job.name: job for job in bench.jobs.all(now.chosen) if job.name in drawn}
    different, repeated = [], Records(bench.scratch / "repeated" / "different")
    with only_one(bench.scratch):
        runner = Runner(bench.jobs, bench.records, bench.scratch / "repeated", at_once=bench.at_once())
        runner.scratch.mkdir(exist_ok=True)
        for again in runner.train(lambda: (f"{len(waiting)} to compare", list(waiting.values()))):
            del waiting[again.name]
            found = again.differences(now.done[again.name])
            verdict = "the same"
            if found:
                different.append(again.name)
                repeated.write(again)
                verdict = f"DIFFERENT: {', '.join(found)} (see {repeated.path(again.name)})"
            plain(f"{again.name}: {verdict}, {again.made['seconds']:.0f} s")
    if different:
        raise CheckFailedError(f"not what was found before: {', '.join(different)}")


def require_headline() -> None:
    """Raises DeviceError where what the report is made with is not installed: known before hours of training."""
    missing = [name for name in ("matplotlib", "scipy") if find_spec(name) is None]
    if missing:
        raise DeviceError(f"the report needs {' and '.join(missing)}: pip install -c constraints.txt -e '.[headline]'")


def require_findings(bench: Bench) -> None:
    """Raises UsageError where a finding names no run: known before hours of training."""
    from benchmarks.facts.found import Found

    found = Found(bench.jobs, bench.state())
    for text in bench.experiment.findings.values():
        found.told(text)


def write_report(bench: Bench, now: State) -> None:
    require_headline()
    from benchmarks.facts.report import write

    write(bench.jobs, now, bench.out)


def main() -> None:
    """Run the command line; errors are one line."""
    try:
        app(standalone_mode=True)
    except MemforgeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except OSError as error:  # where records, pictures or runs should go
        sys.stderr.write(f"error: {error.filename or 'output'}: {error.strerror}\n")
        sys.exit(StorageError.exit_code)


if __name__ == "__main__":
    main()
