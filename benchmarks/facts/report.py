"""The page of an experiment: answers first, then every number they are made of. Nothing here knows an arm by name."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.facts.experiment import Ablation, Experiment, Figure, Question, Settings, Study, Value, Worth
from benchmarks.facts.jobs import Jobs
from benchmarks.facts.plots import Point, draw
from benchmarks.facts.records import Record
from benchmarks.facts.runner import State
from benchmarks.facts.statistics import Estimate, Law, difference, estimate, fit, reached_at
from memforge.errors import UsageError
from memforge.report.cost import si
from memforge.storage import replace_file

PAGE = "report.md"
# What a measure is called, and how it is printed.
MEASURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "recall": ("recall", lambda value: f"{100 * value:.1f}%"),
    "recall.rare": ("recall, rare phrasings", lambda value: f"{100 * value:.1f}%"),
    "held_out_loss": ("NLL per answer token", lambda value: f"{value:.3f}"),
    "held_out_loss.rare": ("NLL, rare phrasings", lambda value: f"{value:.3f}"),
    "recalled_bits": ("bits recalled", lambda value: si(round(value))),
    "bits_per_param": ("bits per parameter", lambda value: f"{value:.4f}"),
    "bits_per_mflop": ("kbit per MFLOP a token", lambda value: f"{value / 1e3:.1f}"),
    "slots_used": ("slots used", lambda value: f"{100 * value:.1f}%"),
    "flops_per_token": ("FLOPs per token", lambda value: si(round(value))),
    "train_flops": ("training FLOPs", lambda value: si(round(value))),
    "slots": ("slots", lambda value: f"{value:,.0f}"),
}
SAYS = {True: "yes", False: "no", None: "undecided"}
PAPER_SAYS = {"more": True, "less": False, "unclear": None}


def name_of(measure: str) -> str:
    return MEASURES[measure][0] if measure in MEASURES else measure.rpartition(".")[2].replace("_", " ")


def shown(measure: str, value: float) -> str:
    return MEASURES[measure][1](value) if measure in MEASURES else f"{value:,.6g}"


def interval(measure: str, found: Estimate) -> str:
    """A mean and how far its interval reaches."""
    text = shown(measure, found.mean)
    return f"{text} ± {shown(measure, found.high - found.mean)}" if found.known else text


def over(records: Iterable[Record], measure: str) -> str:
    """The mean of a measure over the runs that have it."""
    values = [value for record in records if (value := record.figure(measure)) is not None]
    return interval(measure, estimate(values)) if values else ""


class Found:
    """The records of an experiment, by study."""

    def __init__(self, experiment: Experiment, jobs: Jobs, now: State) -> None:
        self.experiment, self.jobs, self.now = experiment, jobs, now

    def study(self, name: str) -> list[tuple[Settings, int, Record]]:
        """Point, seed and record of each finished run of a study."""
        return [
            (point, seed, self.now.done[job.name])
            for point, seed, job in self.jobs.of_study(name, self.now.chosen)
            if job.name in self.now.done
        ]

    def by_arm(self, study: str) -> dict[str, list[Record]]:
        groups: dict[str, list[Record]] = defaultdict(list)
        for _, _, record in self.study(study):
            groups[record.arm].append(record)
        return groups

    def by_seed(self, study: str, arm: str, measure: str) -> dict[int, float]:
        return {
            seed: value
            for _, seed, record in self.study(study)
            if record.arm == arm and (value := record.figure(measure)) is not None
        }

    def of_arm(self, arm: str, measure: str) -> list[float]:
        """The measure of an arm by seed, over all studies that vary no key."""
        plain = [name for name, study in self.experiment.study.items() if arm in study.arms and not study.vary]
        found = {seed: value for name in plain for seed, value in self.by_seed(name, arm, measure).items()}
        return list(found.values())

    def label(self, arm: str) -> str:
        return self.experiment.arm[arm].label


def write(experiment: Experiment, jobs: Jobs, now: State, out: Path) -> None:
    """Write the page and its pictures into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    found = Found(experiment, jobs, now)
    # Pictures of what was found before, which the page may no longer have.
    for name in experiment.figure:
        (out / f"{name}.svg").unlink(missing_ok=True)
    replace_file(out / PAGE, page(found, out))


def page(found: Found, out: Path) -> str:
    experiment, now = found.experiment, found.now
    left = len(now.left) + now.waiting
    parts = [f"# {experiment.title}", "", "Written by `python -m benchmarks.facts`. Do not edit.", ""]
    if left:
        parts += [f"**Not finished: {len(now.done)} runs are done, {left} are left.**", ""]
    answers = [answer for question in experiment.question if (answer := Answer.of(found, question)) is not None]
    parts += differences(experiment, answers)
    parts += questions(answers)
    parts += [line for worth in experiment.worth for line in times(found, worth)]
    parts += arms(found)
    for title, study in experiment.study.items():
        parts += scores(found, title, study)
    for name, figure in experiment.figure.items():
        parts += pictured(found, name, figure, out)
    for ablation in experiment.ablation.values():
        parts += ablated(found, ablation)
    parts += [*searched(found), *data(found), *made(found)]
    return "\n".join(parts).rstrip() + "\n"


class Answer:
    """A question with what was found: a difference over seeds, and whether it is more than none."""

    def __init__(self, question: Question, ours: Estimate, theirs: Estimate, more: Estimate) -> None:
        self.question, self.ours, self.theirs, self.more = question, ours, theirs, more

    @classmethod
    def of(cls, found: Found, question: Question) -> "Answer | None":
        ours, theirs = (found.by_seed(question.study, arm, question.measure) for arm in (question.arm, question.than))
        if not ours.keys() & theirs.keys():
            return None
        return cls(question, estimate([*ours.values()]), estimate([*theirs.values()]), difference(ours, theirs))

    @property
    def verdict(self) -> bool | None:
        """None: the interval holds zero, or there is none."""
        if not self.more.known or self.more.low <= 0 <= self.more.high:
            return None
        return self.more.low > 0

    @property
    def differs(self) -> bool:
        said = PAPER_SAYS[self.question.paper_says]
        return said is not None and self.verdict is not None and said != self.verdict


def differences(experiment: Experiment, answers: list[Answer]) -> list[str]:
    """Where the order is not that of the paper; what was found out about it."""
    if not answers:
        return []
    differing = [answer for answer in answers if answer.differs]
    undecided = [answer for answer in answers if answer.verdict is None]
    lines = ["## Where this differs from the paper", ""]
    lines += [
        f"- {a.question.text} {SAYS[a.verdict].capitalize()}, and in the paper {a.question.paper}." for a in differing
    ]
    if not differing:
        lines += ["Nowhere among the questions that the intervals decide."]
    if undecided:
        lines += [f"- Undecided, the 95% interval of the difference holds zero: {a.question.text}" for a in undecided]
    lines += [f"- **{title}** {text}" for title, text in experiment.findings.items()]
    return [*lines, ""]


def questions(answers: list[Answer]) -> list[str]:
    if not answers:
        return []
    return [
        "## Answers",
        "",
        *table(
            ["question", "answer", "difference, 95% interval", "seeds", "ours", "against", "in the paper"],
            (
                [
                    a.question.text,
                    f"**{SAYS[a.verdict]}**",
                    f"{points(a.more.mean)} [{points(a.more.low)}, {points(a.more.high)}]",
                    str(a.more.count),
                    interval(a.question.measure, a.ours),
                    interval(a.question.measure, a.theirs),
                    a.question.paper,
                ]
                for a in answers
            ),
        ),
        "Differences are in percentage points, seed by seed: both arms of a seed train on the same facts in the same "
        "order. Intervals are Student's t over seeds, each by itself: of "
        f"{len(answers)} intervals of 95% about {0.05 * len(answers):.1f} miss.",
        "",
    ]


def times(found: Found, worth: Worth) -> list[str]:
    """How many times the FLOPs of an arm others need for what it has: by seed, and over seeds where all are known."""
    ours = found.by_seed(worth.study, worth.arm, worth.measure)
    costs = {record.arm: record.flops_per_token for _, _, record in found.study(worth.study)}
    theirs = {arm: found.by_seed(worth.study, arm, worth.measure) for arm in worth.along}
    seeds = [seed for seed in ours if all(seed in of_arm for of_arm in theirs.values())]
    if not seeds:
        return []
    ratios = []
    for seed in seeds:
        line = [(costs[arm], of_arm[seed]) for arm, of_arm in theirs.items()]
        ratios.append(reached_at(line, ours[seed]) / costs[worth.arm])
    least, most = (end(costs[arm] for arm in worth.along) / costs[worth.arm] for end in (min, max))
    each = ", ".join(
        f"more than {most:.1f}" if ratio == math.inf else f"less than {least:.1f}" if ratio == 0 else f"{ratio:.1f}"
        for ratio in ratios
    )
    text = f"{worth.text} By seed {each} times."
    if all(0 < ratio < math.inf for ratio in ratios):
        over = estimate([math.log(ratio) for ratio in ratios])
        reach = f", 95% interval {math.exp(over.low):.1f} to {math.exp(over.high):.1f}" if over.known else ""
        text = f"{worth.text} {math.exp(over.mean):.1f} times{reach} (by seed {each})."
    return [f"{text} In the paper: {worth.paper}.", ""]


def points(value: float) -> str:
    return "?" if math.isnan(value) else f"{100 * value:+.1f}"


def arms(found: Found) -> list[str]:
    """What each arm is by the ledger, and the settings that the search chose for it."""
    firsts: dict[str, Record] = {}
    for name in found.experiment.study:
        for _, _, record in found.study(name):
            firsts.setdefault(record.arm, record)
    if not firsts:
        return []
    base = firsts.get(found.experiment.baseline)
    rows = [
        [
            found.label(arm),
            si(record.params),
            si(record.active_params),
            f"{record.slots:,}" if record.slots else "",
            si(round(record.flops_per_token)),
            f"{record.flops_per_token / base.flops_per_token:.3f}" if base else "",
            f"{record.forward_flops_per_token / base.forward_flops_per_token:.3f}" if base else "",
            told_settings(found.experiment.arm[arm].set | found.now.chosen[found.jobs.tuned_as(arm)]),
        ]
        for arm, record in firsts.items()
    ]
    head = ["arm", "params", "active", "slots", "FLOPs per token", "times the baseline", "forward alone", "set for it"]
    common = told_settings(found.experiment.set)
    note = "FLOPs are forward and backward: tables have no gradient with respect to what they are multiplied with."
    return ["## Arms", "", f"All runs: {common}.", "", *table(head, rows), note, ""]


# The measures in the table of a study.
COLUMNS = (
    "recall", "recall.rare", "held_out_loss", "recalled_bits", "bits_per_param", "bits_per_mflop", "slots_used",
)  # fmt: skip


def scores(found: Found, name: str, study: Study) -> list[str]:
    """A row for each arm and point of a study."""
    groups: dict[tuple[str, tuple[tuple[str, Value], ...]], list[Record]] = defaultdict(list)
    for point, _, record in found.study(name):
        groups[record.arm, tuple(point.items())].append(record)
    if not groups:
        return []
    rows = []
    for (arm, at), records in groups.items():
        first = records[0]
        cells = [found.label(arm), *(f"{value:,}" for _, value in at), si(first.params)]
        cells += [si(round(first.flops_per_token)), si(first.tokens), f"{first.exposures_per_fact or 0:.1f}"]
        diverged = sum(record.ended != "done" for record in records)
        count = f"{len(records)}, {diverged} of them diverged" if diverged else str(len(records))
        rows.append([*cells, count, *(over(records, measure) for measure in COLUMNS)])
    varied = [name_of(key) for key in study.vary]
    head = ["arm", *varied, "params", "FLOPs per token", "tokens", "exposures per fact", "seeds"]
    return [f"## Study: {name}", "", *table([*head, *map(name_of, COLUMNS)], rows)]


def in_brief(found: Found) -> str:
    """The main study in few columns, and what an arm is worth. Raises UsageError where none of it is done."""
    study = next(iter(found.experiment.study))
    groups = found.by_arm(study)
    if not groups:
        raise UsageError(f"study.{study}: no run of it is finished")
    base = groups.get(found.experiment.baseline)
    rows = [
        [
            found.label(arm),
            si(records[0].params),
            f"{records[0].flops_per_token / base[0].flops_per_token:.2f}" if base else "",
            *(over(records, measure) for measure in ("recall", "held_out_loss", "bits_per_param")),
        ]
        for arm, records in groups.items()
    ]
    head = ["arm", "params", "FLOPs", *map(name_of, ("recall", "held_out_loss", "bits_per_param"))]
    lines = [*table(head, rows), *(line for worth in found.experiment.worth for line in times(found, worth))]
    return "\n".join(lines).rstrip() + "\n"


def pictured(found: Found, name: str, figure: Figure, out: Path) -> list[str]:
    """A picture of a study, and the law through it."""
    lines: dict[str, list[Point]] = defaultdict(list)
    for _, _, record in found.study(figure.study):
        label, x, y = found.label(record.arm), record.figure(figure.x), record.figure(figure.y)
        if x is None or y is None:
            continue
        if figure.join == "runs":
            lines[label] += [Point(x * row["step"] / record.steps, row[figure.y], label) for row in record.curve]
        else:
            lines[label if figure.join == "arms" else figure.study].append(Point(x, y, label))
    if not lines:
        return []
    law = None
    if figure.law != "none":
        floor = found.of_arm(figure.floor, figure.y) if figure.floor else []
        law = fit([(p.x, p.y) for points in lines.values() for p in points], fmean(floor) if floor else 0.0)
    draw(figure, lines, law, out / f"{name}.svg", (name_of(figure.x), name_of(figure.y)), shown)
    text = [f"## {figure.title}", "", f"![{figure.title}]({name}.svg)", ""]
    if figure.note:
        text += [figure.note, ""]
    if law is not None:
        text += [told(law, figure), ""]
    return text


def told(law: Law, figure: Figure) -> str:
    """The law in words: its three numbers with their intervals, and where it stops."""
    (top_low, top_high), (half_low, half_high), (slope_low, slope_high) = law.intervals
    x, y, stops = name_of(figure.x), name_of(figure.y), law.stops_at
    end = "the points do not show where it stops" if stops is None else f"90% of the way is made at {number(stops)} {x}"
    formula = f"{law.floor:.3f} + {law.top - law.floor:.3f} / (1 + ({number(law.half)} / {x})^{law.slope:.2f})"
    half = f"half of the way at {number(half_low)} to {number(half_high)} {x}"
    return (
        f"Fitted: {y} = {formula}, root mean square of the residuals {law.residual:.4f}. 95% intervals: top "
        f"{top_low:.3f} to {top_high:.3f}, {half}, exponent {slope_low:.2f} to {slope_high:.2f}; {end}."
    )


def number(value: float) -> str:
    return si(round(value)) if 1 <= value < 1e15 else f"{value:.1e}"


def ablated(found: Found, ablation: Ablation) -> list[str]:
    records = found.by_arm(ablation.study)
    rows = [
        [
            found.label(arm),
            over(records[arm], "recall"),
            over(records[arm], "held_out_loss"),
            str(len(records[arm])),
            paper,
        ]
        for arm, paper in ablation.paper.items()
        if records[arm]
    ]
    if not rows:
        return []
    head = ["variant", "recall", "NLL", "seeds", ablation.paper_measure]
    return [f"## {ablation.title}", "", *table(head, rows), *([ablation.note, ""] if ablation.note else [])]


def searched(found: Found) -> list[str]:
    """What was tried for each arm, and what was chosen."""
    search, rows = found.experiment.search, []
    for arm in found.jobs.tuned_arms():
        trials = [found.now.done.get(job.name) for job in found.jobs.trials(arm)]
        given = found.experiment.arm[arm]
        for settings, record in zip(given.trials(), trials, strict=True):
            if record is None:
                continue
            chosen = found.now.chosen.get(arm) == settings
            cells = [
                shown(m, record.final[m]) if m in record.final else record.ended for m in ("recall", "held_out_loss")
            ]
            rows.append(
                [found.label(arm), told_settings(settings), *cells, chosen_as(settings, given.search) if chosen else ""]
            )
    if not rows:
        return []
    common = told_settings(found.experiment.set | search.set)
    return [
        "## Search",
        "",
        f"{search.trials} trials for every arm: {common}, seed {search.seed}. Chosen by {name_of(search.measure)}, the "
        f"{search.best}.",
        "",
        *table(["arm", "tried", "recall", "NLL", ""], rows),
    ]


def chosen_as(settings: Settings, grid: dict[str, list[Value]]) -> str:
    """Whether what was chosen has been tried from both sides."""
    edges = [key for key, values in grid.items() if len(values) > 1 and settings[key] in (values[0], values[-1])]
    return "**chosen**" + "".join(f", {name_of(key)} at the edge of what was tried" for key in edges)


def told_settings(settings: Settings) -> str:
    """As `learning rate 0.003, steps 1500`."""
    return ", ".join(f"{name_of(key)} {f'{v:g}' if isinstance(v, float) else v}" for key, v in settings.items())


def data(found: Found) -> list[str]:
    """The facts of each seed and count, and what scores without a model."""
    seen = {}
    for record in found.now.done.values():
        about = record.data
        seen[str(about["corpus_sha256"])] = [
            str(record.settings.get("data.source", "")),
            f"{about['facts']:,}",
            str(record.settings["train.seed"]),
            f"{about['tokens_per_epoch']:,}",
            f"{about['answer_bits']:.2f}",
            *(f"{100 * value:.2f}%" for value in record.baselines.values()),
            f"`{str(about['corpus_sha256'])[:16]}`",
        ]
    if not seen:
        return []
    names = max((record.baselines for record in found.now.done.values()), key=len)
    width = 5 + len(names) + 1
    rows = sorted((row[:-1] + [""] * (width - len(row)) + row[-1:] for row in seen.values()), key=lambda row: row[:3])
    head = ["source", "facts", "seed", "tokens of an epoch", "bits of an answer", *(n.replace("_", " ") for n in names)]
    return ["## Facts", "", "Scores that need no model, in percent of answers:", "", *table([*head, "SHA-256"], rows)]


def made(found: Found) -> list[str]:
    """Commands, machines and commits."""
    records = found.now.done.values()
    if not records:
        return []
    hours = sum(record.made["seconds"] for record in records) / 3600

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(record.made[key]) for record in records}))

    versions = ", ".join(
        sorted({f"{name} {number}" for record in records for name, number in record.made["versions"].items()})
    )
    return [
        "## Made",
        "",
        f"{len(records)} runs, {hours:.1f} hours of training; {all_of('cpu')}, {all_of('threads')} threads; "
        f"{versions}; commits {all_of('commit')}.",
        "",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    kept = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    used = [i for i in range(len(head)) if any(row[i] for row in kept)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells[i] for i in used) + " |"

    return [line(head), "|" + "---|" * len(used), *map(line, kept), ""]
