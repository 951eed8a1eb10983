"""--trace and --measure: what real steps are recorded as."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import SMALL, memforge, write

from memforge.cost import estimate
from memforge.cost.calibration import Calibration, Passes, at, kept_bytes, predict, read_calibration
from memforge.plan import make_plan
from memforge.spec import load_spec

needs_tensorboard = pytest.mark.skipif(find_spec("torch_tb_profiler") is None, reason="not run: no torch-tb-profiler")


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    spec = write(folder / "small.toml", SMALL)
    done = memforge("profile", spec, "--trace", folder / "runs", "--json")
    assert done.returncode == 0, done.stderr
    assert "wrote " in done.stderr
    return folder / "runs"


def test_every_block_is_in_the_trace_under_its_path(traced: Path) -> None:
    (file,) = traced.glob("*.pt.trace.json")
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    ranges = [event for event in events if event.get("cat") == "user_annotation" and event.get("dur")]
    names = {event["name"] for event in ranges}
    plan = make_plan(load_spec(traced.parent / "small.toml"))
    paths = {part.path for layer in plan.model.layers for part in layer.parts}
    assert paths <= names
    assert {f"{path}.backward" for path in paths} <= names
    assert {"forward and backward", "update"} <= names
    steps = sum(event["name"] == "layers.0.memory" for event in ranges)
    assert steps == 3
    # What a block does lies inside its range, and nothing of another block does.
    inside = next(e for e in ranges if e["name"] == "layers.0.memory")
    span = (inside["ts"], inside["ts"] + inside["dur"])
    within = [
        e["name"] for e in events if e.get("cat") == "cpu_op" and span[0] <= e["ts"] and e["ts"] + e["dur"] <= span[1]
    ]
    assert "memforge::product_key_topk" in within
    assert "memforge::grouped_linear" not in within


@needs_tensorboard
def test_tensorboard_shows_the_ledger_and_its_profiler_the_run(traced: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(traced)).Reload()
    cost = estimate(make_plan(load_spec(traced.parent / "small.toml")).model, batch=4, seq_len=48).as_dict()
    found = {e.step: e.value for e in events.Scalars("ledger/params/ffn")}
    assert found == {1: cost["layers"][1]["blocks"][1]["params"]}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(traced), "--port", str(port), "--load_fast=false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        runs = _served(f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler/runs", lambda page: page["runs"])
        (run,) = runs["runs"]
        base = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler"
        workers = _served(f"{base}/workers?run={run}&view=Overview", bool)
        spans = _served(f"{base}/spans?run={run}&worker={workers[0]}", bool)
        shown = _served(f"{base}/overview?run={run}&worker={workers[0]}&span={spans[0]}&view=Overview", bool)
    finally:
        server.kill()
        server.wait()
    assert workers == ["small"]
    assert "performance" in shown
    assert "steps" in shown


def _served(url: str, ready: object, patience: float = 60) -> object:
    """What the server answers once it is up and has loaded the run."""
    end = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                page = json.loads(answer.read())
            if ready(page):
                return page
        except (urllib.error.URLError, ConnectionError, TimeoutError, ValueError):
            pass
        assert time.monotonic() < end, f"{url} did not answer"
        time.sleep(0.5)


def test_a_directory_that_cannot_be_written_ends_with_4_before_anything_is_run(tmp_path: Path) -> None:
    spec, taken = write(tmp_path / "s.toml", SMALL), write(tmp_path / "taken", "")
    done = memforge("profile", spec, "--trace", taken / "runs", PYTHONPATH=str(_no_torch(tmp_path)))
    assert (done.returncode, done.stdout) == (4, "")
    assert str(taken) in done.stderr


def _no_torch(folder: Path) -> Path:
    """A torch that cannot be imported: whoever runs something needs it."""
    write(folder / "blocked" / "torch" / "__init__.py", "raise ImportError('not yet')\n")
    return folder / "blocked"


def test_measure_counts_times_and_says_when_nothing_can_be_predicted(tmp_path: Path) -> None:
    spec = write(tmp_path / "s.toml", SMALL)
    found = json.loads(memforge("profile", spec, "--measure", "--json").stdout)
    measured = found["measured"]
    executed = found["flops_per_token"]["executed"]
    tokens = found["batch"] * found["seq_len"]
    assert measured["flops"] == {key: executed[key] * tokens for key in ("forward", "backward")}
    assert list(measured["seconds"]) == ["forward_and_backward", "update", "total"]
    for phase in measured["seconds"].values():
        assert 0 < phase["p20"] <= phase["median"] <= phase["p80"]
        assert phase["predicted"] is None
    assert "no prediction: memforge doctor --calibrate" in memforge("profile", spec, "--measure").stdout


FLAT, EVEN = Passes(((1.0, 1e-9),), ((1.0, 2e-9),)), ((1.0, 1e-9),)
MACHINE = Calibration(
    cpu="a cpu", cores=2, torch="2", matmul=FLAT, stream=1e-9, attention=FLAT, scoring=FLAT, rows=FLAT,
    frame=EVEN, loss=EVEN, update=EVEN, row_sums=EVEN, row_update=EVEN, blocks={"ffn": EVEN, "attention": EVEN},
)  # fmt: skip


def test_a_rate_between_two_sizes_is_interpolated_and_stays_beyond_them() -> None:
    curve = ((10.0, 4e-9), (1000.0, 1e-9))
    assert [at(curve, size) for size in (1, 10, 1000, 5000)] == [4e-9, 4e-9, 1e-9, 1e-9]
    assert at(curve, 100) == pytest.approx(2e-9)


def test_the_time_of_a_step_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    text = SMALL[: SMALL.index("[pool.facts]")].replace("num_layers = 4", "num_layers = 1")
    plan = make_plan(load_spec(write(tmp_path / "s.toml", text))).model
    report = estimate(plan, batch=2, seq_len=8, devices=())
    forward, backward = report.flops(executed=True)
    predicted = predict(plan, report, MACHINE)
    assert predicted.update == pytest.approx(1e-9 * sum(row.numel for row in plan.params))
    blocks = sum(kept_bytes(part, 2, 8) for part in plan.layers[0].parts)
    weights = sum(4 * 3 * row.numel for row in plan.params if len(row.shape) == 2 and row.path != "embedding.weight")
    beside = 4 * 16 * 300 + 4 * 16 * plan.dim + blocks + weights
    assert predicted.forward_and_backward == pytest.approx(1e-9 * forward + 2e-9 * backward + 1e-9 * beside)


def test_a_calibration_is_read_as_it_was_written_and_a_damaged_one_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert read_calibration() is None
    file = write(tmp_path / "memforge" / "calibration.json", MACHINE.to_json())
    assert read_calibration() == MACHINE
    assert not MACHINE.is_of_this_machine()
    for damage in (MACHINE.to_json()[:-40], MACHINE.to_json().replace('"matmul"', '"matmull"'), "[]", "{}"):
        file.write_text(damage, encoding="utf-8")
        assert read_calibration() is None
