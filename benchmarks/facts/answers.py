"""What an experiment asks, answered: who has more than whom, and at how many times the FLOPs others are as good."""

import math
from statistics import fmean

from benchmarks.facts.experiment import Experiment, Question, Worth
from benchmarks.facts.found import Found, scores_of
from benchmarks.facts.records import Record
from benchmarks.facts.shown import interval, points, table
from benchmarks.facts.statistics import difference, estimate, reached_at

SAYS = {True: "yes", False: "no", None: "undecided"}
PAPER_SAYS = {"more": True, "less": False, "unclear": None}


class Answer:
    """A question with what was found over the seeds that both arms have: a difference, and whether it is one."""

    def __init__(
        self,
        question: Question,
        ours: list[Record],
        theirs: list[Record],
        scores: tuple[dict[int, float], dict[int, float]],
    ) -> None:
        self.question = question
        shared = sorted(scores[0].keys() & scores[1].keys())
        self.ours, self.theirs = (estimate([of_arm[seed] for seed in shared]) for of_arm in scores)
        self.more = difference(*scores)
        self.diverged = sum(record.ended != "done" for record in (*ours, *theirs))
        self.flops, self.forward = (
            fmean(getattr(record, cost) for record in ours) / fmean(getattr(record, cost) for record in theirs)
            for cost in ("flops_per_token", "forward_flops_per_token")
        )

    @classmethod
    def of(cls, found: Found, question: Question) -> "Answer | None":
        """None where the two arms have no seed in common."""
        ours, theirs = (found.by_arm(question.study)[arm] for arm in (question.arm, question.than))
        scores = scores_of(ours, question.measure), scores_of(theirs, question.measure)
        return cls(question, ours, theirs, scores) if scores[0].keys() & scores[1].keys() else None

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
    head = ["question", "answer", "difference, 95% interval", "seeds", "ours", "against", "FLOPs of ours in theirs"]
    rows = [
        [
            a.question.text,
            f"**{SAYS[a.verdict]}**",
            f"{points(a.more.mean)} [{points(a.more.low)}, {points(a.more.high)}]",
            str(a.more.count),
            interval(a.question.measure, a.ours),
            interval(a.question.measure, a.theirs),
            f"{a.flops:.2f} (forward alone {a.forward:.2f})",
            a.question.paper,
        ]
        for a in answers
    ]
    note = (
        "Differences are in percentage points, seed by seed: both arms of a seed train on the same facts in the same "
        "order. Intervals are Student's t over seeds, each by itself: of "
        f"{len(answers)} intervals of 95% about {0.05 * len(answers):.1f} miss. They do not hold what another search "
        "might have chosen."
    )
    return ["## Answers", "", *table([*head, "in the paper"], rows), note, ""]


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
