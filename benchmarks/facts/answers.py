"""What an experiment asks, answered: who has more than whom, and at how many times the FLOPs others are as good."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from benchmarks.facts.experiment import SHARES, Question, Worth
from benchmarks.facts.found import Found, over, scores_of
from benchmarks.facts.records import Record
from benchmarks.facts.shown import change, interval, name_of, table
from benchmarks.facts.statistics import difference, estimate, holm, reached_at

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
        found = {measure: difference(*pair) for measure, pair in scores.items()}
        self.more, self.beside = found[question.measure], {name: found[name] for name in BESIDE if found[name].count}
        self.sure = False  # that the verdict holds among all questions, which one alone does not know
        self.diverged = sum(record.ended != "done" for record in (*ours, *theirs))
        on = [{record.seed: record.made["cpu"] for record in of_arm} for of_arm in (ours, theirs)]
        self.one_processor = all(on[0][seed] == on[1][seed] for seed in shared)
        self.flops, self.forward = (
            fmean(getattr(record, cost) for record in ours) / fmean(getattr(record, cost) for record in theirs)
            for cost in ("flops_per_token", "forward_flops_per_token")
        )

    @classmethod
    def of(cls, found: Found, question: Question) -> "Answer | None":
        """None where the two arms have no seed in common yet."""
        ours, theirs = (found.by_arm(question.study)[arm] for arm in (question.arm, question.than))
        shared = {record.seed for record in ours} & {record.seed for record in theirs}
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


def answers_of(found: Found) -> list[Answer]:
    """The questions that have runs to answer them."""
    answers = [answer for question in found.experiment.question if (answer := Answer.of(found, question)) is not None]
    for answer, kept in zip(answers, holm([answer.more.p_value for answer in answers]), strict=True):
        answer.sure = kept and answer.verdict is not None
    return answers


def differences(found: Found, answers: list[Answer]) -> list[str]:
    """Where the order is not that of the paper; what was found out about it."""
    if not answers:
        return []
    differing = [answer for answer in answers if answer.differs]
    lines = ["## Where this differs from the paper", ""]
    for a in differing:
        alone = "" if a.sure else " by itself, undecided with all questions together"
        lines.append(f"- {a.question.text} {SAYS[a.verdict].capitalize()}{alone}. In the paper: {a.question.paper}.")
    if not differing:
        lines += ["Nowhere among the questions that the intervals decide.", ""]
    lines += [f"- **{title}** {found.told(text)}" for title, text in found.experiment.findings.items()]
    return [*lines, ""]


def undecided(answers: list[Answer]) -> list[str]:
    """The questions that have no answer, by what they want for one."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for answer in answers:
        if answer.undecided:
            by_reason[answer.undecided].append(answer.question.text)
    lines = [f"{reason[0].upper()}{reason[1:]}: {' '.join(texts)}" for reason, texts in by_reason.items()]
    return ["## What is not decided", "", *(line for text in lines for line in (text, ""))] if lines else []


def questions(answers: list[Answer]) -> list[str]:
    if not answers:
        return []
    head = ["question", "answer", "difference, 95% interval", *(f"by {name_of(name)}" for name in BESIDE), "seeds"]
    head += ["ours", "against", "FLOPs of ours in theirs"]
    rows = [
        [
            a.question.text,
            f"**{SAYS[a.verdict]}**" if a.sure else SAYS[a.verdict],
            change(a.question.measure, a.more),
            *(change(name, a.beside[name]) if name in a.beside else "" for name in BESIDE),
            str(a.more.count),
            interval(a.question.measure, a.ours),
            interval(a.question.measure, a.theirs),
            f"{a.flops:.2f} (forward {a.forward:.2f})",
            a.question.paper,
        ]
        for a in answers
    ]
    note = (
        "Yes and no are said where the 95% interval of that difference does not hold zero, in bold where this is so "
        f"of all {len(answers)} questions together (Holm's correction). Differences are ours less theirs, of recall "
        "in percentage points, by seed: both arms of a seed train on the same facts. Intervals are Student's t over "
        "seeds, and ignore what another search would have chosen."
    )
    if apart := [a.question.text for a in answers if not a.one_processor]:
        note += (
            f" The two of a seed were trained on different processors, which alone gives a training another "
            f"course: {' '.join(apart)}"
        )
    return ["## Answers", "", *table([*head, "in the paper"], rows), note, ""]


@dataclass(frozen=True)
class Price:
    """What an arm is worth: the FLOPs per token that a model on a line of others needs for what it has, in those of
    the arm, seed by seed: 0 where already the least of them is as good, and infinite where none is.
    """

    by_seed: Mapping[int, float]
    least: float  # what the first and the last model on the line cost
    most: float

    @classmethod
    def of(cls, groups: Mapping[str, list[Record]], along: list[str], arm: str, measure: str) -> "Price":
        """By the seeds that all have."""
        sign = 1 if measure in SHARES else -1
        cost = {name: groups[name][0].flops_per_token / groups[arm][0].flops_per_token for name in along}
        theirs = {name: scores_of(groups[name], measure) for name in along}
        found = {
            seed: reached_at([(cost[name], sign * theirs[name][seed]) for name in along], sign * ours)
            for seed, ours in scores_of(groups[arm], measure).items()
            if all(seed in scores for scores in theirs.values())
        }
        return cls(found, min(cost.values()), max(cost.values()))

    @property
    def seeds(self) -> str:
        return ", ".join(map(self._told, self.by_seed.values()))

    def _told(self, ratio: float) -> str:
        """A ratio, or on which side of the line it lies."""
        if ratio > self.most:
            return f"more than {self.most:.1f}"
        return f"{ratio:.1f}" if ratio >= self.least else f"less than {self.least:.1f}"

    def __str__(self) -> str:
        """The geometric mean over seeds with its interval; the least and the most where a seed has no number."""
        ratios = sorted(self.by_seed.values())
        if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
            return " to ".join(dict.fromkeys(map(self._told, ratios[:1] + ratios[-1:])))
        mean = estimate([math.log(ratio) for ratio in ratios])
        told = [self._told(math.exp(value)) for value in (mean.mean, mean.low, mean.high) if not math.isnan(value)]
        return f"{told[0]} [{told[1]}, {told[2]}]" if mean.known else told[0]


def prices(found: Found, worth: Worth, measure: str) -> dict[str, Price]:
    """Of every arm that is not on the line; none while the line has a gap."""
    groups = found.as_tuned
    if not all(groups.get(name) for name in worth.along):
        return {}
    return {arm: Price.of(groups, worth.along, arm, measure) for arm in groups if arm not in worth.along}


def priced(found: Found) -> list[str]:
    """What each arm is worth, by the measure of the experiment and by NLL."""
    worth = found.experiment.worth
    if worth is None:
        return []
    by = {measure: prices(found, worth, measure) for measure in dict.fromkeys((worth.measure, "held_out_loss"))}
    if not (arms := by[worth.measure]):
        return []
    head = ["arm", name_of(worth.measure), *(text for measure in by for text in (f"by {name_of(measure)}", "seeds"))]
    rows = [
        [
            found.label(arm),
            over(found.as_tuned[arm], worth.measure),
            *(text for of_arms in by.values() for text in (str(of_arms[arm]), of_arms[arm].seeds)),
        ]
        for arm, price in arms.items()
        if price.by_seed
    ]
    note = (
        f"FLOPs per token in those of the arm, forward and backward, on the line through "
        f"{', '.join(map(found.label, worth.along))} that is straight in the logarithm of FLOPs, seed by seed; "
        f"geometric means and 95% intervals over seeds. In the paper: {worth.paper}."
    )
    return [f"## What {worth.title} costs", "", *table(head, rows), note, ""]
