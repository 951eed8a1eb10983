"""Commands on data: prepare and stats."""

from pathlib import Path
from typing import Any

import typer

from memforge.cli.options import APP, DataRoot, Json, Set, SpecPath, SpecRoot, load
from memforge.report.console import console, print_json

data_app = typer.Typer(name="data", help="Prepare the data of a spec, or say what it is made of.", **APP)


@data_app.command("prepare")
def prepare(
    spec: SpecPath, set_: Set = None, spec_root: SpecRoot = None, data_root: DataRoot = None, json_: Json = False
) -> None:
    """Read, check and tokenize the data as training would, and say where its tokens lie; training finds them there."""
    from memforge.report.data import show_prepared

    plan, corpus = _corpus(spec, set_, spec_root, data_root)
    from memforge.training.data.stats import prepared

    record = prepared(corpus, plan)
    print_json(record) if json_ else show_prepared(record)


@data_app.command("stats")
def stats(
    spec: SpecPath, set_: Set = None, spec_root: SpecRoot = None, data_root: DataRoot = None, json_: Json = False
) -> None:
    """Count documents, tokens and their frequencies, and how often [train] would read them."""
    from memforge.report.data import show_stats

    plan, corpus = _corpus(spec, set_, spec_root, data_root)
    from memforge.training.data.stats import corpus_stats

    record = corpus_stats(corpus, plan)
    print_json(record) if json_ else show_stats(record)


def _corpus(path: Path, overrides: list[str] | None, spec_root: Path | None, data_root: Path | None) -> tuple[Any, Any]:
    """The plan of a spec and its corpus, with notes on stderr while it is made."""
    from memforge.plan import make_plan
    from memforge.report.data import NoteReporter

    plan = make_plan(load(path, overrides, spec_root, data_root=data_root, require_data=True))
    with console(stderr=True).status("starting"):
        from memforge.training.data import load_corpus
    with NoteReporter() as reporter:
        return plan, load_corpus(plan, data_root or spec_root or path.parent, note=reporter.note)
