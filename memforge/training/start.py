"""Where a run starts: its directory, made or found, and whether the machine has room for it."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from memforge.cost.memory import step_memory
from memforge.cost.rank_memory import RankStep
from memforge.errors import StorageError, UsageError
from memforge.machine import require_memory
from memforge.plan import Plan, TrainPlan
from memforge.report.cost import si
from memforge.storage import file_sha256, replace_file, storage_errors
from memforge.training import resume as resuming
from memforge.training.checkpoint import OVERHEAD_BYTES, Manifest, RunIdentity, checkpoints
from memforge.training.data import Corpus
from memforge.training.ranks import ALONE, Ranks
from memforge.training.run_directory import (
    PLAN,
    TOKENIZER,
    locked,
    new_run,
    read_tokenizer,
    require_run,
    run_id,
    write_identity,
)
from memforge.training.telemetry import usage_bytes


@dataclass(frozen=True)
class Start:
    """Where a run starts: anew, or from a checkpoint. `begun` is called when its first step was made."""

    run_dir: Path
    begun: Callable[[], None]
    checkpoint: Path | None = None
    manifest: Manifest | None = None

    def for_others(self) -> "Start":
        """The same for ranks that are not the first, which keeps the directory."""
        return replace(self, begun=nothing)

    def tokenizer(self) -> Tokenizer | None:
        """The run's own, which is not trained again."""
        return None if self.checkpoint is None else read_tokenizer(self.run_dir)


def nothing() -> None: ...


@contextmanager
def place(
    run_dir: Path, plan: Plan, note: Callable[[str], None], *, overwrite: bool, resume: str | None
) -> Iterator[Start]:
    """The run directory, made or found, and held against other processes."""
    if resume is None:
        with new_run(run_dir, overwrite=overwrite) as begun:
            yield Start(run_dir, begun)
        return
    require_run(run_dir)
    with locked(run_dir):
        found = resuming.chosen(run_dir, resume, note)
        if found is None:
            note(f"{run_dir} has no checkpoint yet: it starts over")
            yield Start(run_dir, nothing)
            return
        manifest = found[1]
        if manifest.step > checked(plan).steps:
            raise UsageError(f"train.steps = {checked(plan).steps}: the run is at step {manifest.step} already")
        if manifest.torch != torch.__version__:
            note(f"warning: saved with torch {manifest.torch}, this is {torch.__version__}: bits may differ from here")
        for change in resuming.require_same_plan(run_dir, plan):
            note(f"changed since the run was last started: {change}")
        yield Start(run_dir, nothing, *found)


def identified(plan: Plan, corpus: Corpus, start: Start, ranks: Ranks) -> RunIdentity:
    """What the run's checkpoints have in common, written down for a new one, compared for one that goes on.

    Raises StorageError when the data is not what the run was trained on, or not the same on all ranks.
    """
    of_all = ranks.gather(str(corpus.description["corpus_sha256"]))
    return ranks.first(lambda: _identity(plan, corpus, start, set(of_all)))


def _identity(plan: Plan, corpus: Corpus, start: Start, of_all: set[str]) -> RunIdentity:
    run_dir, corpus_sha256 = start.run_dir, str(corpus.description["corpus_sha256"])
    if start.manifest is not None and start.manifest.corpus_sha256 != corpus_sha256:
        raise StorageError(f"{run_dir}: the data is not what this run was trained on (its hash differs)")
    if len(of_all) > 1:
        raise StorageError(f"{run_dir}: ranks have read different data (its hashes differ)")
    if start.manifest is None:
        replace_file(run_dir / TOKENIZER, corpus.tokenizer.to_str())
    name = write_identity(run_dir) if start.manifest is None else run_id(run_dir)
    with storage_errors(run_dir):
        return RunIdentity(name, plan, file_sha256(run_dir / TOKENIZER), corpus_sha256)


def write_plan(run_dir: Path, plan: Plan) -> None:
    """The plan of the run from now on, if that is another one."""
    path, text = run_dir / PLAN, plan.to_json()
    with storage_errors(path):
        is_written = path.exists() and path.read_text(encoding="utf-8") == text
    if not is_written:
        replace_file(path, text)


def checked(plan: Plan) -> TrainPlan:
    if plan.run.train is None or plan.run.data is None:
        missing = [f"[{t}]" for t, given in (("data", plan.run.data), ("train", plan.run.train)) if given is None]
        raise UsageError(f"{plan.name}: training needs {' and '.join(missing)} in the spec")
    return plan.run.train


def require_memory_for(plan: Plan, run: TrainPlan, device: str, ranks: Ranks = ALONE) -> None:
    """Raises DeviceError when the peak of a step, as the ledger has it, and the usage of slots exceed the memory."""
    memory = step_memory(plan.model, run.micro_batch_size, run.seq_len, update=plan.run.pool_update)
    state = memory.weights + memory.gradients + memory.optimizer
    usage = usage_bytes(plan.model)
    copy = memory.checkpoint + usage if run.async_checkpoints and device == "cpu" else 0
    peak = memory.peak_checkpointed if run.activation_checkpointing else memory.peak
    if ranks.size > 1:
        most = max(map(max, ranks.split(run.batch_size, run.micro_batch_size)))
        pools, update = plan.run.parallel.pools, plan.run.pool_update
        step = RankStep(plan.model, ranks.mesh, most, run.seq_len, pools=pools, update=update).memory()
        peak = step.peak_checkpointed if run.activation_checkpointing else step.peak
    # Ranks on CPUs share the memory of their machine.
    ranks_here = ranks.size // ranks.machines if device == "cpu" else 1
    require_memory(
        copy + ranks_here * (peak + usage),
        f"{plan.name}: a training step ({state / 1e9:,.1f} GB of weights, gradients and optimizer state)",
        available=torch.cuda.mem_get_info(device)[1] if device.startswith("cuda") else None,
        device=device,
    )


def require_disk_for(plan: Plan, run_dir: Path) -> None:
    """Raises StorageError when the checkpoints that are kept, and the one being written, would not find room."""
    run = plan.run.train
    assert run is not None
    size = step_memory(plan.model, 1, 1).checkpoint + usage_bytes(plan.model) + OVERHEAD_BYTES
    have = len(checkpoints(run_dir))
    needed = max(1, run.keep_checkpoints + 1 - have) * size
    with storage_errors(run_dir):
        free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise StorageError(
            f"{run_dir}: checkpoints of {si(size, 'B')}, of which train.keep_checkpoints = {run.keep_checkpoints} "
            f"are kept, need {si(needed, 'B')}; the disk has {si(free, 'B')} left"
        )
