"""What is kept of a finished training: one small JSON file, the same to the byte whenever it is made, `made` aside."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel, ConfigDict, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from benchmarks.facts.experiment import SCORES, SEED, Settings
from benchmarks.facts.jobs import Job
from memforge.cost import estimate
from memforge.errors import StorageError
from memforge.plan import Plan
from memforge.report.run import LAYER_MEASURES, Run
from memforge.storage import json_text, replace_file, storage_errors


@with_config(ConfigDict(strict=True, extra="forbid"))
class Made(TypedDict):
    """Where, when and how fast a record was made; all that may differ between two of the same job."""

    threads: int
    at_once: int
    load: float
    seconds: float
    commit: str
    date: str
    cpu: str
    python: str
    versions: dict[str, str]


class Record(BaseModel):
    """`curve` are the scores of a run by step; `made` is where, when and how fast it was made."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    name: str
    arm: str
    fingerprint: str
    model_hash: str
    settings: Settings
    ended: str
    params: int
    active_params: int
    slots: int
    flops_per_token: float
    forward_flops_per_token: float
    steps: int
    tokens: int
    data: dict[str, int | float | str]
    baselines: dict[str, float]
    exposures_per_fact: float | None
    final: dict[str, float]
    curve: list[dict[str, float]]
    usage: dict[str, dict[str, float]]
    made: Made

    @property
    def seed(self) -> int:
        return int(str(self.settings[SEED]))

    def differences(self, other: "Record") -> list[str]:
        """The fields, `made` aside, that the two do not have to the byte."""
        ours, theirs = (record.model_dump(exclude={"made"}) for record in (self, other))
        return [name for name in ours if json_text(ours[name]) != json_text(theirs[name])]

    def figure(self, name: str) -> float | None:
        """A score, a count of the ledger, a setting, or one of the quantities below, by name; None if it has none."""
        if name in self.final:
            return self.final[name]
        if name in DERIVED:
            return DERIVED[name](self)
        found = self.settings.get(name, getattr(self, name, None))
        return float(found) if isinstance(found, int | float) else None


def _recalled_bits(record: Record) -> float | None:
    """The facts that the model answers whole beyond those it was never trained on, at the bits that an answer has in
    the mean.
    """
    share = _net_recall(record)
    return None if share is None else share * float(record.data["answer_bits"]) * float(record.data["facts"])


def _net_recall(record: Record) -> float | None:
    """What of the facts the model answers, less what it answers of facts it was never trained on: by names and luck."""
    if "recall" not in record.final:
        return None
    return record.final["recall"] - record.final.get("recall.unseen", 0.0)


def _foretold_bits(record: Record) -> float | None:
    """Bits of those answers that the model knows beyond how frequent each is: what predicting them takes less, in nats
    per token over bits. Below 0: it is worse than those frequencies.
    """
    if "held_out_loss" not in record.final:
        return None
    unknown = record.final["held_out_loss"] * float(record.data["answer_tokens"]) / math.log(2)
    return (float(record.data["answer_bits"]) - unknown) * float(record.data["facts"])


def _bits_per(record: Record, of: float) -> float | None:
    bits = _recalled_bits(record)
    return None if bits is None else bits / of


def _usage(record: Record, measure: str) -> float | None:
    """The mean over the layers that read slots, each as in the last row of its log."""
    found = [layer[measure] for layer in record.usage.values()]
    return fmean(found) if found else None


def _effective_slots(record: Record) -> float | None:
    """As many slots read alike would have the entropy that reads have, in the mean over layers."""
    found = [math.exp(layer["entropy"]) for layer in record.usage.values()]
    return fmean(found) if found else None


DERIVED: dict[str, Callable[[Record], float | None]] = {
    "train_flops": lambda record: record.flops_per_token * record.tokens,
    "recalled_bits": _recalled_bits,
    "foretold_bits": _foretold_bits,
    "bits_per_param": lambda record: _bits_per(record, record.params),
    "bits_per_tflop": lambda record: _bits_per(record, record.flops_per_token * record.tokens / 1e12),
    "slots_used": lambda record: _usage(record, "slots_used"),
    "slots_ever": lambda record: _usage(record, "slots_ever"),
    "slots_top_1pct": lambda record: _usage(record, "top_1pct"),
    "slots_effective": _effective_slots,
    "slots_per_fact": lambda record: record.slots / float(record.data["facts"]) if record.slots else None,
    "net_recall": _net_recall,
}


def record_of(job: Job, run: Run, made: Made) -> Record:
    """The record of a run that has ended. Its fingerprint is that of what was trained: where a spec has changed since
    it was read for the job, the record is not of the job.
    """
    plan, summary = run.plan, run.summary
    assert summary is not None
    assert plan.run.train is not None
    train = plan.run.train
    metrics = run.metrics
    curve = [
        {"step": float(step)} | {name: metrics.columns[name][i] for name in SCORES if name in metrics.columns}
        for i, step in enumerate(metrics.steps)
        if "recall" in metrics.columns and metrics.columns["recall"][i] == metrics.columns["recall"][i]
    ]
    layers = sorted({name.rpartition(".")[0] for name in metrics.columns if name.endswith(".slots_used")})
    steps = int(metrics.steps[-1]) if metrics.steps else 0
    cost = estimate(plan.model, seq_len=train.seq_len, devices=())
    # What was scored before a run diverged is not what it came to.
    final = {} if summary.ended == "non-finite" else summary.final
    return Record(
        name=job.name,
        arm=job.arm,
        fingerprint=job.fingerprint_of(plan),
        model_hash=plan.model.model_hash,
        settings=dict(job.settings),
        ended=str(summary.ended),
        params=sum(row.numel for row in plan.model.params),
        active_params=sum(row.active for row in plan.model.params),
        slots=_slots(plan),
        flops_per_token=float(cost.exact_axes()["flops"]),
        forward_flops_per_token=cost.flops()[0] / cost.tokens,
        steps=steps,
        tokens=steps * train.batch_size * train.seq_len,
        data=summary.data,
        baselines=summary.baselines,
        exposures_per_fact=summary.exposures_per_fact,
        final={name: final[name] for name in (*SCORES, "loss") if name in final},
        curve=curve,
        usage={
            layer: {
                measure: value
                for measure in LAYER_MEASURES
                if (value := metrics.latest(f"{layer}.{measure}")) is not None
            }
            for layer in layers
        },
        made=made,
    )


def _slots(plan: Plan) -> int:
    """Rows of all value pools."""
    owners = {row.owner: row.shape[0] for row in plan.model.params if row.group == "values"}
    return sum(owners.values())


class Records:
    """The records in a directory, one file for each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.json"

    def read(self, job: Job) -> Record | None:
        """The record of a job, None if it has none. Raises StaleError for another job's, StorageError for a damaged
        one.
        """
        path = self.path(job.name)
        if not path.exists():
            return None
        record = read_record(path)
        if (record.name, record.arm, record.fingerprint) != (job.name, job.arm, job.fingerprint):
            raise StaleError(changed(record, job))
        return record

    def names(self) -> set[str]:
        """Of every record that there is."""
        return {path.stem for path in self.directory.glob("*.json")}

    def all(self) -> Iterator[Record]:
        """Every record that there is. Raises StorageError for a damaged one."""
        for path in sorted(self.directory.glob("*.json")):
            yield read_record(path)

    def write(self, record: Record) -> None:
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        replace_file(self.path(record.name), json_text(record.model_dump()))


class StaleError(Exception):
    """What has the name of a job was made of another arm, or by hand: says what differs."""


def changed(record: Record, job: Job) -> str:
    """What a record has that the job of its name has not."""
    for key in sorted(record.settings.keys() | job.settings.keys()):
        if (was := record.settings.get(key)) != (now := job.settings.get(key)):
            return f"{key} was {was} and is {now}"
    if (was := record.made.get("threads")) != job.threads:
        return f"threads were {was} and are {job.threads}"
    if record.model_hash != job.plan().model.model_hash:
        return "another model"
    return "other facts, or other settings in its spec"


def read_record(path: Path) -> Record:
    try:
        return Record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise StorageError(f"{path}: damaged at `{where}`; delete it, and it is made again") from None
    except ValueError:
        raise StorageError(f"{path}: damaged; delete it, and it is made again") from None
