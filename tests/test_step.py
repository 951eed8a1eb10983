"""One training step: passes that add up, rates over a run, what is drawn at random, what is left out."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import PEER, SMALL, write
from test_tables import gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memforge.build import build_model
from memforge.plan import Plan, TrainPlan, make_plan
from memforge.spec import load_spec
from memforge.training.execution import compiled, compiler_error
from memforge.training.optimizer import Gradients, Stepper
from memforge.training.schedule import PEAK, rate_share, rate_shares
from memforge_kernels import Recorder

# Without the router's loss, which is no mean over tokens.
NO_MOE = SMALL.replace('kind = "moe", num_experts = 4, top_k = 2, hidden_dim = 24', 'kind = "ffn", hidden_dim = 24')


def planned(path: Path, *overrides: str, text: str = NO_MOE) -> tuple[Plan, TrainPlan]:
    spec = write(path / "s.toml", text.replace("[data]", PEER + "[data]"))
    plan = make_plan(load_spec(spec, overrides=overrides))
    assert plan.run.train is not None
    return plan, plan.run.train


def window(batch: int, length: int = 49) -> Tensor:
    return torch.randint(300, (batch, length), generator=torch.Generator().manual_seed(5))


def made(path: Path, dtype: torch.dtype, *overrides: str) -> tuple[Gradients, dict[str, Tensor], Stepper]:
    plan, run = planned(path, "train.batch_size=32", *overrides)
    stepper = Stepper(build_model(plan.model, seed=3).to(dtype).train(), plan.model, run)
    found = stepper.backward(window(32))
    return found, gradients(stepper), stepper


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("micro", [8, 5])
def test_passes_of_a_batch_add_up_to_the_batch(tmp_path: Path, dtype: torch.dtype, bound: float, micro: int) -> None:
    """4 x 8 = 32, and 6 x 5 + 2, where the last pass has fewer tokens and so less weight."""
    whole, expected, _ = made(tmp_path, dtype)
    parts, found, _ = made(tmp_path, dtype, f"train.micro_batch_size={micro}")
    assert abs(parts.loss - whole.loss) <= bound * whole.loss
    assert abs(parts.norm - whole.norm) <= bound * whole.norm
    assert found.keys() == expected.keys()
    assert {"pool.facts.values", "layers.1.peer.pool.down"} <= found.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= bound * grad.norm(), name


def test_steps_of_several_passes_are_steps_of_the_batch(tmp_path: Path) -> None:
    weights = []
    for micro in (32, 8):
        plan, run = planned(tmp_path, "train.batch_size=32", f"train.micro_batch_size={micro}", "train.clip_norm=0.1")
        stepper = Stepper(build_model(plan.model, seed=3).double().train(), plan.model, run)
        for step in range(3):
            stepper.update(stepper.backward(window(32), step=step).norm, PEAK)
        weights.append(stepper.model.state_dict())
    for name, value in weights[0].items():
        assert (weights[1][name] - value).norm() <= 1e-8 * value.norm(), name


def test_dropout_follows_from_seed_and_step_alone(tmp_path: Path) -> None:
    plan, run = planned(tmp_path, "train.dropout=0.3")
    stepper = Stepper(build_model(plan.model, seed=3).train(), plan.model, run)
    losses = {}
    for step in (0, 1, 0):
        torch.rand(step + 1)  # what was drawn before does not matter
        loss = float(stepper.backward(window(4), step=step).loss)
        stepper.skip()
        assert losses.setdefault(step, loss) == loss
    assert losses[0] != losses[1]
    stepper.model.dropout = 0.0
    assert float(stepper.backward(window(4)).loss) not in losses.values()


@pytest.mark.parametrize("passes", [4, 2])
def test_dropout_is_replayed_by_checkpointed_layers(tmp_path: Path, passes: int) -> None:
    found = []
    for checkpointing in ("false", "true"):
        plan, run = planned(
            tmp_path, "train.dropout=0.3", f"train.activation_checkpointing={checkpointing}",
            f"train.micro_batch_size={passes}",
        )  # fmt: skip
        stepper = Stepper(build_model(plan.model, seed=3).train(), plan.model, run)
        made_of = stepper.backward(window(4), step=7)
        found.append((made_of, gradients(stepper)))
    (one, grads), (other, others) = found
    assert torch.equal(one.loss, other.loss)
    for name, grad in grads.items():
        assert (others[name] - grad).norm() <= 1e-6 * grad.norm(), name


def test_bfloat16_passes_are_near_those_in_float32(tmp_path: Path) -> None:
    plan, run = planned(tmp_path, text=SMALL)
    found = []
    for precision in (None, torch.bfloat16):
        stepper = Stepper(build_model(plan.model, seed=3).train(), plan.model, run, precision=precision)
        loss, norm, _ = stepper.backward(window(4))
        found.append((float(loss), float(norm)))
        kinds = {grad.dtype for grad in gradients(stepper).values()}
        assert kinds == {torch.float32}
        stepper.update(norm, PEAK)
    (loss, norm), (low_loss, low_norm) = found
    assert low_loss != loss
    # bfloat16 keeps 8 bits: 2**-8 a rounding, some of them averaged away.
    assert low_loss == pytest.approx(loss, rel=2**-7)
    assert low_norm == pytest.approx(norm, rel=2**-4)


def schedule(path: Path, *overrides: str) -> tuple[list[float], TrainPlan]:
    _, run = planned(path, "train.steps=100", "train.warmup_steps=10", "train.final_rate=0.1", *overrides)
    return [rate_share(step, run, run.schedule) for step in range(100)], run


@pytest.mark.parametrize("name", ["linear", "cosine", "exponential", "constant", "wsd"])
def test_schedules_warm_up_and_end_where_they_say(tmp_path: Path, name: str) -> None:
    shares, _ = schedule(tmp_path, f"train.schedule={name}")
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == pytest.approx(1.0)
    assert shares[99] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(shares[10:]))


def test_an_exponential_schedule_falls_by_the_same_factor_in_each_step(tmp_path: Path) -> None:
    shares, _ = schedule(tmp_path, "train.schedule=exponential")
    factors = [b / a for a, b in pairwise(shares[10:])]
    assert factors == pytest.approx([0.1 ** (1 / 89)] * 89)


def test_wsd_stays_at_the_peak_and_falls_over_its_last_steps(tmp_path: Path) -> None:
    shares, _ = schedule(tmp_path, "train.schedule=wsd", "train.decay_steps=30")
    assert shares[9:70] == [1.0] * 61
    assert shares[70:] == pytest.approx([1 - 0.9 * (i + 1) / 30 for i in range(30)])
    by_default, run = schedule(tmp_path, "train.schedule=wsd")
    assert run.decay_steps == 20
    assert by_default[79] == 1.0
    assert by_default[80] < 1.0
    all_of_it, _ = schedule(tmp_path, "train.schedule=wsd", "train.decay_steps=100")
    assert all(a > b for a, b in pairwise(all_of_it[9:]))


def test_value_pools_have_a_schedule_and_a_decay_of_their_own(tmp_path: Path) -> None:
    plan, run = planned(
        tmp_path, "train.steps=100", "train.value_schedule=constant", "train.value_weight_decay=0.5",
        "train.value_learning_rate=0.02",
    )  # fmt: skip
    assert rate_shares(99, run) == pytest.approx({"dense": 0.01, "values": 1.0})
    stepper = Stepper(build_model(plan.model, seed=3).train(), plan.model, run)
    values = stepper.model.get_parameter("pool.facts.values")
    norm = stepper.backward(window(4)).norm
    touched = stepper.tables.touched()["pool.facts.values"]
    before = values.detach().clone()
    gradient = gradients(stepper)["pool.facts.values"] / max(1.0, float(norm) + 1e-6)
    stepper.update(norm, {"dense": 0.5, "values": 0.25})
    assert stepper.learning_rates() == {"dense": 5e-4, "values": 0.005}
    expected = before * (1 - 0.005 * 0.5) - 0.005 * gradient / (gradient.abs() + 1e-8)
    assert (values.detach() - expected)[touched].abs().max() <= 1e-6


def test_the_reads_of_every_pass_are_seen(tmp_path: Path) -> None:
    for update in ("lazy", "dense"):
        plan, run = planned(tmp_path, "train.micro_batch_size=3", f"train.value_update={update}")
        stepper = Stepper(build_model(plan.model, seed=3).train(), plan.model, run)
        seen: dict[str, int] = {}
        stepper.on_read = lambda site, record, seen=seen: seen.update(
            {site.reader: seen.get(site.reader, 0) + record.slots.numel()}
        )
        stepper.backward(window(4))
        tokens = 4 * 48
        # PEER reads two tables by the same slots.
        assert seen == {"layers.0.memory": tokens * 8, "layers.1.peer": tokens * 6 * 2, "layers.2.memory": tokens * 8}


def test_state_of_the_optimizers_goes_from_one_to_the_next(tmp_path: Path) -> None:
    """With every rule: three steps, then three more with what was kept, and the same without a break."""
    for rule in ("lazy", "lazy_row_step", "catch_up", "dense"):
        plan, run = planned(tmp_path, f"train.value_update={rule}", "pool.facts.num_sub_keys=12")
        stepper = Stepper(build_model(plan.model, seed=3).train(), plan.model, run)
        for step in range(3):
            stepper.update(stepper.backward(window(4, 49 - 0), step=step).norm, PEAK)
        weights = {name: p.detach().clone() for name, p in stepper.model.named_parameters()}
        tensors, numbers = stepper.state()
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        other = Stepper(build_model(plan.model, seed=9).train(), plan.model, run)
        other.model.load_state_dict(weights)
        other.load_state(kept, dict(numbers))
        for each in (stepper, other):
            for step in range(3, 6):
                each.update(each.backward(window(4), step=step).norm, PEAK)
        for (name, one), two in zip(stepper.model.named_parameters(), other.model.parameters(), strict=True):
            assert torch.equal(one, two), (rule, name)


def test_observed_figures_are_what_they_say(tmp_path: Path) -> None:
    plan, run = planned(tmp_path, text=SMALL)
    model = build_model(plan.model, seed=3).train()
    seen = {}
    memory = model.layers[0].memory
    memory.register_forward_hook(lambda module, args, out: seen.update(y=out[0].detach()))
    model.layers[0].block_norm.register_forward_hook(lambda module, args, out: seen.update(x=args[0].detach()))
    model.layers[3].moe.router.register_forward_hook(lambda module, args, out: seen.update(router=out.detach()))
    observed = Stepper(model, plan.model, run).backward(window(4)).observed
    assert float(observed["layers.0.memory.read_norm"]) == pytest.approx(float(seen["y"].norm() / seen["x"].norm()))
    chosen = seen["router"].topk(2).indices.flatten().bincount(minlength=4)
    assert observed["layers.3.moe.load"].tolist() == pytest.approx((chosen / chosen.sum()).tolist())


def test_layers_of_experts_share_what_is_compiled_for_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More layers than torch compiles one function for; layers that read pools are left eager."""
    how = {"fullgraph": True, "dynamic": False, "backend": "eager"}
    monkeypatch.setattr("memforge.training.execution.COMPILED", how)
    layers = torch._dynamo.config.recompile_limit + 2
    plan, run = planned(
        tmp_path, f"model.num_layers={layers}", f"place.1.layers={[*range(2, layers)]}", "train.compile=on", text=SMALL
    )
    model = build_model(plan.model, seed=3)
    forward = compiled(model, run, print, ranks=2)
    found = forward(window(2, 48), [Recorder] * layers)
    eager = model.forward_taped(window(2, 48))
    assert found.observed.keys() == eager.observed.keys() >= {f"layers.{idx}.moe.load" for idx in range(3, layers)}


def test_more_shapes_than_torch_compiles_for_are_a_failure_of_the_compiler() -> None:
    compute = torch.compile(lambda x: x + 1, backend="eager", fullgraph=True, dynamic=False)
    *few, one_more = (torch.zeros(size + 2) for size in range(torch._dynamo.config.recompile_limit + 1))
    for x in few:
        compute(x)
    with pytest.raises(compiler_error()):
        compute(one_more)


def test_a_hidden_nan_is_in_the_norm(tmp_path: Path) -> None:
    plan, run = planned(tmp_path)
    stepper = Stepper(build_model(plan.model, seed=3).train(), plan.model, run)
    with torch.no_grad():
        stepper.model.get_parameter("pool.facts.values").fill_(math.nan)
    assert not math.isfinite(float(stepper.backward(window(4)).norm))


class Searches(TorchDispatchMode):
    """Counts searches for slots."""

    def __init__(self) -> None:
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func == torch.ops.memforge.product_key_topk.default
        return func(*args, **(kwargs or {}))


def test_a_layer_that_runs_again_does_not_search_again(tmp_path: Path) -> None:
    made = []
    for checkpointing in ("false", "true"):
        plan, run = planned(tmp_path, f"train.activation_checkpointing={checkpointing}")
        stepper = Stepper(build_model(plan.model, seed=3).train(), plan.model, run)
        stepper.sites(4)  # finds the reads on meta
        with Searches() as searches:
            stepper.backward(window(4))
        made.append(searches.made)
    assert made == [3, 3]
