"""Checkpoints: written whole or not at all, whatever fails; damage is refused by name."""

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, memforge, write
from torch import Tensor

from memforge.errors import MemforgeError, NonFiniteError, StorageError
from memforge.plan import Plan, make_plan, read_plan
from memforge.spec import load_spec
from memforge.storage import file_sha256
from memforge.training import checkpoint as checkpoint_module
from memforge.training import train
from memforge.training.checkpoint import (
    RunIdentity,
    Saver,
    Snapshot,
    checkpoints,
    newest_sound,
    read_manifest,
    save_checkpoint,
    stored,
    verify,
)
from memforge.training.resume import chosen
from memforge.training.run_directory import read_tokenizer, write_identity


def planned(path: Path, *overrides: str) -> Plan:
    return make_plan(load_spec(write(path / "s.toml", SMALL), overrides=overrides))


def new_identity(path: Path) -> RunIdentity:
    """A run directory with nothing but its identity."""
    path.mkdir()
    write(path / "tokenizer.json", "{}")
    plan = planned(path.parent)
    return RunIdentity(write_identity(path), plan, file_sha256(path / "tokenizer.json"), "0" * 64)


def with_two_checkpoints(run: Path) -> RunIdentity:
    identity = new_identity(run)
    for step in (1, 2):
        save_checkpoint(run, snapshot(step), identity)
    return identity


def tensors(value: float) -> dict[str, dict[str, Tensor]]:
    return {
        "model": {"a": torch.full((40, 5), value), "b": torch.arange(7)},
        "optimizer": {"a.m": torch.ones(3) * value},
    }


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, tensors(float(step)), {"losses": [0.1 * step]})


def load_tensors(checkpoint: Path, kind: str) -> dict[str, Tensor]:
    found = stored(checkpoint, read_manifest(checkpoint), kind)
    return {name: found.read(name) for name in found}


def step_of(checkpoint: Path) -> int:
    """The step of a sound checkpoint, as its manifest, its name and every tensor say."""
    manifest = verify(checkpoint)
    for file, expected in tensors(float(manifest.step)).items():
        found = load_tensors(checkpoint, file)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert manifest.state == {"losses": [0.1 * manifest.step]}
    return manifest.step


class Faults:
    """Storage calls inside a directory, counted, of which the n-th fails."""

    CALLS = frozenset(("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir"))

    def __init__(self) -> None:
        self.root: str | None = None
        self.fails_at, self.made, self.how = 0, 0, "ENOSPC"

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self.root is not None and event in self.CALLS and str(args[0]).startswith(self.root):
            self.call(Path(str(args[0])))

    def call(self, path: Path) -> None:
        self.made += 1
        if self.made == self.fails_at:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28 if self.how == "ENOSPC" else 5, f"injected {self.how}", str(path))


FAULTS = Faults()
sys.addaudithook(FAULTS.audit)


@contextmanager
def faults(root: Path, fails_at: int, how: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Inside, the n-th storage call under `root` fails; writes that fail leave half of what they were to write."""
    fsync, save_file, write_json = os.fsync, checkpoint_module.save_file, checkpoint_module.write_json

    def failing_sync(descriptor: int) -> None:
        FAULTS.call(root)
        fsync(descriptor)

    def failing_save(given: dict[str, Tensor], path: Path) -> None:
        save_file(given, path)
        half_written(path)

    def failing_json(path: Path, record: Any) -> None:
        write_json(path, record)
        half_written(path)

    def half_written(path: Path) -> None:
        try:
            if FAULTS.made + 1 == FAULTS.fails_at:
                root_of, FAULTS.root = FAULTS.root, None
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                FAULTS.root = root_of
        finally:
            FAULTS.call(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing_sync)
        patch.setattr(checkpoint_module, "save_file", failing_save)
        patch.setattr(checkpoint_module, "write_json", failing_json)
        FAULTS.root, FAULTS.fails_at, FAULTS.made, FAULTS.how = str(root), fails_at, 0, how
        try:
            yield FAULTS
        finally:
            FAULTS.root = None


def saved_with_a_fault(run: Path, identity: RunIdentity, n: int, how: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Save step 3 after steps 1 and 2, of which one is kept beside it; whether call n was made at all."""
    saver = Saver(run, identity, keep=2, in_background=False)
    with faults(run, n, how, monkeypatch) as found, suppress(StorageError):
        saver.save(snapshot(3))
    return found.made >= n


@pytest.mark.parametrize("how", ["ENOSPC", "EIO"])
def test_whichever_storage_call_fails_the_last_checkpoint_is_there(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, outcomes = 0, []
    while True:
        n += 1
        run = tmp_path / f"run-{n}"
        identity = with_two_checkpoints(run)
        reached = saved_with_a_fault(run, identity, n, how, monkeypatch)
        newest, _ = newest_sound(run, checkpoints(run), lambda message: None)
        outcomes.append(step_of(newest))
        if not reached:
            break
        # What is left behind does not stand in the way.
        if outcomes[-1] == 2:
            Saver(run, identity, keep=2, in_background=False).save(snapshot(3))
            assert step_of(checkpoints(run)[-1]) == 3
    assert n > 25
    assert set(outcomes) == {2, 3}
    assert outcomes[-1] == 3


def test_killed_at_any_storage_call_the_last_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, outcomes, killed = 0, [], 0
    while True:
        n += 1
        run = tmp_path / f"run-{n}"
        identity = with_two_checkpoints(run)
        child = os.fork()
        if not child:
            try:
                saved_with_a_fault(run, identity, n, "kill", monkeypatch)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        newest, _ = newest_sound(run, checkpoints(run), lambda message: None)
        outcomes.append(step_of(newest))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
    assert killed > 25
    assert set(outcomes) == {2, 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two checkpoints of a small real model."""
    path = tmp_path_factory.mktemp("trained")
    plan = planned(path, "train.steps=2", "train.checkpoint_every=1", "eval.sample_tokens=0", "train.compile=off")
    train(plan, path / "run")
    return path / "run"


def opened(run: Path) -> None:
    """Everything a run is taken up from is read and checked."""
    read_plan(run / "plan.json")
    checkpoint, _ = chosen(run, "step=2", lambda message: None)  # type: ignore[misc]
    read_tokenizer(run)
    for file in TENSORS:
        load_tensors(checkpoint, file)


TENSORS = ("model", "optimizer", "telemetry")
FILES = (
    *("plan.json", "run.json", "tokenizer.json", "step-00000002/manifest.json"),
    *(f"step-00000002/{name}.safetensors" for name in TENSORS),
)
# A changed identity is told by the checkpoint that no longer belongs to it.
NAMED = {"run.json": "run.json|belongs to another run|run format"}


@pytest.mark.parametrize(("damage", "trials"), [("truncated", 500), ("flipped", 1000)])
def test_damage_is_refused_by_name_and_reason(trained: Path, tmp_path: Path, damage: str, trials: int) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    opened(run)
    chance, refused = random.Random(trials), 0
    whole = {name: (run / name).read_bytes() for name in FILES}
    for trial in range(trials):
        name = FILES[trial % len(FILES)]
        raw = bytearray(whole[name])
        if damage == "truncated":
            raw = raw[: chance.randrange(len(raw))]
        else:
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        (run / name).write_bytes(raw)
        with pytest.raises(StorageError, match=NAMED.get(name, name)) as refusal:
            opened(run)
        assert "\n" not in str(refusal.value)
        refused += 1
        (run / name).write_bytes(whole[name])
    assert refused == trials
    opened(run)


def test_missing_swapped_and_foreign_files_are_refused(trained: Path, tmp_path: Path) -> None:
    other = planned(tmp_path, "train.steps=2", "train.seed=1", "train.checkpoint_every=1", "train.compile=off")
    train(other, tmp_path / "other")

    def damaged(name: str) -> Path:
        run = tmp_path / name
        shutil.copytree(trained, run)
        return run

    for name in FILES:
        run = damaged(f"missing-{name.replace('/', '-')}")
        (run / name).unlink()
        with pytest.raises(StorageError, match=f"{name}: (No such file|cannot be read: No such file)"):
            opened(run)
    run = damaged("swapped")
    for file in ("model", "optimizer"):
        shutil.copy(trained / "step-00000001" / f"{file}.safetensors", run / "step-00000002" / f"{file}.safetensors")
    with pytest.raises(StorageError, match=r"step-00000002/model.safetensors: the content does not match"):
        opened(run)
    run = damaged("renamed")
    shutil.rmtree(run / "step-00000002")
    (run / "step-00000001").rename(run / "step-00000002")
    with pytest.raises(StorageError, match="step-00000002: holds step 1"):
        opened(run)
    run = damaged("foreign")
    shutil.rmtree(run / "step-00000002")
    shutil.copytree(tmp_path / "other" / "step-00000002", run / "step-00000002")
    with pytest.raises(StorageError, match="step-00000002: belongs to another run"):
        opened(run)


def test_a_save_in_the_background_is_of_the_state_at_the_call(tmp_path: Path) -> None:
    run = tmp_path / "run"
    saver = Saver(run, new_identity(run), keep=9, in_background=True)
    state = snapshot(1)
    saver.save(state)
    for of_file in state.tensors.values():
        for tensor in of_file.values():
            tensor.zero_()  # at once, while it is being written
    saver.wait()
    assert step_of(checkpoints(run)[-1]) == 1


def test_a_save_that_fails_in_the_background_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    saver = Saver(run, new_identity(run), keep=9, in_background=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    saver.save(snapshot(1))
    with pytest.raises(StorageError, match=r"takes 1\.049 MB; the disk has 0 B left"):
        saver.wait()
    saver.wait()
    assert checkpoints(run) == []


def test_a_save_that_dies_in_the_background_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError("cannot allocate memory")

    monkeypatch.setattr("memforge.training.checkpoint.save_file", no_memory)
    plan = planned(tmp_path, "train.steps=40", "train.checkpoint_every=2", "train.async_checkpoints=true")
    with pytest.raises(MemoryError):
        train(plan, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_the_newest_are_kept_and_never_overwritten(tmp_path: Path) -> None:
    run = tmp_path / "run"
    identity = new_identity(run)
    saver = Saver(run, identity, keep=2, in_background=False)
    for step in range(1, 6):
        saver.save(snapshot(step))
        assert [step_of(path) for path in checkpoints(run)] == [s for s in (step - 1, step) if s]
    with pytest.raises(StorageError, match="never overwritten"):
        saver.save(snapshot(5))
    assert {p.name for p in run.iterdir()} == {"run.json", "tokenizer.json", "step-00000004", "step-00000005"}


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    run = tmp_path / "run"
    identity = new_identity(run)
    save_checkpoint(run, snapshot(1), identity)
    for value in (float("nan"), float("inf"), float("-inf")):
        bad = snapshot(2)
        bad.tensors["optimizer"]["a.m"][1] = value
        with pytest.raises(NonFiniteError, match=r"step-00000002: not saved, since a.m is not finite"):
            save_checkpoint(run, bad, identity)
    assert [step_of(path) for path in checkpoints(run)] == [1]


def test_shared_pools_are_saved_once_and_the_ledger_knows_the_size(trained: Path, tmp_path: Path) -> None:
    from memforge.cost.memory import step_memory

    checkpoint = checkpoints(trained)[-1]
    model, optimizer = (load_tensors(checkpoint, file) for file in ("model", "optimizer"))
    assert [name for name in model if name.endswith("values")] == ["pool.facts.values"]
    plan = read_plan(trained / "plan.json")
    kept = [tensor for name, tensor in (*model.items(), *optimizer.items()) if tensor.numel() > 1]
    assert sum(t.numel() * t.element_size() for t in kept) == step_memory(plan.model, 1, 1).checkpoint


def test_a_file_that_grows_too_large_ends_the_run_with_one_line(tmp_path: Path) -> None:
    """The system's own refusal, in the middle of a write."""
    spec = write(tmp_path / "s.toml", SMALL)

    def limited(size: int) -> Any:
        import subprocess

        return subprocess.run(
            [sys.executable, "-m", "memforge", "train", str(spec), "--out", str(tmp_path / "run")],
            capture_output=True, text=True, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
        )  # fmt: skip

    done = limited(60_000)
    assert done.returncode == 4, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("step-*"))


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run", "/sys/run"])
def test_where_nothing_can_be_written(tmp_path: Path, place: str) -> None:
    done = memforge("train", write(tmp_path / "s.toml", SMALL), "--out", place)
    assert done.returncode == 4, done.stderr
    assert place in done.stderr or "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(
        StorageError, match=r"train.keep_checkpoints = 3 are kept, need \d\.\d+ MB; the disk has 1 MB left"
    ):
        train(planned(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_errors_of_the_system_are_told_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(MemforgeError, match="no such checkpoint"):
        verify(tmp_path / "step-00000001")
    write(tmp_path / "step-00000001" / "manifest.json", json.dumps({"format_version": 1}))
    with pytest.raises(StorageError, match=r"manifest.json: damaged at"):
        verify(tmp_path / "step-00000001")
