"""What an experiment is: arms, the search that tunes them, studies that train them, and what the report asks.

An arm is a spec and what is set in it. A study trains some arms, over seeds and over values of a key. Studies that ask
for the same training share it.
"""

import itertools
import re
from collections.abc import Collection, Container, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import tomli
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memforge.errors import UsageError

Value: TypeAlias = bool | int | float | str | list[int]
Settings: TypeAlias = dict[str, Value]
# Of an experiment, an arm, a study and a figure: they become names of files, in which a dot parts an arm from the rest.
Name: TypeAlias = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
# In a finding: a measure of the runs of a name, over their seeds.
FIGURE = re.compile(r"\{(?P<run>[^{} ]+) (?P<measure>[^{} ]+)\}")
# What an experiment that extends another has of its own: the name of its records, what is asked and what was found.
OWN = ("name", "about", "findings", "notes")
SEED = "train.seed"
# What a record knows of a run: shares, other scores, and what follows from them and the ledger.
SHARES = ("recall", "recall.rare", "recall.unseen")
SCORES = (*SHARES, "held_out_loss", "held_out_loss.rare", "held_out_loss.unseen")
MEASURES = (
    *SCORES, "net_recall", "recalled_bits", "foretold_bits", "bits_per_param", "bits_per_tflop", "slots_used",
    "slots_ever", "slots_top_1pct", "slots_effective", "slots_per_fact", "slots", "params", "active_params",
    "flops_per_token", "tokens", "train_flops", "exposures_per_fact",
)  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Arm(Section):
    """A spec beside the experiment's file, and how it came by its hyper-parameters.

    `times` is what its FLOPs per token are of the baseline's. `search` is what to try: settings, or values key by key
    in all combinations; `tuned_as` takes what was chosen for another arm. `label` is what reports call it, `note` what
    they say of it.
    """

    spec: str
    label: str
    note: str = ""
    times: Annotated[float, Field(gt=0)] = 1.0
    set: Settings = {}
    search: dict[str, list[Value]] | list[Settings] = {}
    tuned_as: str | None = None

    @model_validator(mode="after")
    def _tuned(self) -> "Arm":
        if bool(self.search) == (self.tuned_as is not None):
            raise ValueError("an arm has either `search` or `tuned_as`")
        if any(trial.keys() != self.trials()[0].keys() for trial in self.trials()):
            raise ValueError("`search` sets other keys in one trial than in the next")
        return self

    def trials(self) -> list[Settings]:
        if isinstance(self.search, list):
            return self.search
        return [dict(zip(self.search, values, strict=True)) for values in itertools.product(*self.search.values())]

    @property
    def searched(self) -> frozenset[str]:
        """The keys that the search decides."""
        return frozenset(self.trials()[0]) if self.search else frozenset()


class Search(Section):
    """Every tuned arm gets `trials` trials with these settings; the best by `measure` is what studies use."""

    trials: Annotated[int, Field(ge=1)]
    seed: int
    measure: str
    best: Literal["most", "least"]
    set: Settings = {}


class Study(Section):
    """Arms trained with every seed, at each value of the keys in `vary`, also of those that the search has chosen."""

    title: str = ""
    arms: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[int], Field(min_length=1)]
    set: Settings = {}
    vary: dict[str, list[Value]] = {}

    def points(self) -> list[Settings]:
        return [dict(zip(self.vary, values, strict=True)) for values in itertools.product(*self.vary.values())]


class Question(Section):
    """Whether one arm has more of a measure than another in a study, seed by seed."""

    text: str
    study: str
    arm: str
    than: str
    measure: str = "recall"
    paper: str
    paper_says: Literal["more", "less", "unclear"]


class Worth(Section):
    """How many FLOPs a model on the line of the arms `along` needs for what each other arm has, in those of the arm.
    `title` is what such a model is called.
    """

    title: str
    along: Annotated[list[str], Field(min_length=2)]
    measure: str = "recall"
    paper: str


class Figure(Section):
    """A picture of a study: a measure over what the ledger or the settings say (`x`), or over the course of a run.

    `join` says which points make a line: those of an arm, all of the study, or the rows of a run. Of arms that `lines`
    puts under one title, all points make one; `beside` are further lines, of arms as they were tuned, from any study. A
    `law` is fitted to the points of the study, at each x the mean of a seed, from what the arm `floor` has, or 0.
    """

    title: str
    study: str
    x: str
    y: str
    join: Literal["arms", "study", "runs"] = "arms"
    lines: dict[str, list[str]] = {}
    beside: dict[str, list[str]] = {}
    log_x: bool = True
    log_y: bool = False
    law: Literal["none", "logistic"] = "none"
    floor: str | None = None
    note: str = ""


class Ablation(Section):
    """A table of a study, with what the paper found beside it."""

    title: str
    study: str
    paper_measure: str
    paper: dict[str, str]
    note: str = ""


class Experiment(Section):
    """A whole file. `about` says what is asked, in a paragraph of the report; `corpora` are the SHA-256 of the sources
    of facts that it was made with; the first study is the main one. `findings` are what was found about differences
    from the paper, with figures as `{RUN MEASURE}`, where RUN is the name of a record without its seed; `notes` how all
    came about.
    """

    name: Name
    title: str
    about: str = ""
    baseline: str
    tolerance: Annotated[float, Field(gt=0)] = 0.02
    threads: Annotated[int, Field(ge=1)] = 2
    corpora: dict[str, str] = {}
    set: Settings = {}
    arm: dict[Name, Arm]
    search: Search
    study: dict[Name, Study]
    question: list[Question] = []
    worth: Worth | None = None
    figure: dict[Name, Figure] = {}
    ablation: dict[str, Ablation] = {}
    findings: dict[str, str] = {}
    notes: dict[str, str] = {}

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        """Every name leads somewhere, and every tuned arm has the same number of trials."""
        self._known("baseline", [self.baseline], self.arm)
        for name, arm in self.arm.items():
            if arm.tuned_as is not None:
                searched = [other for other, given in self.arm.items() if given.search]
                self._known(f"arm.{name}.tuned_as", [arm.tuned_as], searched)
            elif (found := len(arm.trials())) != self.search.trials:
                raise ValueError(f"arm.{name}.search: {found} trials, and search.trials = {self.search.trials} for all")
        for name, study in self.study.items():
            self._known(f"study.{name}.arms", study.arms, self.arm)
            if len(set(study.seeds)) < len(study.seeds):
                raise ValueError(f"study.{name}.seeds: one is there twice")
            for trained in study.arms:
                tuned = self.arm[self.arm[trained].tuned_as or trained].searched
                own = self.arm[trained].set
                self._free(f"study.{name}.set", study.set, {*tuned, *own})
                self._free(f"study.{name}.vary", study.vary, {*study.set, *own})
        for name, arm in self.arm.items():
            self._free(f"arm.{name}.set", arm.set, self.arm[arm.tuned_as or name].searched)
        self._known("search.measure", [self.search.measure], MEASURES)
        for name, figure in self.figure.items():
            self._known(f"figure.{name}.study", [figure.study], self.study)
            self._known(f"figure.{name}.x", [figure.x], {*MEASURES, *self.study[figure.study].vary})
            self._known(f"figure.{name}.y", [figure.y], SCORES if figure.join == "runs" else MEASURES)
            joined = [arm for arms in figure.lines.values() for arm in arms]
            self._known(f"figure.{name}.lines", joined, self.study[figure.study].arms)
            self._known(f"figure.{name}.beside", [*itertools.chain.from_iterable(figure.beside.values())], self.arm)
            self._known(f"figure.{name}.floor", [figure.floor] if figure.floor else [], self.arm)
            if figure.law != "none" and not figure.log_x:
                raise ValueError(f"figure.{name}.law: laws are of the logarithm of x, and log_x = false")
            if any(isinstance(value, str | list) for value in self.study[figure.study].vary.get(figure.x, [])):
                raise ValueError(f"figure.{name}.x: {figure.x} has values that are no numbers")
        for name, ablation in self.ablation.items():
            self._known(f"ablation.{name}.study", [ablation.study], self.study)
            self._known(f"ablation.{name}.paper", list(ablation.paper), self.study[ablation.study].arms)
            self._of_one_point(f"ablation.{name}", ablation.study)
        for question in self.question:
            self._known("question.study", [question.study], self.study)
            self._known("question", [question.arm, question.than], self.study[question.study].arms)
            self._known("question.measure", [question.measure], SHARES)
            self._of_one_point("question", question.study)
        for title, text in self.findings.items():
            for match in FIGURE.finditer(text):
                self._known(f"findings.{title}", [match["measure"]], MEASURES)
        if not self.study:
            raise ValueError("study: there is none")
        self._of_one_point("the main study", main := next(iter(self.study)))
        if self.worth is not None:
            self._known("worth.along", self.worth.along, self.study[main].arms)
            self._known("worth.measure", [self.worth.measure], SHARES)
        return self

    def _of_one_point(self, key: str, study: str) -> None:
        """Where arms are compared, a seed has one run of each."""
        if self.study[study].vary:
            raise ValueError(f"{key}: {study} varies a key, and arms are compared at one point")

    @staticmethod
    def _free(key: str, settings: Mapping[str, Any], taken: Container[str]) -> None:
        """What is set in two places would be that of the last, in silence."""
        for name in settings:
            if name == SEED or name in taken:
                raise ValueError(f"{key}: {name} is set by the arm, its search, the study or the seed")

    @staticmethod
    def _known(key: str, names: list[str], known: Collection[str]) -> None:
        for name in names:
            if name not in known:
                raise ValueError(f"{key}: {name} is none of {', '.join(known)}")


def read_experiment(path: Path) -> Experiment:
    """The experiment in a file, laid over the one beside it that it `extends`, but for the name and findings of that.

    Raises UsageError for a file that is absent or no experiment.
    """
    try:
        return Experiment.model_validate(_tables(path))
    except ValidationError as error:
        # A key that is misspelt is missing too, and it is the misspelt one that is to be found in the file.
        found = error.errors()
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{path}: {where}{': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None


def _tables(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Of a file and of those that it extends; `above` are the files that extend it."""
    if path.resolve() in above:
        raise UsageError(f"{path}: it extends itself")
    try:
        tables = tomli.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    if (base := tables.pop("extends", None)) is None:
        return tables
    below = _tables(path.parent / str(base), (*above, path.resolve()))
    return _over({key: value for key, value in below.items() if key not in OWN}, tables)


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Tables merge key by key; all else is replaced."""
    both = {key for key in base.keys() & top.keys() if isinstance(base[key], dict) and isinstance(top[key], dict)}
    return base | top | {key: _over(base[key], top[key]) for key in both}
