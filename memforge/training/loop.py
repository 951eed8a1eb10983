"""The training loop: a plan in, a run directory out."""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from memforge.build import build_model
from memforge.cost import estimate
from memforge.cost.memory import step_memory
from memforge.errors import DeviceError, InterruptedRunError, NonFiniteError, StorageError, UsageError
from memforge.machine import keep_memory, require_memory
from memforge.nn.decoder import Decoder
from memforge.plan import Plan, TrainPlan
from memforge.storage import storage_errors
from memforge.training import checkpoint as files
from memforge.training.data import Corpus, Stream, load_corpus
from memforge.training.evaluate import corpus_scores
from memforge.training.optimizer import Stepper, rate_share
from memforge.training.signals import StopSignal

# Compiling the demo models takes about 25 s on two cores; a run this short never earns it back.
MIN_STEPS_TO_COMPILE = 100


class Reporter:
    """Who is told what a run does; this one keeps it to itself. The loop prints nothing."""

    def note(self, message: str) -> None: ...
    def start(self, plan: Plan, corpus: Corpus) -> None: ...
    def row(self, row: dict[str, Any], total_steps: int) -> None: ...
    def finish(self, summary: dict[str, Any]) -> None: ...


def train(
    plan: Plan,
    run_dir: Path,
    *,
    data_root: Path = Path(),
    device: str | None = None,
    reporter: Reporter | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train the plan's model and return the summary that is also written to `run_dir/summary.json`.

    `run_dir` must not exist (with `overwrite` it may be an earlier run, which is deleted). It appears with plan.json,
    tokenizer.json, metrics.jsonl and, at the end or at the first signal, a checkpoint. A run that ends before its first
    step leaves nothing behind.

    Raises UsageError for a plan that cannot be trained, StorageError, NonFiniteError before the update that a NaN or
    infinity would have spoilt, InterruptedRunError after a signal, with everything saved.
    """
    report = reporter or Reporter()
    run = _checked(plan)
    corpus = load_corpus(plan, data_root)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError("no CUDA device is available; use --device cpu")
    _require_memory(plan, run, device)
    keep_memory()
    with _new_run(run_dir, overwrite=overwrite) as started, StopSignal() as stop, _deterministic():
        with storage_errors(run_dir):
            (run_dir / files.PLAN).write_text(plan.to_json(), encoding="utf-8")
            (run_dir / files.TOKENIZER).write_text(corpus.tokenizer.to_str(), encoding="utf-8")
        report.start(plan, corpus)
        model = build_model(plan.model, seed=run.seed, device=device)
        model.checkpoint_layers = run.activation_checkpointing
        trainer = _Trainer(plan, run, corpus, model, run_dir, report, device)
        try:
            trainer.run(stop, started)
        except NonFiniteError:
            if trainer.step:
                trainer.conclude("non-finite")
            raise
        summary = trainer.conclude("done" if stop.number is None else "interrupted")
    if stop.number is not None:
        raise InterruptedRunError(f"interrupted; saved {run_dir / summary['checkpoint']}", stop.number)
    return summary


class _Trainer:
    def __init__(
        self,
        plan: Plan,
        run: TrainPlan,
        corpus: Corpus,
        model: Decoder,
        run_dir: Path,
        report: Reporter,
        device: str,
    ) -> None:
        self.plan, self.spec, self.corpus, self.model = plan, run, corpus, model
        self.run_dir, self.report, self.device = run_dir, report, device
        self.stepper = Stepper(model, plan.model, run)
        self.stream = Stream(corpus.units, window=run.seq_len + 1, seed=run.seed)
        self.stepper.forward = _compiled(model, run, report)
        self.step = 0
        self.losses: list[Tensor] = []
        self.norm = torch.tensor(float("nan"))
        self.started = self.logged = self.scored_from = time.perf_counter()
        self.training_seconds = 0.0
        self.last: dict[str, Any] = {}

    def run(self, stop: StopSignal, started: Callable[[], None]) -> None:
        """All steps, or those until a signal."""
        every = self.plan.run.eval.every_steps
        while self.step < self.spec.steps and stop.number is None:
            loss, self.norm = self.one_step() if self.step else self.first_step()
            self.losses.append(loss)
            self.step += 1
            if self.step == 1:
                started()
                stop.arm()
            if self.step == self.spec.steps:
                return  # the last row is written with the last scores
            scored = every is not None and self.step % every == 0
            if scored or self.step % self.spec.log_every == 0 or self.step == 1:
                self.log(self.score() if scored else {})

    def score(self) -> dict[str, float]:
        self.scored_from = time.perf_counter()
        return corpus_scores(self.model, self.corpus, self.plan)

    def first_step(self) -> tuple[Tensor, Tensor]:
        """The first update. Compilation happens here; where it fails, `auto` goes on without it."""
        try:
            return self.one_step()
        except TorchDynamoException as error:
            reason = str(error).split("\n")[0]
            if self.spec.compile == "on":
                raise DeviceError(f'train.compile = "on": {reason}') from None
            self.report.note(f"torch.compile does not work here, training is eager: {reason}")
            self.stepper.forward = self.model.forward_taped
            return self.one_step()

    def one_step(self) -> tuple[Tensor, Tensor]:
        """One update; the cross-entropy before it and the gradient's norm before clipping."""
        b = self.spec.batch_size
        window = torch.from_numpy(self.stream.windows(self.step * b, b)).to(self.device, torch.int64)
        loss, norm = self.stepper.backward(window)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise NonFiniteError(
                f"step {self.step + 1}: the loss is {float(loss):g} and the gradient norm {float(norm):g}; "
                "the update was not made. A lower train.learning_rate or a longer warm-up usually helps"
            )
        self.stepper.update(norm, rate_share(self.step, self.spec))
        return loss, norm

    def log(self, scores: dict[str, float]) -> None:
        """A row of metrics for the steps since the one before."""
        tokens = self.spec.batch_size * self.spec.seq_len
        seconds = self.scored_from - self.logged if scores else time.perf_counter() - self.logged
        self.training_seconds += seconds
        self.last = {
            "step": self.step,
            "tokens": self.step * tokens,
            "loss": float(torch.stack(self.losses).mean()),
            "grad_norm": float(self.norm),
            "learning_rate": self.stepper.learning_rate,
            **scores,
            "seconds": round(time.perf_counter() - self.started, 3),
            "tokens_per_second": round(len(self.losses) * tokens / seconds, 1),
        }
        with storage_errors(self.run_dir), (self.run_dir / files.METRICS).open("a") as file:
            file.write(json.dumps(self.last) + "\n")
        self.losses, self.logged = [], time.perf_counter()
        self.report.row(self.last, self.spec.steps)

    def conclude(self, ended: Literal["done", "interrupted", "non-finite"]) -> dict[str, Any]:
        """Save first; then, if the run came to its end, score. Where that fails, `eval` works on what is there."""
        checkpoint = files.save_checkpoint(self.run_dir, self.step, self.plan, self.model)
        scores: dict[str, float] = {}
        try:
            if ended == "done":
                scores = self.score()
        finally:
            if self.losses:
                self.log(scores)
            summary = self.summary(checkpoint.name, ended)
            files.write_summary(self.run_dir, summary)
        self.report.finish(summary)
        return summary

    def summary(self, checkpoint: str, ended: str) -> dict[str, Any]:
        cost, data = estimate(self.plan.model, seq_len=self.spec.seq_len).as_dict(), self.corpus.description
        epochs = self.step * self.spec.batch_size * (self.spec.seq_len + 1) / float(data["tokens_per_epoch"])
        exposures = epochs * float(data["sentences"]) / float(data["facts"]) if "facts" in data else None
        return {
            "name": self.plan.name,
            "model_hash": self.plan.model.model_hash,
            "steps": self.step,
            "epochs": epochs,
            "exposures_per_fact": exposures,
            "params": cost["params"]["total"],
            "active_params": cost["params"]["active"],
            "flops_per_token": cost["flops_per_token"]["total"],
            "data": data,
            "baselines": self.corpus.baselines,
            "final": self.last,
            "training_seconds": round(self.training_seconds, 3),
            "checkpoint": checkpoint,
            "ended": ended,
            "caveats": list(self.plan.model.caveats()),
        }


def _checked(plan: Plan) -> TrainPlan:
    if plan.run.train is None or plan.run.data is None:
        missing = [f"[{t}]" for t, given in (("data", plan.run.data), ("train", plan.run.train)) if given is None]
        raise UsageError(f"{plan.name}: training needs {' and '.join(missing)} in the spec")
    return plan.run.train


def _require_memory(plan: Plan, run: TrainPlan, device: str) -> None:
    """Raises DeviceError when the peak of a step, as the ledger has it, exceeds the device's memory."""
    memory = step_memory(plan.model, run.batch_size, run.seq_len, dense_values=plan.run.dense_values)
    state = memory.weights + memory.gradients + memory.optimizer
    require_memory(
        memory.peak_checkpointed if run.activation_checkpointing else memory.peak,
        f"{plan.name}: a training step ({state / 1e9:,.1f} GB of weights, gradients and optimizer state)",
        available=torch.cuda.mem_get_info(device)[1] if device.startswith("cuda") else None,
        device=device,
    )


@contextmanager
def _deterministic() -> Iterator[None]:
    """One seed, one result, bit for bit on a CPU, where Inductor otherwise adds embedding gradients by atomics.

    On a GPU it is asked for as well, as far as torch's ops can (a warning names those that cannot); not measured there.
    """
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def _new_run(run_dir: Path, *, overwrite: bool) -> Iterator[Callable[[], None]]:
    """Make the run directory. Until the block calls the yielded function, nothing is lost: when it fails before, all is
    put back as it was, an overwritten run included.
    """
    aside = None
    if overwrite and files.is_run(run_dir):
        aside = run_dir.with_name(f".{run_dir.name}-{secrets.token_hex(4)}.old")
        with storage_errors(run_dir):
            run_dir.rename(aside)
    if run_dir.is_symlink() or (run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir()))):
        why = "is not only a run of memforge" if overwrite else "exists already (--overwrite deletes an earlier run)"
        raise StorageError(f"{run_dir}: {why}; choose another --out")
    existed, kept = run_dir.exists(), False
    with storage_errors(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)

    def started() -> None:
        nonlocal kept
        kept = True
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)

    try:
        yield started
    finally:
        if not kept:
            shutil.rmtree(run_dir, ignore_errors=True)
            if aside is not None:
                aside.rename(run_dir)
            elif existed:
                run_dir.mkdir()


def _compiled(model: Decoder, run: TrainPlan, report: Reporter) -> Callable[..., Any]:
    """The model as it is trained: compiled where asked for and possible, eager otherwise, and never in silence."""
    model.train()
    if run.compile == "off" or (run.compile == "auto" and run.steps < MIN_STEPS_TO_COMPILE):
        return model.forward_taped
    # The compiler that Inductor looks for on a CPU.
    if run.compile == "auto" and not shutil.which(os.environ.get("CXX", "g++")):
        report.note("no C++ compiler: training is eager, without torch.compile")
        return model.forward_taped
    report.note("compiling with torch.compile; the first step takes a while")
    return torch.compile(model.forward_taped, fullgraph=True, dynamic=False)
