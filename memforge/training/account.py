"""What a run tells of itself: rows of metrics and speed, scores and samples, a summary and a picture."""

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

from memforge.cost import estimate
from memforge.nn.decoder import Decoder
from memforge.plan import Plan
from memforge.report.html import run_page
from memforge.storage import storage_errors
from memforge.training.checkpoint import checkpoints
from memforge.training.data import Corpus
from memforge.training.evaluate import corpus_scores, samples
from memforge.training.logs import Logs
from memforge.training.machine_use import MachineUse, peak_of
from memforge.training.ranks import Ranks
from memforge.training.run_directory import REPORT, SPEED, Summary, write_summary
from memforge.training.start import checked
from memforge.training.telemetry import Telemetry


class Reporter:
    """Who is told what a run does; this one keeps it to itself. The loop prints nothing."""

    def note(self, message: str) -> None: ...
    def start(self, plan: Plan, corpus: Corpus, step: int) -> None: ...
    def row(self, metrics: dict[str, Any], speed: dict[str, Any], total_steps: int) -> None: ...
    def sample(self, step: int, prompt: str, text: str) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...


Ending = Literal["running", "done", "budget", "interrupted", "non-finite"]


class Account:
    """Keeps the figures of a run between two rows and writes them down; all ranks keep them, the first writes.

    `losses` are those of the steps since the last row, `norm`, `rates` and `update_figures` of the last step.
    """

    def __init__(
        self,
        run_dir: Path,
        plan: Plan,
        corpus: Corpus,
        logs: Logs,
        telemetry: Telemetry,
        report: Reporter,
        ranks: Ranks,
    ) -> None:
        self.run_dir, self.plan, self.spec, self.corpus = run_dir, plan, checked(plan), corpus
        self.logs, self.telemetry, self.report, self.ranks = logs, telemetry, report, ranks
        self.cost = estimate(plan.model, seq_len=self.spec.seq_len).as_dict()
        on_gpu = str(telemetry.device).startswith("cuda")
        devices = ranks.size if on_gpu else ranks.machines
        self.use = MachineUse(plan, self.cost["flops_per_token"]["total"], peak_of(str(telemetry.device)), devices)
        self.skipped = 0
        self.losses: list[float] = []
        self.norm, self.rates, self.update_figures = math.nan, dict[str, float](), dict[str, float]()
        self.last: dict[str, Any] = {}
        self.training_seconds = 0.0
        self.begin(0)

    def begin(self, step: int) -> None:
        """Time runs from here on; `step` is the last that was made before."""
        self.started = self.logged = time.perf_counter()
        self.not_training, self.waiting, self.is_first_row = 0.0, 0.0, True
        self._logged_step = step

    def state(self) -> dict[str, Any]:
        """What is pending for the next row."""
        return {
            "losses": list(self.losses),
            "rates": dict(self.rates),
            "grad_norm": self.norm if math.isfinite(self.norm) else None,
            "update_figures": dict(self.update_figures),
            "skipped": self.skipped,
            "last": dict(self.last),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.losses, self.skipped, self.last = list(state["losses"]), state["skipped"], dict(state["last"])
        self.norm = math.nan if state["grad_norm"] is None else state["grad_norm"]
        self.rates, self.update_figures = dict(state["rates"]), dict(state["update_figures"])
        self.training_seconds = _seconds_so_far(self.run_dir)

    def tokens(self, step: int) -> int:
        """Those of all steps so far."""
        return step * self.spec.batch_size * self.spec.seq_len

    def is_row_due(self, step: int) -> bool:
        return step in (1, self.spec.steps) or step % self.spec.log_every == 0 or self.is_score_due(step)

    def is_score_due(self, step: int) -> bool:
        every = self.plan.run.eval.every_steps
        return every is not None and step % every == 0

    def score(self, model: Decoder, step: int, *, keep: bool = True) -> dict[str, float]:
        """Scores on held-out data, and samples of text, logged if they are to be kept."""
        start = time.perf_counter()
        scores = corpus_scores(model, self.corpus, self.plan, self.ranks)
        for prompt, text in samples(model, self.corpus, self.plan, self.ranks):
            if keep:
                self.logs.sample(step, prompt, text)
            self.report.sample(step, prompt, text)
        self.ranks.rest(model)
        self.not_training += time.perf_counter() - start
        return scores

    def row(self, step: int, scores: dict[str, float]) -> None:
        """A row of metrics for the steps since the one before."""
        self.last = {"step": step, "tokens": self.tokens(step)}
        if self.losses:
            self.last |= {"loss": sum(self.losses) / len(self.losses)}
        if math.isfinite(self.norm):
            self.last |= {"grad_norm": self.norm}
        names = {"dense": "learning_rate", "values": "value_learning_rate"}
        self.last |= {names[group]: rate for group, rate in self.rates.items()}
        self.last |= {"skipped": self.skipped} if self.skipped else {}
        figures = scores | self.telemetry.figures() | self.update_figures
        self.last |= {name: value for name, value in figures.items() if math.isfinite(value)}
        if strange := [name for name, value in figures.items() if not math.isfinite(value)]:
            self.report.note(f"warning: step {step}: not finite and not logged: {', '.join(strange)}")
        speed = self.speed(step)
        self.logs.row(self.last, speed)
        self.losses, self.update_figures = [], {}
        self.logged, self.not_training, self.waiting = time.perf_counter(), 0.0, 0.0
        self.report.row(self.last, speed, self.spec.steps)

    def speed(self, step: int) -> dict[str, Any]:
        """How fast the steps since the last row were, if this process made any; scoring and saving are not training."""
        now = time.perf_counter()
        seconds = max(now - self.logged - self.not_training, 1e-9)
        steps = step - self._logged_step
        if not steps:
            return {}
        self._logged_step = step
        self.training_seconds += seconds
        row = {
            "step": step,
            "seconds": round(now - self.started, 3),
            "training_seconds": round(self.training_seconds, 3),
            "tokens_per_second": round(steps * self.spec.batch_size * self.spec.seq_len / seconds, 1),
            "waiting_for_data": round(self.waiting / seconds, 4),
            **self.use.shares(steps, seconds),
        }
        row |= {"started": True} if self.is_first_row else {}
        self.is_first_row = False
        return row

    def write_summary(self, step: int, ended: Ending) -> None:
        """Where there is a checkpoint to go with it."""
        self.ranks.first(lambda: self._write_summary(step, ended))

    def _write_summary(self, step: int, ended: Ending) -> None:
        if found := checkpoints(self.run_dir):
            write_summary(self.run_dir, self.summary(step, ended, found[-1]))

    def write_report(self) -> None:
        """A picture of a run that is safe on the disk: where it cannot be drawn, that is said and no more."""
        if not self.ranks.is_first:
            return
        try:
            with storage_errors(self.run_dir):
                (self.run_dir / REPORT).write_text(run_page(self.run_dir), encoding="utf-8")
        except Exception as error:  # noqa: BLE001  whatever is wrong with a picture
            self.report.note(f"warning: no {REPORT}: {error}")

    def summary(self, step: int, ended: Ending, checkpoint: Path) -> Summary:
        cost, data = self.cost, self.corpus.description
        epochs = self.corpus.epochs(step * self.spec.batch_size, self.spec.seq_len + 1)
        only = epochs.get("")
        exposures = None if only is None or "facts" not in data else only * data["sentences"] / data["facts"]  # type: ignore[operator]
        return Summary(
            name=self.plan.name,
            model_hash=self.plan.model.model_hash,
            steps=step,
            epochs=max(epochs.values()),
            exposures_per_fact=exposures,
            params=cost["params"]["total"],
            active_params=cost["params"]["active"],
            flops_per_token=cost["flops_per_token"]["total"],
            data=data,
            baselines=self.corpus.baselines,
            final=self.last,
            training_seconds=round(self.training_seconds, 3),
            checkpoint=checkpoint.name,
            ended=ended,
            caveats=list(self.plan.model.caveats()),
        )


def _seconds_so_far(run_dir: Path) -> float:
    """Seconds of training in earlier processes; 0 where that cannot be read, since nothing depends on it."""
    try:
        rows = (run_dir / SPEED).read_text(encoding="utf-8").splitlines()
        return float(json.loads(rows[-1])["training_seconds"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0.0
