"""Commands on what a spec means: explain and diff."""

from pathlib import Path
from typing import Annotated, Any

import typer

from memforge.cli.options import Json, Set, SpecPath, SpecRoot, load
from memforge.report.console import console, plain, print_json, print_whole


def explain(
    spec: SpecPath,
    key: Annotated[str, typer.Argument(metavar="KEY", help="As in --set, or KIND.FIELD: moe.num_experts.")],
    set_: Set = None,
    spec_root: SpecRoot = None,
    json_: Json = False,
) -> None:
    """Say what a key is, where its value came from, what depends on it, and what one step more would cost."""
    from memforge.explain import explain as explained
    from memforge.parity import report_seq_len
    from memforge.plan import make_plan
    from memforge.report.explain import effect_table, explanation_lines, explanation_record

    loaded = load(spec, set_, spec_root)
    found = explained(loaded, key, report_seq_len(make_plan(loaded)))
    if json_:
        print_json(explanation_record(found))
        return
    for line in explanation_lines(found):
        plain(line)
    if found.effects and (found.parameters or found.ops):
        plain("")
        print_whole(console(), effect_table(found))


def diff(
    first: SpecPath,
    second: Annotated[Path, typer.Argument(metavar="SPEC", help="Another one.", show_default=False)],
    spec_root: SpecRoot = None,
    json_: Json = False,
) -> None:
    """Show how two specs differ, key by key, and what follows: parameters, FLOPs, bytes and memory."""
    from memforge.diff import differences
    from memforge.report.diff import difference_tables

    found = differences(load(first, None, spec_root), load(second, None, spec_root))
    if json_:
        print_json(found)
        return
    page = console()
    for i, table in enumerate(difference_tables(found)):
        if i:
            page.print()
        print_whole(page, table)


COMMANDS: dict[str, Any] = {"explain": explain, "diff": diff}
