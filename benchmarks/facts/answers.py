"""What an experiment asks, answered: who has more than whom, and at how many times the FLOPs others are as good."""

import math
from statistics import fmean

from benchmarks.facts.experiment import SHARES, Experiment, Question, Worth
from benchmarks.facts.found import Found, scores_of
from benchmarks.facts.records import Record
from benchmarks.facts.shown import change, interval, name_of, table
from benchmarks.facts.statistics import difference, estimate, reached_at

SAYS = {True: "yes", False: "no", None: "undecided"}
PAPER_SAYS = {"more": True, "less": False, "unclear": None}
# What an answer shows beside the measure it is judged by.
BESIDE = ("recall.rare", "held_out_loss")


class Answer:
    """A question with what was found over the seeds that both arms have: a difference, and whether it is one. `beside`
    are the differences by other measures.
    """

    def __init__(self, question: Question, ours: list[Record], theirs: list[Record]) -> None:
        self.question, measures = question, (question.measure, *BESIDE)
        scores = {measure: (scores_of(ours, measure), scores_of(theirs, measure)) for measure in measures}
        of_ours, of_theirs = scores[question.measure]
        shared = sorted(of_ours.keys() & of_theirs.keys())
        self.ours, self.theirs = (estimate([of_arm[seed] for seed in shared]) for of_arm in (of_ours, of_theirs))
        found = {measure: difference(*pair) for measure, pair in scores.items() if pair[0].keys() & pair[1].keys()}
        self.more, self.beside = found[question.measure], {name: found[name] for name in BESIDE if name in found}
        self.diverged = sum(record.ended != "done" for record in (*ours, *theirs))
        self.flops, self.forward = (
            fmean(getattr(record, cost) for record in ours) / fmean(getattr(record, cost) for record in theirs)
            for cost in ("flops_per_token", "forward_flops_per_token")
        )

    @classmethod
    def of(cls, found: Found, question: Question) -> "Answer | None":
        """None where the two arms have no seed in common."""
        ours, theirs = (found.by_arm(question.study)[arm] for arm in (question.arm, question.than))
        shared = scores_of(ours, question.measure).keys() & scores_of(theirs, question.measure).keys()
        return cls(question, ours, theirs) if shared else None

    @property
    def undecided(self) -> str:
        """Why there is no verdict, or nothing."""
        if self.diverged:
            return f"{self.diverged} of the runs diverged"
        if not self.more.known:
            return "one seed has no interval"
        return "the 95% interval of the difference holds zero" if self.more.low <= 0 <= self.more.high else ""

    @property
    def verdict(self) -> bool | None:
        return None if self.undecided else self.more.low > 0

    @property
    def differs(self) -> bool:
        said = PAPER_SAYS[self.question.paper_says]
        return said is not None and self.verdict is not None and said != self.verdict


def differences(experiment: Experiment, answers: list[Answer]) -> list[str]:
    """Where the order is not that of the paper; what was found out about it."""
    if not answers:
        return []
    differing = [answer for answer in answers if answer.differs]
    lines = ["## Where this differs from the paper", ""]
    lines += [
        f"- {a.question.text} {SAYS[a.verdict].capitalize()}, and in the paper {a.question.paper}." for a in differing
    ]
    if not differing:
        lines += ["Nowhere among the questions that the intervals decide.", ""]
    lines += [f"- Undecided, {a.undecided}: {a.question.text}" for a in answers if a.undecided]
    lines += [f"- **{title}** {text}" for title, text in experiment.findings.items()]
    return [*lines, ""]


def questions(answers: list[Answer]) -> list[str]:
    if not answers:
        return []
    head = ["question", "answer", "difference, 95% interval", *(f"by {name_of(name)}" for name in BESIDE), "seeds"]
    head += ["ours", "against", "FLOPs of ours in theirs"]
    rows = [
        [
            a.question.text,
            f"**{SAYS[a.verdict]}**",
            change(a.question.measure, a.more),
            *(change(name, a.beside[name]) if name in a.beside else "" for name in BESIDE),
            str(a.more.count),
            interval(a.question.measure, a.ours),
            interval(a.question.measure, a.theirs),
            f"{a.flops:.2f} (forward alone {a.forward:.2f})",
            a.question.paper,
        ]
        for a in answers
    ]
    note = (
        "Yes and no are said where the interval does not hold zero. Differences are ours less theirs, of recall in "
        "percentage points, seed by seed: both arms of a seed train on the same facts in the same order. Intervals are "
        f"Student's t over seeds, each by itself: of {len(answers)} intervals of 95% about {0.05 * len(answers):.1f} "
        "miss. They do not hold what another search might have chosen."
    )
    return ["## Answers", "", *table([*head, "in the paper"], rows), note, ""]


def times(found: Found, worth: Worth) -> list[str]:
    """How many times the FLOPs of an arm others need for what it has, by its measure and by NLL."""
    measures = dict.fromkeys((worth.measure, "held_out_loss"))
    told = [f"by {name_of(measure)} {text}" for measure in measures if (text := _times(found, worth, measure))]
    return [f"{worth.text} In FLOPs per token {', '.join(told)}. In the paper: {worth.paper}.", ""] if told else []


def _times(found: Found, worth: Worth, measure: str) -> str:
    """By seed, and over seeds where all are known; nothing where no seed has them all."""
    sign = 1 if measure in SHARES else -1
    ours = found.by_seed(worth.study, worth.arm, measure)
    costs = {record.arm: record.flops_per_token for _, _, record in found.study(worth.study)}
    theirs = {arm: found.by_seed(worth.study, arm, measure) for arm in worth.along}
    seeds = [seed for seed in ours if all(seed in of_arm for of_arm in theirs.values())]
    if not seeds:
        return ""
    ratios = []
    for seed in seeds:
        line = [(costs[arm], sign * of_arm[seed]) for arm, of_arm in theirs.items()]
        ratios.append(reached_at(line, sign * ours[seed]) / costs[worth.arm])
    least, most = (end(costs[arm] for arm in worth.along) / costs[worth.arm] for end in (min, max))
    each = ", ".join(
        f"more than {most:.1f}" if ratio == math.inf else f"less than {least:.1f}" if ratio == 0 else f"{ratio:.1f}"
        for ratio in ratios
    )
    if not all(0 < ratio < math.inf for ratio in ratios):
        return f"{each} times, by seed"
    over = estimate([math.log(ratio) for ratio in ratios])
    reach = f", 95% interval {math.exp(over.low):.1f} to {math.exp(over.high):.1f}" if over.known else ""
    return f"{math.exp(over.mean):.1f} times{reach} (seeds {each})"
