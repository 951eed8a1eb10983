"""Several ranks against one: the same losses, gradients, weights and rows on every mesh of at most four."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import write
from made_ranks import on_ranks
from torch import Tensor

from memforge.mesh import Mesh, SplitChoice
from memforge.plan import Plan, make_plan
from memforge.spec import load_spec
from memforge.training.optimizer import Stepper
from memforge.training.ranks import Ranks
from memforge.training.schedule import rate_shares

STEPS = 20
# A pool of 20 columns that two layers share, one of 52 that a layer has for itself, and experts of 52: neither divides
# over 3 ranks, nor do 2 heads, 7 sub-keys or 5 sequences.
SPEC = """
[model]
name = "ranks"
dim = 52
num_layers = 4
vocab_size = 263
max_seq_len = 12

[attention]
num_heads = 2

[ffn]
hidden_dim = 33
activation = "swiglu"

[pool.facts]
num_sub_keys = 11
value_dim = 20

[[place]]
layers = [0, 2]
block = { kind = "memory", pool = "facts", num_heads = 2, top_k = 3, key_dim = 14, gate = "swilu", qk_norm = true }

[[place]]
layers = [1]
block = { kind = "memory", num_sub_keys = 7, num_heads = 1, top_k = 4, key_dim = 6, gate = "sigmoid" }

[[place]]
layers = [3]
block = { kind = "peer", num_sub_keys = 9, num_heads = 2, top_k = 3, key_dim = 10 }

[data]
kind = "facts"
num_facts = 64

[train]
steps = 20
batch_size = 5
seq_len = 12
learning_rate = 3e-3
value_learning_rate = 1e-2
warmup_steps = 3
clip_norm = 0.5
"""
MESHES = {
    2: [Mesh(2, 1, 1), Mesh(1, 2, 1), Mesh(1, 1, 2)],
    3: [Mesh(3, 1, 1), Mesh(1, 3, 1), Mesh(1, 1, 3)],
    4: [Mesh(4, 1, 1), Mesh(1, 4, 1), Mesh(1, 1, 4), Mesh(2, 2, 1), Mesh(2, 1, 2), Mesh(1, 2, 2)],
}


def planned(path: Path, *overrides: str) -> Plan:
    return make_plan(load_spec(write(path / "ranks.toml", SPEC), overrides=overrides))


def windows(plan: Plan, step: int) -> Tensor:
    run = plan.run.train
    assert run is not None
    generator = torch.Generator().manual_seed(step)
    return torch.randint(plan.model.vocab_size, (run.batch_size, run.seq_len + 1), generator=generator)


def trained(plan: Plan, ranks: Ranks, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Losses and norms of so many steps, the state after them by name, and gradients before the last update."""
    run = plan.run.train
    assert run is not None
    model = ranks.build(plan.model, seed=3).to(dtype).train()
    ranks.connect(model, plan.model)  # to what the conversion has made of the pools
    stepper = Stepper(model, plan.model, run, ranks=ranks)
    parts = ranks.split(run.batch_size, run.micro_batch_size)
    first = sum(map(sum, parts[: ranks.rank]))
    own = slice(first, first + sum(parts[ranks.rank]))
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        found = stepper.backward(windows(plan, step)[own], step=step)
        losses.append(float(found.loss))
        norms.append(float(found.norm))
        gradients = {name: ranks.local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        stepper.update(found.norm, rate_shares(step, run))
    weights = {name: ranks.local(p.detach()) for name, p in model.named_parameters()}
    kept = {name: ranks.local(value) for name, value in stepper.state()[0].items()}
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights, "state": kept}


def part(whole: Tensor, name: str, plan: Plan, ranks: Ranks) -> Tensor:
    """What a rank has of a parameter, or of a moment of it."""
    row = next(row for row in plan.model.params if name == row.path or name.startswith(f"{row.path}."))
    piece, shape = ranks.piece(row), row.shape[:1] if name.endswith(".last") else row.shape
    if piece is None or whole.shape != shape or piece.dim == len(shape):
        return whole
    return whole.index_select(piece.dim, torch.tensor(piece.indices, dtype=torch.int64))


def against_one(cases: list[tuple[str, list[list[int]], SplitChoice, int]]) -> list[dict[str, Any]]:
    """Of each case, a plan on some meshes for so many steps, the greatest differences of this rank's parts from those
    of one rank, for each mesh and type of numbers.
    """
    import torch.distributed as dist

    from memforge.plan import plan_from_json
    from memforge_kernels.shared_out import gloo

    dist.init_process_group(gloo())
    found = [_against_one(plan_from_json(plan_json, "the test"), *rest) for plan_json, *rest in cases]
    dist.destroy_process_group()
    return found


def _against_one(plan: Plan, meshes: list[list[int]], pools: SplitChoice, steps: int) -> dict[str, Any]:
    import torch.distributed as dist

    from memforge.training.distributed import ProcessRanks

    found: dict[str, Any] = {}
    for dtype, length in ((torch.float64, steps), (torch.float32, 1)):
        expected = trained(plan, Ranks(), dtype, length)
        start = trained(plan, Ranks(), dtype, 0)["weights"]
        for axes in meshes:
            ranks = ProcessRanks(Mesh(*axes), "cpu", pools=pools)
            here = trained(plan, ranks, dtype, length)
            errors = {
                kind: max(abs(a / b - 1) for a, b in zip(here[kind], expected[kind], strict=True))
                for kind in ("losses", "norms")
            }
            rows_differ = 0
            for kind in ("gradients", "weights", "state"):
                squares, sizes = torch.zeros(2, len(expected[kind]), dtype=torch.float64)
                assert here[kind].keys() == expected[kind].keys()
                for i, (name, whole) in enumerate(sorted(expected[kind].items())):
                    mine, theirs = here[kind][name], part(whole, name, plan, ranks)
                    assert mine.shape == theirs.shape, name
                    squares[i] = (mine - theirs).double().square().sum()
                    sizes[i] = theirs.double().square().sum()
                    if kind == "weights" and name.split(".")[-1] in ("values", "up", "down"):
                        before = part(start[name], name, plan, ranks)
                        rows_differ += int(((mine != before).any(1) != (theirs != before).any(1)).sum())
                both = torch.stack((squares, sizes))
                dist.all_reduce(both)
                errors[kind] = float((both[0].sqrt() / both[1].sqrt().clamp(min=1e-300)).max())
            bits = trained(plan, ranks, dtype, 0)["weights"]
            errors["start"] = float(
                any(not torch.equal(bits[name], part(whole, name, plan, ranks)) for name, whole in start.items())
            )
            errors["rows"] = float(rows_differ)
            found[f"{Mesh(*axes)} {dtype}"] = errors
    return found


class Case(NamedTuple):
    """A plan to be trained on meshes of one size; `single` bounds the errors of a first step in fp32."""

    plan: Plan
    meshes: Sequence[Mesh]
    pools: SplitChoice
    steps: int = STEPS
    single: float = 1e-5


def require_equal(*cases: Case) -> None:
    """Ranks train as one rank does."""
    given = []
    for case in cases:
        axes = [[mesh.dp_replicate, mesh.dp_shard, mesh.memory] for mesh in case.meshes]
        given.append([case.plan.to_json(), axes, case.pools, case.steps])
    for of_rank in on_ranks(cases[0].meshes[0].ranks, "test_ranks:against_one", given):
        for case, of_case in zip(cases, of_rank, strict=True):
            assert len(of_case) == 2 * len(case.meshes)
            for mesh, errors in of_case.items():
                assert errors["start"] == errors["rows"] == 0, (mesh, errors)
                exact = mesh.endswith("float64")
                for kind, error in errors.items():
                    if exact or kind in ("losses", "norms", "gradients"):
                        assert error <= (1e-10 if exact else case.single), (mesh, kind, error)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_every_mesh_trains_as_one_rank_does(tmp_path: Path, world: int) -> None:
    require_equal(Case(planned(tmp_path), MESHES[world], "columns"))


def test_meshes_of_four_and_three_make_the_first_steps_as_one_rank_does(tmp_path: Path) -> None:
    for world in (3, 4):
        require_equal(Case(planned(tmp_path), MESHES[world], "columns", steps=3))
