"""Taking up a run: which checkpoint, and whether the plan is still the one it was made by."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memforge.errors import StorageError, UsageError, printable
from memforge.plan import Plan, read_plan
from memforge.storage import storage_errors
from memforge.training.checkpoint import (
    Manifest,
    checkpoints,
    newest_sound,
    require_same_run,
    set_aside,
    verify,
)
from memforge.training.run_directory import PLAN, STEP, run_id

# What may change between two processes of one run: how long it is, and what does not touch the weights.
CHANGEABLE = re.compile(
    r"train\.(steps|decay_steps|max_skipped|log_every|checkpoint_every|checkpoint_minutes|keep_checkpoints|async_checkpoints"
    r"|data_workers|tensorboard|wandb)|(eval|parallel)\..*"
)
SHOWN_KEYS = 8


def chosen(run_dir: Path, target: str, note: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The checkpoint to go on from; None where the run was stopped before it had any, so that it starts over.

    `target` is "auto", "step=N" or the path of a checkpoint. Raises StorageError, saying what there is, for one that is
    absent or damaged; only "auto" falls back on an older one.
    """
    found = checkpoints(run_dir)
    if target == "auto":
        if not found:
            return None
        run_id(run_dir)
        checkpoint, manifest = newest_sound(run_dir, found, note)
        for damaged in found[found.index(checkpoint) + 1 :]:
            note(f"moved to {set_aside(damaged, 'bad').name}")
        return checkpoint, manifest
    checkpoint = _named(run_dir, target)
    if checkpoint not in found:
        there = f"it has {', '.join(path.name for path in found)}" if found else "it has none"
        raise StorageError(f"{checkpoint}: no such checkpoint; {there}")
    manifest = verify(checkpoint)
    require_same_run(checkpoint, manifest)
    return checkpoint, manifest


def _named(run_dir: Path, target: str) -> Path:
    if target.startswith("step="):
        number = target.removeprefix("step=")
        if not re.fullmatch(r"[0-9]{1,18}", number):
            raise UsageError(f"--resume {printable(target)}: expected step=N")
        return run_dir / f"step-{int(number):08d}"
    name = Path(target).name
    if STEP.fullmatch(name) is None:
        raise UsageError(f"--resume {printable(target)}: expected auto, step=N or the path of a checkpoint step-<n>")
    return run_dir / name


def require_same_plan(run_dir: Path, plan: Plan) -> list[str]:
    """The keys in which a plan differs from the run's, as `key: old -> new`, of those that may.

    Raises UsageError with those that may not.
    """
    changed = list(_changes(read_plan(run_dir / PLAN), plan))
    refused = [f"{key}: {old} -> {new}" for key, old, new in changed if not CHANGEABLE.fullmatch(key)]
    if refused:
        more = f" and {len(refused) - SHOWN_KEYS} more" if len(refused) > SHOWN_KEYS else ""
        shown = "; ".join(refused[:SHOWN_KEYS])
        raise UsageError(f"{run_dir}: the spec is not the one of this run: {shown}{more}")
    return [f"{key}: {old} -> {new}" for key, old, new in changed]


def _changes(old: Plan, new: Plan) -> Iterator[tuple[str, str, str]]:
    sides = [plan.run.model_dump(mode="json") | {"model": _model(plan)} for plan in (old, new)]
    flat = [dict(_leaves(side, ())) for side in sides]
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        before, after = (str(side.get(key, "absent")) for side in flat)
        if before != after:
            yield key, printable(before), printable(after)


def _model(plan: Plan) -> dict[str, Any]:
    """The architecture without what follows from it."""
    return plan.model.model_dump(mode="json", by_alias=True, exclude={"params"})


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield ".".join(path), value
        return
    for key, inner in items:
        yield from _leaves(inner, (*path, str(key)))


def clear_the_way(run_dir: Path, checkpoint: Path | None, note: Callable[[str], None]) -> None:
    """Delete what a killed process left half written, and set aside checkpoints beyond the one to go on from."""
    with storage_errors(run_dir):
        for rubble in run_dir.glob(".tmp-*"):
            shutil.rmtree(rubble, ignore_errors=True) if rubble.is_dir() else rubble.unlink(missing_ok=True)
    found = checkpoints(run_dir)
    beyond = found[found.index(checkpoint) + 1 :] if checkpoint is not None else found
    for later in reversed(beyond):  # the newest first, so that a kill in between leaves what --resume auto expects
        note(f"{later.name} lies beyond the step to go on from: moved to {set_aside(later, 'abandoned').name}")
