"""What training says of itself: slot usage, updates, speed, and where else it is written."""

import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import SMALL, write
from test_resume import Notes

from memforge.build import build_model
from memforge.cost import estimate
from memforge.cost.devices import DEVICES
from memforge.cost.memory import step_memory
from memforge.errors import DeviceError, NonFiniteError
from memforge.plan import Plan, make_plan
from memforge.spec import load_spec
from memforge.training import train
from memforge.training.checkpoint import checkpoints
from memforge.training.execution import precision_of
from memforge.training.machine_use import MachineUse, Peak
from memforge.training.optimizer import Gradients, Stepper
from memforge.training.revival import Reviver
from memforge.training.schedule import PEAK
from memforge.training.start import checked, require_memory_for
from memforge.training.telemetry import SlotUsage, Telemetry, update_figures, usage_bytes


def planned(path: Path, *overrides: str) -> Plan:
    return make_plan(load_spec(write(path / "s.toml", SMALL), overrides=overrides))


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_makes_sure_of_room_for_the_usage_of_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path)
    run, usage = checked(plan), Telemetry.of(plan.model, torch.device("cpu")).usage
    kept = sum(tensor.numel() * tensor.element_size() for of in usage.values() for tensor in (of.weight, of.ever))
    assert kept == usage_bytes(plan.model) == 2 * 64 * 5
    peak = step_memory(plan.model, run.micro_batch_size, run.seq_len).peak
    monkeypatch.setattr("memforge.machine.machine_memory", lambda: peak + kept)
    require_memory_for(plan, run, "cpu")
    monkeypatch.setattr("memforge.machine.machine_memory", lambda: peak + kept - 1)
    with pytest.raises(DeviceError, match="a training step"):
        require_memory_for(plan, run, "cpu")


def test_slot_usage_by_hand() -> None:
    usage = SlotUsage.of(200, torch.device("cpu"))
    usage.add(torch.tensor([[3, 5], [3, 7]]), torch.tensor([[0.5, 0.25], [0.5, -0.75]]))
    found = usage.figures()
    shares = (1.0 / 2, 0.25 / 2, 0.75 / 2)
    entropy = -sum(share * math.log(share) for share in shares)
    assert found["slots_used"] == found["slots_ever"] == 3 / 200
    assert found["entropy"] == pytest.approx(entropy)
    assert found["kl"] == pytest.approx(math.log(200) - entropy)
    assert found["top_1pct"] == pytest.approx(shares[0] + shares[2])  # 2 of 200 slots
    usage.add(torch.tensor([9, 3]), torch.tensor([1.0, 1.0]))
    again = usage.figures()
    assert (again["slots_used"], again["slots_ever"]) == (2 / 200, 4 / 200)
    assert again["entropy"] == pytest.approx(math.log(2))
    assert usage.figures() == {"slots_used": 0.0, "slots_ever": 4 / 200}


def test_even_reads_have_no_distance_to_uniform() -> None:
    usage = SlotUsage.of(1000, torch.device("cpu"))
    usage.add(torch.arange(1000), torch.ones(1000))
    found = usage.figures()
    assert found["kl"] == pytest.approx(0.0, abs=1e-9)
    assert found["top_1pct"] == pytest.approx(0.01)
    assert found["slots_used"] == 1.0


def test_nan_weights_of_a_bad_step_do_not_stay(tmp_path: Path) -> None:
    usage = SlotUsage.of(4, torch.device("cpu"))
    usage.add(torch.tensor([0, 1]), torch.tensor([math.nan, 1.0]))
    assert usage.figures()["entropy"] == pytest.approx(0.0, abs=1e-12)


def test_router_load_is_a_mean_over_steps() -> None:
    telemetry = Telemetry({})
    telemetry.observe({"m.load": torch.tensor([0.5, 0.5, 0.0, 0.0]), "m.read_norm": torch.tensor(1.0)})
    telemetry.observe({"m.load": torch.tensor([1.0, 0.0, 0.0, 0.0]), "m.read_norm": torch.tensor(3.0)})
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert telemetry.figures() == pytest.approx({"m.load_max": 3.0, "m.load_entropy": entropy, "m.read_norm": 2.0})
    assert telemetry.figures() == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_figures_by_hand(dtype: torch.dtype) -> None:
    table = torch.ones(10, 4).to(dtype)

    def update() -> None:
        table[2, 0] += 1  # the other elements of the touched rows stay as they are

    found = update_figures({"t": table, "u": table}, {"t": torch.tensor([2, 5]), "u": torch.tensor([]).long()}, update)
    assert found["t.moved"] == pytest.approx(1 / 8**0.5)
    assert found.get("t.lost") == (None if dtype == torch.float32 else 7 / 8)
    assert not [name for name in found if name.startswith("u.")]


def test_rounding_loses_updates_of_a_16_bit_pool_and_metrics_say_so(tmp_path: Path) -> None:
    plan = planned(tmp_path, "pool.facts.dtype=bfloat16", "train.value_learning_rate=1e-5", "train.compile=off")
    train(plan, tmp_path / "run")
    row = rows_of(tmp_path / "run")[-1]
    assert 0.9 < row["pool.facts.values.lost"] <= 1.0
    faster = planned(tmp_path, "pool.facts.dtype=bfloat16", "train.value_learning_rate=0.1", "train.compile=off")
    train(faster, tmp_path / "faster")
    assert rows_of(tmp_path / "faster")[0]["pool.facts.values.lost"] < 0.2


def test_metrics_are_about_every_step_since_the_row_before(tmp_path: Path) -> None:
    """Rows every third step are means of rows every step."""
    for every in (1, 3):
        train(
            planned(tmp_path, "train.steps=7", f"train.log_every={every}", "train.compile=off"), tmp_path / str(every)
        )
    single, third = rows_of(tmp_path / "1"), rows_of(tmp_path / "3")
    assert [row["step"] for row in third] == [1, 3, 6, 7]
    assert third[2]["loss"] == pytest.approx(sum(row["loss"] for row in single[3:6]) / 3)
    for name in ("layers.0.memory.read_norm",):
        assert third[2][name] == pytest.approx(sum(row[name] for row in single[3:6]) / 3)
    assert third[2]["layers.0.memory.slots_used"] >= max(row["layers.0.memory.slots_used"] for row in single[3:6])
    assert third[-1]["layers.3.moe.load_max"] >= 1.0
    assert third[-1]["recall"] == single[-1]["recall"]


def bad_at(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Stepper.backward

    def sometimes(self: Stepper, window: torch.Tensor, *, step: int = 0) -> Gradients:
        found = backward(self, window, step=step)
        return found._replace(norm=torch.tensor(math.inf)) if step in steps else found

    monkeypatch.setattr(Stepper, "backward", sometimes)


def test_so_many_bad_steps_are_left_out_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path, "train.steps=8", "train.max_skipped=2", "train.compile=off", "train.checkpoint_every=2")
    bad_at({1, 4}, monkeypatch)
    notes = Notes()
    assert train(plan, tmp_path / "two", reporter=notes)["ended"] == "done"
    assert [row.get("skipped", 0) for row in rows_of(tmp_path / "two")] == [0, 1, 1, 1, 2, 2, 2, 2]
    assert "loss" not in rows_of(tmp_path / "two")[1]
    assert any("step 2: the loss is" in note and "1 of at most 2" in note for note in notes.notes)
    bad_at({1, 4, 6}, monkeypatch)
    with pytest.raises(NonFiniteError, match=r"step 7: .*the update was not made"):
        train(plan, tmp_path / "three")
    assert checkpoints(tmp_path / "three")[-1].name == "step-00000006"
    assert json.loads((tmp_path / "three" / "summary.json").read_text())["ended"] == "non-finite"


def test_a_skipped_step_changes_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(tmp_path, "train.steps=1", "train.max_skipped=1", "train.compile=off")
    bad_at({0}, monkeypatch)
    train(plan, tmp_path / "run")
    from memforge.training.checkpoint import load_weights

    start = build_model(plan.model, seed=0).state_dict()
    saved = load_weights(checkpoints(tmp_path / "run")[-1], plan)
    assert all(torch.equal(saved[name], value) for name, value in start.items())


def test_speed_is_a_share_of_the_peak(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    tokens, width = 4 * 48, 32 * 4
    per_token = estimate(plan.model, seq_len=48).as_dict()["flops_per_token"]["total"]
    use, flops = MachineUse(plan, per_token, Peak(1e9, 1e9)), per_token * tokens
    shares = use.shares(10, 5.0)
    assert shares["mfu"] == pytest.approx(10 * flops / 5.0 / 1e9, abs=1e-4)
    # Two layers of 2 x 4 reads, forward and backward; an update of weights, gradient and moments of at most 64 rows.
    reads = 2 * tokens * 2 * 8 * width
    assert reads <= use.pool_bytes <= reads + 64 * width * 7
    assert MachineUse(plan, per_token, Peak(None, None)).shares(1, 1.0) == {}
    assert DEVICES["H100"].flops_per_second > 9e14


def test_bfloat16_on_a_plain_cpu_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    run = planned(tmp_path, "train.precision=bfloat16").run.train
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert precision_of(run, "cpu", notes.append) == torch.bfloat16
    assert len(notes) == 1
    assert "no bfloat16" in notes[0]
    for precision, device, expected in (
        ("auto", "cpu", None), ("auto", "cuda:0", torch.bfloat16), ("float32", "cuda", None),
    ):  # fmt: skip
        given = planned(tmp_path, f"train.precision={precision}").run.train
        assert precision_of(given, device, notes.append) == expected
    assert len(notes) == 1


def test_dead_sub_keys_restart_beside_busy_ones(tmp_path: Path) -> None:
    plan = planned(tmp_path, "pool.facts.num_sub_keys=40", "train.batch_size=1")
    assert plan.run.train is not None
    stepper = Stepper(build_model(plan.model, seed=3).train(), plan.model, plan.run.train)
    reviver = Reviver.of(stepper)
    window = torch.randint(300, (1, 49), generator=torch.Generator().manual_seed(1))
    stepper.update(stepper.backward(window).norm, PEAK)
    layer = reviver.layers["layers.0.memory"]
    keys = layer.block.sub_keys
    chosen, before = layer.chosen.clone(), keys.detach().clone()
    assert int(chosen.sum()) == 48 * 2 * 4 * 2  # tokens, heads, top_k, halves
    dead = chosen == 0
    assert 0 < int(dead.sum()) < dead.numel()
    moments = stepper.dense.state[keys]["exp_avg_sq"]
    moments.fill_(1.0)
    assert reviver.revive(1, seed=0) >= int(dead.sum())
    assert torch.equal(keys[~dead], before[~dead])
    assert not (keys[dead] == before[dead]).all(dim=-1).any()
    assert moments[dead].abs().max() == 0
    assert moments[~dead].min() == 1
    # Each is near a sub-key of its own head and half that was chosen.
    for head in range(2):
        for half in range(2):
            busy = before[head, half][chosen[head, half] > 0]
            for key in keys[head, half][dead[head, half]]:
                nearest = (busy - key).norm(dim=-1).min()
                assert nearest < 0.3 * key.norm()
    assert int(layer.chosen.sum()) == 0


def test_metrics_go_to_tensorboard_and_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged: list[tuple[int, dict[str, object]]] = []
    started: dict[str, object] = {}

    class Run:
        def log(self, row: dict[str, object], step: int) -> None:
            logged.append((step, row))

        def finish(self) -> None:
            logged.append((-1, {}))

    def init(**given: object) -> Run:
        started.update(given)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    plan = planned(tmp_path, "train.steps=3", "train.tensorboard=true", "train.wandb=mine", "train.compile=off")
    train(plan, tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars("loss")]
    assert scalars == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert "layers/0/memory/slots_used" in events.Tags()["scalars"]
    assert "tokens_per_second" in events.Tags()["scalars"]
    assert (started["project"], started["name"]) == ("mine", "small")
    assert [step for step, row in logged if "loss" in row] == [1, 2, 3]
    assert logged[-1] == (-1, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DeviceError, match="pip install wandb"):
        train(plan, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_samples_are_logged_whenever_the_model_is_scored(tmp_path: Path) -> None:
    plan = planned(
        tmp_path, "train.steps=4", "eval.every_steps=2", 'eval.samples=["Flights to", "The city"]',
        "eval.sample_tokens=5", "train.compile=off",
    )  # fmt: skip
    train(plan, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (s, p) for s in (2, 4) for p in ("Flights to", "The city")
    ]
    assert (tmp_path / "run" / "report.html").read_text().count("Flights to") >= 1
