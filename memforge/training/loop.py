"""The training loop: a plan in, a run directory out."""

import math
import sys
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memforge.errors import DeviceError, InterruptedRunError, NonFiniteError, Stopped, StorageError
from memforge.machine import keep_memory
from memforge.plan import Plan
from memforge.training import checkpoint as files
from memforge.training import resume as resuming
from memforge.training.account import Account, Ending, Reporter
from memforge.training.checkpoint import Manifest, RunIdentity, Saver, Snapshot
from memforge.training.data import Corpus, Prefetch, load_corpus
from memforge.training.execution import compiled, compiler_error, deterministic, precision_of, why_not_compiled
from memforge.training.logs import Logs, NoLogs
from memforge.training.optimizer import Gradients, Stepper
from memforge.training.ranks import Ranks, ranks_of
from memforge.training.revival import Reviver
from memforge.training.schedule import rate_shares
from memforge.training.signals import SIGNALS, StopSignal
from memforge.training.start import Start, checked, identified, place, require_disk_for, require_memory_for, write_plan
from memforge.training.stored import own_parts, own_tensors
from memforge.training.telemetry import Telemetry, update_figures


@dataclass(frozen=True)
class Budget:
    """Where to stop before the plan's last step: a step, a number of tokens, minutes of this process."""

    max_steps: int | None = None
    max_tokens: int | None = None
    max_minutes: float | None = None

    def is_spent(self, step: int, tokens: int, seconds: float) -> bool:
        return (
            (self.max_steps is not None and step >= self.max_steps)
            or (self.max_tokens is not None and tokens >= self.max_tokens)
            or (self.max_minutes is not None and seconds >= 60 * self.max_minutes)
        )


def train(
    plan: Plan,
    run_dir: Path,
    *,
    data_root: Path = Path(),
    device: str | None = None,
    reporter: Reporter | None = None,
    overwrite: bool = False,
    resume: str | None = None,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Train the plan's model and return the summary that is also written to `run_dir/summary.json`.

    `run_dir` must not exist (with `overwrite` it may be an earlier run, which is deleted), unless `resume` says which
    of its checkpoints to go on from: "auto", "step=N" or a path. It appears with plan.json, tokenizer.json and its
    logs, then checkpoints, and in the end summary.json and report.html. A new run that ends before its first step
    leaves nothing behind.

    Where torchrun, or --nproc, has started several ranks, each calls this, and the first keeps the directory.

    Raises UsageError for a plan that cannot be trained or is not that of the run, StorageError, NonFiniteError before
    the update that a NaN or infinity would have spoilt, InterruptedRunError after a signal, with everything saved.
    """
    run = checked(plan)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError("no CUDA device is available; use --device cpu")
    keep_memory()
    with ranks_of(plan.run.parallel, device) as ranks:
        report = reporter if reporter is not None and ranks.is_first else Reporter()
        ranks.all_or_none(lambda: require_memory_for(plan, run, device, ranks))

        def here() -> AbstractContextManager[Start]:
            return place(run_dir, plan, report.note, overwrite=overwrite, resume=resume)

        # Verifying a checkpoint and tokenizing take as long as there are bytes.
        patient = ranks.patient()
        with patient.first_enters(here, Start.for_others) as start, StopSignal() as stop:
            run_dir = start.run_dir  # which the first has chosen
            corpus = patient.one_after_the_other(
                lambda: load_corpus(plan, data_root, start.tokenizer(), note=report.note)
            )
            identity = identified(plan, corpus, start, ranks)
            ranks.first(lambda: require_disk_for(plan, run_dir))
            with deterministic():
                trainer = _Trainer(corpus, identity, start, report, device, ranks)
                ranks.first(lambda: write_plan(run_dir, plan))  # when all that it asks for is there
                report.start(plan, corpus, trainer.step)
                summary = trainer.run(stop, budget or Budget())
    if trainer.asked.signal is not None:
        error = InterruptedRunError(f"interrupted; saved {run_dir / summary['checkpoint']}", trainer.asked.signal)
        error.of_all_ranks = True
        raise error
    return summary


@dataclass(frozen=True)
class Asked:
    """What ranks have agreed to do once the step in work is made."""

    signal: int | None = None
    spent: bool = False
    late: bool = False
    failed: bool = False


class _Trainer:
    def __init__(
        self, corpus: Corpus, identity: RunIdentity, start: Start, report: Reporter, device: str, ranks: Ranks
    ) -> None:
        plan, run_dir = identity.plan, start.run_dir
        run = checked(plan)
        self.plan, self.spec, self.corpus = plan, run, corpus
        self.run_dir, self.report, self.device, self.ranks = run_dir, report, device, ranks
        self.model = ranks.build(plan.model, seed=run.seed if start.checkpoint is None else None, device=device)
        precision = precision_of(run, device, report.note)
        self.stepper = Stepper(self.model, plan.model, run, precision=precision, ranks=ranks)
        self.telemetry = Telemetry.of(plan.model, torch.device(device), ranks)
        self.stepper.on_read = self.telemetry.read
        self.reviver = Reviver.of(self.stepper) if run.revive_every else None
        beside = ranks.beside() if run.async_checkpoints else ranks
        kept = {"keep": run.keep_checkpoints, "in_background": run.async_checkpoints}
        self.saver = Saver(run_dir, identity, ranks=beside, **kept)
        self.logs = ranks.first(lambda: Logs(run_dir, plan, identity.run_id, report.note), lambda _: NoLogs())
        self.account = Account(run_dir, plan, corpus, self.logs, self.telemetry, report, ranks)
        self.begun = start.begun
        self.asked = Asked()
        self.step, self.saved_step = 0, None
        # Before the logs are cut back: the newest checkpoint must never be one whose rows are gone.
        ranks.first(lambda: resuming.clear_the_way(run_dir, start.checkpoint, report.note))
        if start.checkpoint is not None and start.manifest is not None:
            self._load(start.checkpoint, start.manifest)
        else:
            ranks.first(lambda: self.logs.cut_back({}, report.note))
        self.stepper.forward = compiled(self.model, run, report.note, ranks=ranks.size)
        self.account.begin(self.step)
        self.saved_at = self.account.started

    def snapshot(self) -> Snapshot:
        """All that the rest of the run depends on, of which this rank has to write a part."""
        optimizer, numbers = self.stepper.state()
        given = {"model": dict(self.model.named_parameters()), "optimizer": optimizer}
        parts = {kind: own_parts(found, self.plan.model, self.ranks) for kind, found in given.items()}
        tensors = {kind: found for kind, (found, _) in parts.items()}
        counts = {"telemetry": self.telemetry.state()}
        if self.reviver is not None:
            counts["revival"] = self.reviver.state()
        tensors |= counts if self.ranks.is_first else {}
        state = {"optimizer": numbers, **self.account.state()}
        cuts = {kind: found for kind, (_, found) in parts.items()}
        return Snapshot(self.step, tensors, state, self.ranks.first(self.logs.marks), cuts)

    def _load(self, checkpoint: Path, manifest: Manifest) -> None:
        def read(kind: str) -> dict[str, torch.Tensor]:
            return own_tensors(files.stored(checkpoint, manifest, kind), self.plan.model, self.ranks)

        with torch.no_grad():
            for name, tensor in read("model").items():
                self.ranks.local(self.model.get_parameter(name)).copy_(tensor)
        state = manifest.state
        self.stepper.load_state(read("optimizer"), state["optimizer"])
        self.telemetry.load(read("telemetry"))
        if self.reviver is not None:
            self.reviver.load(read("revival"))
        self.step = self.saved_step = manifest.step
        self.account.load(state)
        self.ranks.first(lambda: self.logs.cut_back(manifest.logs, self.report.note))

    def save(self) -> None:
        """Save the state, and say in the summary how far the run is, for whoever looks at it before it ends."""
        start = time.perf_counter()
        self.saver.save(self.snapshot())
        self.saved_step = self.step
        self.begun()
        self.account.write_summary(self.step, "running")
        self.saved_at = time.perf_counter()
        self.account.not_training += self.saved_at - start

    def run(self, stop: StopSignal, budget: Budget) -> dict[str, Any]:
        """All steps, or those until a signal or the end of the budget; then the end of the run."""
        if 0 < self.step < self.spec.steps and self.account.last.get("step") != self.step:
            self.log_if_due()  # a signal came before the row of this step
        stream = self.corpus.stream(self.spec.seq_len + 1, self.spec.seed)
        given = {"first_step": self.step, "workers": self.spec.data_workers, "part": self._own_windows()}
        try:
            with Prefetch(stream, self.spec.batch_size, **given) as batches:
                while self.step < self.spec.steps and not self._ends(stop, budget):
                    self.advance(batches)
                    stop.arm()
                    self.begun()
                    # The last row is written with the last scores, and nothing is scored that a signal waits for.
                    if self.step < self.spec.steps and (self.account.is_row_due(self.step) or self.is_save_due()):
                        if self._ends(stop, Budget()):
                            break
                        self.log_if_due()
                        self.save_if_due()
            done = self.step == self.spec.steps
            return self.conclude("interrupted" if self.asked.signal is not None else "done" if done else "budget")
        except NonFiniteError:
            if self.step:
                self._conclude_non_finite()
            raise
        finally:
            self.logs.close()
            if not isinstance(sys.exception(), Stopped):
                _wait_quietly(self.saver)

    def _conclude_non_finite(self) -> None:
        """Keep the state before the bad step, if that is finite; the error is told either way."""
        try:
            self.save_all()
        except (NonFiniteError, StorageError) as error:
            self.report.note(f"warning: {error}")
        self.account.write_summary(self.step, "non-finite")
        self.account.write_report()

    def _ends(self, stop: StopSignal, budget: Budget) -> bool:
        """Whether the run stops here, by what all ranks know now: a signal to any of them, the clock of the first."""
        now = time.perf_counter()
        flags = (
            *stop.asked(),
            self.ranks.is_first
            and budget.is_spent(self.step, self.account.tokens(self.step), now - self.account.started),
            self.ranks.is_first and now - self.saved_at >= 60 * self.spec.checkpoint_minutes,
            self.saver.has_failed,
        )
        *signals, spent, late, failed = self.ranks.agree([int(flag) for flag in flags])
        came = next((number for number, asked in zip(SIGNALS, signals, strict=True) if asked), None)
        self.asked = Asked(came, bool(spent), bool(late), bool(failed))
        if failed:
            self.saver.wait()  # which raises it
        return came is not None or bool(spent)

    def _own_windows(self) -> range:
        """Those of each batch that this rank reads."""
        parts = [sum(passes) for passes in self.ranks.split(self.spec.batch_size, self.spec.micro_batch_size)]
        first = sum(parts[: self.ranks.rank])
        return range(first, first + parts[self.ranks.rank])

    def advance(self, batches: Prefetch) -> None:
        """One step: gradients and, if they are finite, the update."""
        waited = time.perf_counter()
        window = torch.from_numpy(batches.batch(self.step)).to(self.device, torch.int64)
        self.account.waiting += time.perf_counter() - waited
        found = self.gradients(window)
        loss, self.account.norm = float(found.loss), float(found.norm)
        if math.isfinite(loss) and math.isfinite(self.account.norm):
            self.update(found)
            self.account.losses.append(loss)
        else:
            self.leave_out(loss)
        self.step += 1
        if self.reviver is not None and self.spec.revive_every and self.step % self.spec.revive_every == 0:
            self.reviver.revive(self.step, self.spec.seed)

    def gradients(self, window: torch.Tensor) -> Gradients:
        """Those of a batch. The first compiles the model; where that fails, `auto` goes on without."""
        try:
            return self.stepper.backward(window, step=self.step)
        except compiler_error() as error:
            reason = why_not_compiled(error)
            if self.spec.compile == "on":
                raise DeviceError(f'train.compile = "on": {reason}') from None
            self.report.note(f"torch.compile does not work here, training is eager: {reason}")
            eager = self.spec.model_copy(update={"compile": "off"})
            self.stepper.forward = compiled(self.model, eager, self.report.note, ranks=self.ranks.size)
            self.stepper.skip()
            return self.stepper.backward(window, step=self.step)

    def update(self, found: Gradients) -> None:
        shares = rate_shares(self.step, self.spec)

        def make() -> None:
            self.stepper.update(found.norm, shares)

        if self.stepper.tables is not None and self.account.is_row_due(self.step + 1):
            tables = self.stepper.tables
            self.account.update_figures = update_figures(tables.tables, tables.touched(), make, self.ranks)
        else:
            make()
        self.account.rates = self.stepper.learning_rates()
        self.telemetry.observe(found.observed)

    def leave_out(self, loss: float) -> None:
        """A step without an update, as often as `max_skipped` allows."""
        account, what = self.account, f"step {self.step + 1}: the loss is {loss:g} and the gradient norm"
        what = f"{what} {account.norm:g}; the update was not made"
        if account.skipped >= self.spec.max_skipped:
            error = NonFiniteError(
                f"{what}. A lower train.learning_rate or a longer warm-up usually helps; "
                "train.max_skipped leaves out so many such steps"
            )
            error.of_all_ranks = True
            raise error
        account.skipped += 1
        self.report.note(f"warning: {what} ({account.skipped} of at most {self.spec.max_skipped} such steps)")
        self.stepper.skip()

    def log_if_due(self) -> None:
        if self.account.is_row_due(self.step):
            self.account.row(self.step, self.score() if self.account.is_score_due(self.step) else {})

    def score(self, *, keep: bool = True) -> dict[str, float]:
        return self.account.score(self.model, self.step, keep=keep)

    def is_save_due(self) -> bool:
        every = self.spec.checkpoint_every
        return self.asked.late or (every is not None and self.step % every == 0)

    def save_if_due(self) -> None:
        if self.is_save_due():
            self.save()

    def save_all(self) -> None:
        """Until the state is on the disk."""
        if self.step != self.saved_step:
            self.save()
        self.saver.wait()

    def conclude(self, ended: Ending) -> dict[str, Any]:
        """Save first; then, if the run came to its end, score. Where that fails, `eval` works on what is there.

        A run that may go on has no row between two that it would have had anyway: what is pending is in the checkpoint.
        """
        self.save_all()
        account = self.account
        try:
            if ended == "done" and account.last.get("step") != self.step:
                account.row(self.step, self.score())
            elif ended == "budget":
                account.last |= {"step": self.step, "tokens": account.tokens(self.step), **self.score(keep=False)}
        finally:
            account.write_summary(self.step, ended)
        account.write_report()
        newest = self.ranks.first(lambda: files.checkpoints(self.run_dir)[-1])
        record = account.summary(self.step, ended, newest).model_dump(exclude_none=True)
        self.report.finish(record)
        return record


def _wait_quietly(saver: Saver) -> None:
    """Nothing is being written when the run ends; what an abandoned save failed with is moot beside what ended it."""
    with suppress(Exception):
        saver.wait()
