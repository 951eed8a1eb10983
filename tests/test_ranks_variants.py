"""What else a step can be, on several ranks and on one: without sequences, run again, dropped out, not finite."""

import math
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from made_ranks import on_ranks
from test_ranks import Case, planned, require_equal, windows

from memforge.mesh import Mesh
from memforge.plan import plan_from_json


def test_ranks_without_sequences_and_layers_that_run_again(tmp_path: Path) -> None:
    """Two sequences on four ranks; pass by pass, of which the second has one sequence; pools updated as a whole."""
    two = planned(tmp_path, "train.batch_size=2", "train.value_update=catch_up")
    again = planned(tmp_path, "train.micro_batch_size=1", "train.activation_checkpointing=true")
    whole = planned(tmp_path, "train.value_update=dense", "model.tie_embeddings=true")
    meshes = [Mesh(4, 1, 1), Mesh(1, 2, 2), Mesh(1, 1, 4)]
    require_equal(*(Case(plan, meshes, "columns", steps=2) for plan in (two, again, whole)))


def test_dropout_and_plain_descent_on_two_ranks(tmp_path: Path) -> None:
    """Two ranks draw what one does in two passes; and pools by gradient descent, without clipping."""
    dropped = planned(tmp_path, "train.dropout=0.3", "train.batch_size=4", "train.micro_batch_size=2")
    sgd = planned(tmp_path, "train.value_optimizer=sgd", "train.clip_norm=none")
    meshes = [Mesh(2, 1, 1), Mesh(1, 2, 1), Mesh(1, 1, 2)]
    require_equal(*(Case(plan, meshes, "columns", steps=4) for plan in (dropped, sgd)))


def groups_of_a_rank() -> list[tuple[float, int]]:
    """For how many minutes each group of a rank waits, and how many threads work for it."""
    from memforge.training.distributed import joined

    with joined(Mesh(2, 1, 2), "cpu", 0, 7) as ranks:
        groups = [*ranks.dense.get_all_groups(), ranks.memory.group, ranks.copies.group, ranks.control]
        groups += [ranks.beside().control, ranks.patient().beside().control, torch.distributed.group.WORLD]
        found = [group._get_backend(torch.device("cpu")).options for group in groups]
        return [(options._timeout.total_seconds() / 60, options._threads) for options in found]


def test_every_group_waits_as_long_as_it_was_told_to_and_has_one_thread() -> None:
    assert on_ranks(4, "test_ranks_variants:groups_of_a_rank") == [[[7.0, 1]] * 8] * 4


def through_no_interface() -> str:
    """What a rank says that is to talk through an interface which the machine does not have."""
    from memforge.errors import DeviceError
    from memforge.training.distributed import joined

    os.environ["GLOO_SOCKET_IFNAME"] = "nosuch"
    try:
        with joined(Mesh(), "cpu", 0, 1):
            return "nothing"
    except DeviceError as error:
        return str(error)


def test_ranks_talk_through_the_interface_that_they_are_told() -> None:
    (said,) = on_ranks(1, "test_ranks_variants:through_no_interface")
    assert "has not found the others" in said
    assert "nosuch" in said


def slowly() -> list[str]:
    """What each rank makes, of which the first takes longer than ranks wait for one another."""
    import torch.distributed as dist

    from memforge.training.distributed import ProcessRanks
    from memforge_kernels.shared_out import gloo

    dist.init_process_group(gloo())
    ranks = ProcessRanks(Mesh(dp_shard=2), "cpu", wait=timedelta(seconds=1), local_rank=dist.get_rank())
    patient = ranks.patient()

    def make() -> str:
        time.sleep(0 if ranks.rank else 2)
        return f"made by {ranks.rank}"

    found = [patient.one_after_the_other(make), patient.first(make)]
    dist.destroy_process_group()
    return found


def test_what_a_rank_does_alone_at_the_start_may_take_longer() -> None:
    first, other = on_ranks(2, "test_ranks_variants:slowly")
    assert (first, other) == (["made by 0", "made by 0"], ["made by 1", "made by 0"])


def poisoned(plan_json: str, axes: list[int]) -> list[bool]:
    """Whether loss and norm are finite, on a rank, when the last rank alone has a NaN in its last layer."""
    import torch.distributed as dist

    from memforge.training.distributed import ProcessRanks
    from memforge.training.optimizer import Stepper
    from memforge_kernels.shared_out import gloo

    dist.init_process_group(gloo())
    plan = plan_from_json(plan_json, "the test")
    run = plan.run.train
    assert run is not None
    ranks = ProcessRanks(Mesh(*axes), "cpu")
    model = ranks.build(plan.model, seed=3).train()
    if ranks.rank == ranks.size - 1:
        model.layers[-1].register_forward_hook(lambda module, args, out: (out[0] * math.nan, *out[1:]))
    stepper = Stepper(model, plan.model, run, ranks=ranks)
    parts = [sum(passes) for passes in ranks.split(run.batch_size, run.micro_batch_size)]
    first = sum(parts[: ranks.rank])
    found = stepper.backward(windows(plan, 0)[first : first + parts[ranks.rank]])
    dist.destroy_process_group()
    return [bool(torch.isfinite(found.loss)), bool(torch.isfinite(found.norm))]


def test_a_number_that_is_none_on_one_rank_is_seen_by_all(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    for mesh in (Mesh(2, 1, 1), Mesh(1, 1, 2)):
        axes = [mesh.dp_replicate, mesh.dp_shard, mesh.memory]
        assert on_ranks(2, "test_ranks_variants:poisoned", plan.to_json(), axes) == [[False, False]] * 2
