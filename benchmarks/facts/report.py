"""The page of an experiment: answers first, then every number they are made of. Nothing here knows an arm by name."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.facts.answers import answers_of, differences, priced, prices, questions, undecided
from benchmarks.facts.experiment import Ablation, Experiment, Figure, Study, Value
from benchmarks.facts.found import Found, over, scores_of
from benchmarks.facts.jobs import Jobs, source_of
from benchmarks.facts.plots import Point, draw
from benchmarks.facts.records import Record
from benchmarks.facts.runner import State
from benchmarks.facts.shown import change, name_of, number, shown, table, told_settings, told_value
from benchmarks.facts.statistics import Law, difference, law_of, spread_of
from memforge.report.cost import si
from memforge.storage import replace_file

PAGE = "report.md"


def write(jobs: Jobs, now: State, out: Path) -> None:
    """Write the page and its pictures into `out`, and delete what pictures it has no more."""
    pictures: dict[str, str] = {}
    text = page(Found(jobs, now), pictures)
    out.mkdir(parents=True, exist_ok=True)
    for name, drawn in pictures.items():
        replace_file(out / name, drawn)
    replace_file(out / PAGE, text)
    for path in out.glob("*.svg"):
        if path.name not in pictures:
            path.unlink()


def page(found: Found, pictures: dict[str, str]) -> str:
    """The page; the SVG of each picture that it shows is put into `pictures` by the name of its file."""
    experiment, now = found.experiment, found.now
    left = len(now.left) + now.waiting
    parts = [f"# {experiment.title}", "", "Written by `python -m benchmarks.facts`. Do not edit.", ""]
    if left:
        parts += [f"**Not finished: {len(now.done)} runs are done, {left} are left.**", ""]
    parts += [experiment.about, ""] if experiment.about else []
    answers = answers_of(found)
    parts += [*differences(found, answers), *undecided(answers)]
    parts += in_brief(found, "## In brief", "")
    parts += questions(answers)
    parts += priced(found)
    parts += arms(found)
    for name in experiment.study:
        parts += studied(found, name, pictures)
    parts += [*searched(found), *noted(experiment), *data(found), *made(found)]
    return "\n".join(parts).rstrip() + "\n"


def arms(found: Found) -> list[str]:
    """What each arm is by the ledger, and the settings that the search chose for it."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for name in found.experiment.study:
        for _, _, record in found.study(name):
            groups[record.arm].append(record)
    if not groups:
        return []
    base = found.baseline()
    rows = [
        [
            found.label(arm),
            si(records[0].params),
            si(records[0].active_params),
            f"{records[0].slots:,}" if records[0].slots else "",
            si(round(records[0].flops_per_token)),
            *in_those_of(records, base),
            without_head(found, arm),
            told_settings(found.experiment.arm[arm].set | found.now.chosen[found.jobs.tuned_as(arm)])
            + told_edges(found, found.jobs.tuned_as(arm)),
        ]
        for arm, records in groups.items()
    ]
    head = [
        "arm",
        "params",
        "active",
        "slots",
        "FLOPs per token",
        *costs(found),
        f"{COSTS[0]} without the head",
        "set for it",
    ]
    common = told_settings(found.experiment.set)
    note = (
        "FLOPs are those of the products that a token takes, forward and backward, by the ledger. What the optimizer "
        "and traffic of memory take is in the time alone, that in brief: of a step, the least of its seeds. Backward "
        "skips slots that were not chosen, so that arms with many of them spend more than a third of their FLOPs "
        "forward. The head is the larger a part, the narrower a model; without it there are the FLOPs of the layers "
        "alone. Bits recalled, below, are the facts answered to the last token in phrasings held out, less as many as "
        "are right of facts never trained, at the bits of a mean answer, of which frequent families have fewer. Bits "
        "by NLL are what all answers take by their frequencies alone, less what they take by the model."
    )
    given = [found.experiment.arm[arm] for arm in groups]
    notes = [f"{arm.label}: {arm.note}" for arm in given if arm.note]
    return [
        "## Arms",
        "",
        f"All runs, but for what is set for an arm or varied in a study: {common}. By default: {defaults(found)}.",
        "",
        *table(head, rows),
        " ".join([note, *notes]),
        "",
    ]


def without_head(found: Found, arm: str) -> str:
    """The FLOPs of an arm but for its output head, in those of the baseline."""
    ours, theirs = (
        sum(found.jobs.flops_by_kind(name).values()) - found.jobs.flops_by_kind(name)["head"]
        for name in (arm, found.experiment.baseline)
    )
    return f"{ours / theirs:.3f}"


# What decides a training and that no arm need set.
DEFAULTS = (
    "seq_len", "betas", "eps", "clip_norm", "dropout", "value_optimizer", "value_weight_decay", "decay_steps",
    "final_rate",
)  # fmt: skip


def defaults(found: Found) -> str:
    """Of those the ones that all arms of the main study have in common."""
    plans = [job.plan().run.train for _, _, job in found.jobs.of_study(found.main, found.now.chosen)]
    told = {key: {told_value(getattr(train, key)) for train in plans if train is not None} for key in DEFAULTS}
    return ", ".join(f"{name_of(key)} {values.pop()}" for key, values in told.items() if len(values) == 1)


# The measures in the table of a study.
COLUMNS = (
    "recall", "recall.rare", "recall.unseen", "net_recall", "held_out_loss", "foretold_bits", "recalled_bits",
    "bits_per_param", "bits_per_tflop", "slots_per_fact", "slots_used", "slots_ever", "slots_effective",
    "slots_top_1pct",
)  # fmt: skip
# What an arm costs of what the baseline does.
COSTS = ("FLOPs", "forward FLOPs")


def costs(found: Found, *more: str) -> list[str]:
    """The heads of the columns of what an arm costs."""
    return [f"{cost} / {found.label(found.experiment.baseline)}" for cost in (*COSTS, *more)]


def in_those_of(records: Sequence[Record], base: Sequence[Record]) -> tuple[str, ...]:
    """What runs count per token of what those of the baseline do; nothing while these are not there."""
    if not base:
        return ("",) * len(COSTS)
    return (
        f"{records[0].flops_per_token / base[0].flops_per_token:.3f}",
        f"{records[0].forward_flops_per_token / base[0].forward_flops_per_token:.3f}",
    )


def time_in_that_of(records: Sequence[Record], base: Sequence[Record]) -> str:
    """The least time of a step of runs in that of the baseline, on a processor that both were trained on: what else the
    machine does only adds to it.
    """
    paces: list[dict[str, float]] = [{}, {}]
    for pace, runs in zip(paces, (records, base), strict=True):
        for run in runs:
            cpu = run.made["cpu"]
            pace[cpu] = min(pace.get(cpu, math.inf), run.made["seconds"] / run.steps)
    shared = paces[0].keys() & paces[1].keys()
    return f"{fmean(paces[0][cpu] / paces[1][cpu] for cpu in shared):.2f}" if shared else ""


def studied(found: Found, name: str, pictures: dict[str, str]) -> list[str]:
    """All that is shown of a study: what it has of an ablation, its scores, its pictures."""
    experiment = found.experiment
    if not (rows := scores(found, name, experiment.study[name])):
        return []
    parts = [f"## {experiment.study[name].title or name}", ""]
    for ablation in experiment.ablation.values():
        parts += ablated(found, ablation) if ablation.study == name else []
    parts += rows
    for path, figure in experiment.figure.items():
        parts += pictured(found, path, figure, pictures) if figure.study == name else []
    return parts


def scores(found: Found, name: str, study: Study) -> list[str]:
    """A row for each arm and point of a study, and what the best guess without a model scores at each point."""
    groups: dict[tuple[str, tuple[tuple[str, Value], ...]], list[Record]] = defaultdict(list)
    at_point: dict[tuple[tuple[str, Value], ...], list[Record]] = defaultdict(list)
    for point, _, record in found.study(name):
        at = tuple(point.items())
        groups[record.arm, at].append(record)
        at_point[at].append(record)
    if not groups:
        return []
    varied = [name_of(key) for key in study.vary]
    head = ["arm", *varied, *FRAME, "seeds"]
    rows = []
    for (arm, at), records in groups.items():
        first = records[0]
        cells = [found.label(arm), *(told_value(value) for _, value in at), si(first.params)]
        cells += [si(round(first.flops_per_token)), si(first.tokens), f"{first.exposures_per_fact or 0:.1f}"]
        diverged = sum(record.ended != "done" for record in records)
        count = f"{len(records)}, {diverged} of them diverged" if diverged else str(len(records))
        rows.append([*cells, count, *(over(records, measure) for measure in COLUMNS)])
    rows, alike = without_alike(head, rows)
    guesses = {at: best_guess(records) for at, records in at_point.items()}
    if len(set(guesses.values())) == 1:  # what is varied is not the facts
        guesses = {(): next(iter(guesses.values()))}
    for at, (guess, score) in guesses.items():
        cells = [f"no model: {guess}", *(told_value(value) for _, value in at)]
        rows.append([*cells, *[""] * (len(head) - len(cells)), score, *[""] * (len(COLUMNS) - 1)])
    return [*alike, *table([*head, *map(name_of, COLUMNS)], rows), *spread(found, study, groups)]


# What runs of a study may have in common.
FRAME = ("params", "FLOPs per token", "tokens", "exposures per fact")


def without_alike(head: list[str], rows: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Rows with nothing where all of them say the same, which `table` leaves out, and the line that says it for all."""
    alike = [i for i, name in enumerate(head) if name in FRAME and len(rows) > 1 and len({row[i] for row in rows}) == 1]
    kept = [["" if i in alike else cell for i, cell in enumerate(row)] for row in rows]
    return kept, ([f"All: {', '.join(f'{head[i]} {rows[0][i]}' for i in alike)}.", ""] if alike else [])


def best_guess(records: list[Record]) -> tuple[str, str]:
    """The best of what scores without a model, and its score."""
    scored = {name: fmean(record.baselines[name] for record in records) for name in records[0].baselines}
    best = max(scored, key=lambda name: scored[name])
    return best.replace("_", " "), shown("recall", scored[best])


def spread(found: Found, study: Study, groups: dict[Any, list[Record]]) -> list[str]:
    """How far apart runs of one seed must be to differ, by arms of the main study that are tuned as these are."""
    if all(len(records) > 1 for records in groups.values()):
        return []
    main = found.by_arm(found.main)
    told = []
    for tuned in dict.fromkeys(map(found.jobs.tuned_as, study.arms)):
        alike = {arm: records for arm, records in main.items() if found.jobs.tuned_as(arm) == tuned}
        if (of_arms := spread_of([list(scores_of(records, "recall").values()) for records in alike.values()])) is None:
            continue
        told.append(
            f"{', '.join(map(found.label, alike))}: standard deviation {100 * of_arms.deviation:.1f} points of recall, "
            f"two single runs differ from {100 * of_arms.apart:.1f} points on"
        )
    return [f"Seeds of the main study. {'; '.join(told)}.", ""] if told else []


def in_brief(found: Found, *before: str) -> list[str]:
    """The main study in few columns, what each arm is worth in the last; nothing where none of it is done."""
    groups, base = found.by_arm(found.main), found.baseline()
    if not groups:
        return []
    measures, worth = ("recall", "held_out_loss", "recalled_bits"), found.experiment.worth
    worths = prices(found, worth, worth.measure) if worth is not None else {}
    rows = [
        [
            found.label(arm),
            si(records[0].params),
            *in_those_of(records, base),
            time_in_that_of(records, base),
            *(over(records, measure) for measure in measures),
            str(worths.get(arm, "")),
        ]
        for arm, records in groups.items()
    ]
    guess, score = best_guess([record for records in groups.values() for record in records])
    rows.append([f"no model: {guess}", "", *[""] * len(COSTS), "", score, "", "", ""])
    head = [
        "arm",
        "params",
        *costs(found, "time"),
        *map(name_of, measures),
        f"FLOPs of {worth.title} / its own" if worth else "",
    ]
    return [*before, *table(head, rows)]


def pictured(found: Found, name: str, figure: Figure, pictures: dict[str, str]) -> list[str]:
    """A picture of a study, and the law through it."""
    lines: dict[str, list[Point]] = defaultdict(list)
    of_seeds: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    titles = {arm: title for title, arms in figure.lines.items() for arm in arms}
    for _, seed, record in found.study(figure.study):
        label = figure.study if figure.join == "study" else titles.get(record.arm, found.label(record.arm))
        for x, y in points_of(figure, record):
            lines[label].append((x, y))
            of_seeds[seed][x].append(y)
    if not lines:
        return []
    for title, arms in figure.beside.items():
        runs = [record for arm in arms for record in found.as_tuned.get(arm, ())]
        if points := [point for record in runs for point in points_of(figure, record)]:
            lines[title] += points
    seeds = {seed: {x: fmean(y) for x, y in of_seed.items()} for seed, of_seed in of_seeds.items()}
    law = None
    if figure.law != "none":
        floor = scores_of(found.as_tuned.get(figure.floor, []), figure.y) if figure.floor else {}
        law = law_of(seeds, fmean(floor.values()) if floor else 0.0)
    file = f"{name}.svg"
    pictures[file] = draw(figure, lines, law)
    text = [f"### {figure.title}", "", f"![{figure.title}]({file})", ""]
    if figure.note:
        text += [figure.note, ""]
    if figure.law != "none":
        text += rises(seeds, figure)
    if law is not None:
        text += [told(law, figure), ""]
    return text


def points_of(figure: Figure, record: Record) -> list[Point]:
    """What a run came to, or its whole course; nothing where it has not both measures."""
    x, y = record.figure(figure.x), record.figure(figure.y)
    if x is None or y is None or (figure.log_x and x <= 0):  # no slots have no place among powers
        return []
    if figure.join == "runs":
        return [(x * row["step"] / record.steps, row[figure.y]) for row in record.curve]
    return [(x, y)]


def rises(seeds: Mapping[int, Mapping[float, float]], figure: Figure) -> list[str]:
    """What more x adds to a share, from one x to the next."""
    x, steps = sorted({x for of_seed in seeds.values() for x in of_seed}), []
    for low, high in pairwise(x):
        before, after = ({seed: y[at] for seed, y in seeds.items() if at in y} for at in (low, high))
        if before.keys() & after.keys():
            gained = change(figure.y, difference(after, before))
            steps.append(f"{shown(figure.x, low)} to {shown(figure.x, high)} {gained}")
    if not steps:
        return []
    return [
        f"Points of {name_of(figure.y)} from one number of {name_of(figure.x)} to the next: {', '.join(steps)}.",
        "",
    ]


def told(law: Law, figure: Figure) -> str:
    """The law in words: its three numbers with their intervals, and where it stops."""
    x, y, stops = name_of(figure.x), name_of(figure.y), law.stops_at
    on = "the points do not show it stop short of all there is"
    end = on if stops is None else f"90% of the way is made at {number(stops)} {x}"
    formula = f"{law.floor:.3f} + {law.top - law.floor:.3f} / (1 + ({number(law.half)} / {x})^{law.slope:.2f})"
    text = f"Fitted: {y} = {formula}, root mean square of the residuals {law.residual:.4f}; {end}."
    if law.intervals is None:
        return f"{text} There are no intervals: not every seed has a law of its own."
    top, half, slope = law.intervals
    return (
        f"{text} 95% intervals over seeds: top {max(top.low, 0):.3f} to {min(top.high, 1):.3f}, half of the way at "
        f"{number(half.low)} to {number(half.high)} {x}, exponent {slope.low:.2f} to {slope.high:.2f}."
    )


def ablated(found: Found, ablation: Ablation) -> list[str]:
    records, base = found.by_arm(ablation.study), found.baseline()
    rows = [
        [
            found.label(arm),
            over(records[arm], "recall"),
            over(records[arm], "held_out_loss"),
            *in_those_of(records[arm], base),
            str(len(records[arm])),
            paper,
        ]
        for arm, paper in ablation.paper.items()
        if records[arm]
    ]
    if not rows:
        return []
    head = ["variant", "recall", "NLL", *costs(found), "seeds", ablation.paper_measure]
    notes = [ablation.note, ""] if ablation.note else []
    return [f"### {ablation.title}", "", *table(head, rows), *notes]


def searched(found: Found) -> list[str]:
    """What was tried for each arm, and what was chosen."""
    search, rows = found.experiment.search, []
    for arm in found.jobs.tuned_arms():
        trials = [found.now.done.get(job.name) for job in found.jobs.trials(arm)]
        given = found.experiment.arm[arm]
        for settings, record in zip(given.trials(), trials, strict=True):
            if record is None:
                continue
            cells = [
                shown(m, record.final[m]) if m in record.final else record.ended for m in ("recall", "held_out_loss")
            ]
            mark = f"**chosen**{told_edges(found, arm)}" if found.now.chosen.get(arm) == settings else ""
            rows.append([found.label(arm), told_settings(settings), *cells, mark])
    if not rows:
        return []
    common = told_settings(found.experiment.set | search.set)
    return [
        "## Search",
        "",
        f"{search.trials} trials for every arm that is tuned, with, but for what they try, {common}, seed "
        f"{search.seed}. Chosen by {name_of(search.measure)}, the {search.best}.",
        "",
        *table(["arm", "tried", "recall", "NLL", ""], rows),
    ]


def noted(experiment: Experiment) -> list[str]:
    """How the experiment came about."""
    notes = [f"- **{title}** {text}" for title, text in experiment.notes.items()]
    return ["## How this came about", "", *notes, ""] if notes else []


def told_edges(found: Found, arm: str) -> str:
    """What was chosen for an arm of three values or more and has not been tried from both sides."""
    chosen, trials = found.now.chosen[arm], found.experiment.arm[arm].trials()
    edges = []
    for key, value in chosen.items():
        tried = {other for trial in trials if isinstance(other := trial[key], float)}
        if len(tried) > 2 and value in (min(tried), max(tried)):
            edges.append(key)
    return f"; at the edge of what was tried: {', '.join(map(name_of, edges))}" if edges else ""


def data(found: Found) -> list[str]:
    """The facts of each seed and count, and what scores without a model."""
    records = [(source_of(job.plan()), found.now.done[job.name]) for job in found.all_done()]
    names = sorted({name for _, record in records for name in record.baselines})
    rows = {
        (source, int(record.data["facts"]), record.seed): [
            f"{record.data['tokens_per_epoch']:,}",
            f"{record.data['answer_bits']:.2f}",
            *(f"{100 * record.baselines[name]:.2f}%" if name in record.baselines else "" for name in names),
            f"`{str(record.data['corpus_sha256'])[:16]}`",
        ]
        for source, record in records
    }
    if not rows:
        return []
    head = ["source", "facts", "seed", "tokens of an epoch", "bits of an answer", *(n.replace("_", " ") for n in names)]
    told = [[source, f"{facts:,}", str(seed), *row] for (source, facts, seed), row in sorted(rows.items())]
    return ["## Facts", "", "Scores that need no model, in percent of answers:", "", *table([*head, "SHA-256"], told)]


def made(found: Found) -> list[str]:
    """Commands, machines and commits."""
    all_made = [record.made for record in found.now.done.values()]
    if not all_made:
        return []
    hours = sum(made["seconds"] for made in all_made) / 3600

    def all_of(values: Iterable[object]) -> str:
        counts = Counter(map(str, values))
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{value} ({count} runs)" for value, count in sorted(counts.items()))

    # A training that was interrupted has all that it went on at.
    commits = {commit for made in all_made for commit in made["commit"].split(", ")}
    versions = ", ".join(sorted({f"{name} {number}" for made in all_made for name, number in made["versions"].items()}))
    return [
        "## Made",
        "",
        f"{len(all_made)} runs, {hours:.1f} hours of training; {all_of(made['cpu'] for made in all_made)}; threads of "
        f"a training: {all_of(made['threads'] for made in all_made)}, trainings at a time: "
        f"{all_of(made['at_once'] for made in all_made)}; {versions}; commits {', '.join(sorted(commits))}.",
        "",
    ]
