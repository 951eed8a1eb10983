"""What several ranks save: each reads back its part, the first alone looks after the directory, an error is of all."""

from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, write
from made_ranks import on_ranks
from test_checkpoint import new_identity, snapshot

from memforge.errors import MemforgeError, StorageError
from memforge.mesh import Mesh
from memforge.plan import make_plan, on_mesh, plan_from_json
from memforge.spec import load_spec
from memforge.training import checkpoint as files
from memforge.training.checkpoint import RunIdentity, Saver, Snapshot, checkpoints, save_checkpoint
from memforge.training.ranks import ALONE


def saves(plan: str, run: str) -> list[Any]:
    """Of two copies, of which the first writes: what each reads back, and what a deletion that fails comes to."""
    import torch.distributed as dist

    from memforge.training.distributed import ProcessRanks
    from memforge_kernels.shared_out import gloo

    dist.init_process_group(gloo())
    ranks, read, hash_of = ProcessRanks(Mesh(dp_replicate=2), "cpu"), [], files.file_sha256

    def hashed(path: Path) -> str:
        read.append(path.name)
        return hash_of(path)

    def refused(path: Path, why: str) -> Path:
        raise StorageError(f"{path}: cannot be renamed")

    files.file_sha256 = hashed
    identity = RunIdentity("0", plan_from_json(plan, "it"), "0", "0")
    saver = Saver(Path(run), identity, keep=1, in_background=False, ranks=ranks)
    saver.save(snapshot(1) if ranks.is_first else Snapshot(1, {}))
    files.set_aside = refused
    try:
        saver.save(snapshot(2) if ranks.is_first else Snapshot(2, {}))
    except StorageError as error:
        return [sorted(set(read)), str(error), error.of_all_ranks]
    finally:
        dist.destroy_process_group()
    return [sorted(set(read)), None, False]


def test_ranks_read_back_what_they_wrote_and_fail_together(tmp_path: Path) -> None:
    plan = make_plan(load_spec(write(tmp_path / "s.toml", SMALL)))
    (tmp_path / "run").mkdir()
    first, other = on_ranks(2, "test_ranks_saves:saves", plan.to_json(), str(tmp_path / "run"))
    written = ["model-00000-of-00002.safetensors", "optimizer-00000-of-00002.safetensors"]
    told = f"{tmp_path / 'run' / 'step-00000001'}: cannot be renamed"
    assert first == [written, told, True]
    assert other == [[], told, True]


def train_with_an_old_view(plan: str, run: str) -> None:
    """Train where the ranks that are not the first see nothing yet of the checkpoints."""
    import os

    from memforge.training import train

    exists = Path.exists
    if os.environ["RANK"] != "0":
        files.checkpoints = lambda run_dir: []
        Path.exists = lambda path, **given: not path.name.startswith("step-") and exists(path, **given)  # type: ignore[method-assign]
    train(plan_from_json(plan, "it"), Path(run))


def test_the_first_rank_alone_looks_for_checkpoints(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    keys = ("train.steps=1", "train.compile=off", "eval.sample_tokens=0", "eval.max_prompts=2")
    plan = on_mesh(make_plan(load_spec(spec, overrides=keys)), Mesh(dp_shard=2))
    on_ranks(2, "test_ranks_saves:train_with_an_old_view", plan.to_json(), str(tmp_path / "run"))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000001"]


def test_a_checkpoint_that_is_not_read_as_it_was_written_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    identity = new_identity(run)
    save_checkpoint(run, snapshot(1), identity, ALONE)
    monkeypatch.setattr(files, "require_files", _damaged)
    with pytest.raises(StorageError, match="not what was written"):
        save_checkpoint(run, snapshot(2), identity, ALONE)
    assert [path.name for path in checkpoints(run)] == ["step-00000001"]
    assert len(list(run.glob(".bad-step-00000002-*"))) == 1


def _damaged(checkpoint: Path, *_: object) -> None:
    raise StorageError(f"{checkpoint}: not what was written")


def refused(plan_json: str, run: str) -> list[list[Any]]:
    """What a run is refused with where wandb is not installed, and where ranks have other data."""
    import sys
    from types import SimpleNamespace

    from memforge.training import train
    from memforge.training.distributed import ProcessRanks
    from memforge.training.start import Start, identified, nothing

    sys.modules["wandb"] = None  # type: ignore[assignment]
    plan, errors = plan_from_json(plan_json, "it"), []
    try:
        train(plan, Path(run))
    except MemforgeError as error:
        errors.append([str(error), error.of_all_ranks])
    ranks = ProcessRanks(Mesh(dp_shard=2), "cpu")  # in the group that is still there
    corpus: Any = SimpleNamespace(description={"corpus_sha256": f"that of {ranks.rank}"})
    try:
        identified(plan, corpus, Start(Path(run), nothing), ranks)
    except MemforgeError as error:
        errors.append([str(error), error.of_all_ranks])
    return errors


def test_what_a_run_is_refused_with_is_an_error_of_all_ranks(tmp_path: Path) -> None:
    keys = ("train.wandb=mine", "parallel.timeout_minutes=0.25")
    plan = on_mesh(make_plan(load_spec(write(tmp_path / "s.toml", SMALL), overrides=keys)), Mesh(1, 2))
    run = tmp_path / "run"
    expected = [
        ["train.wandb needs wandb: pip install wandb", True],
        [f"{run}: ranks have read different data (its hashes differ)", True],
    ]
    assert on_ranks(2, "test_ranks_saves:refused", plan.to_json(), str(run)) == [expected, expected]
    assert not run.exists()
