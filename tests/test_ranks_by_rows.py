"""Pools shared out by rows: ranks train as one does, whatever falls on which of them."""

from pathlib import Path

from test_ranks import Case, planned, require_equal

from memforge.mesh import Mesh
from memforge.plan import Plan


def trained_with(path: Path, *keys: str) -> Plan:
    return planned(path, *(f"train.{key}" for key in keys))


def test_two_ranks_train_as_one_does_by_rows_and_as_a_whole(tmp_path: Path) -> None:
    dense = trained_with(tmp_path, "value_update=dense", "activation_checkpointing=true")
    meshes = [Mesh(memory=2)]
    require_equal(Case(planned(tmp_path), meshes, "rows", steps=10), Case(dense, meshes, "rows", steps=2))


def test_layers_that_run_again_ask_again(tmp_path: Path) -> None:
    plan = trained_with(tmp_path, "value_update=lazy_row_step", "activation_checkpointing=true", "micro_batch_size=2")
    require_equal(Case(plan, [Mesh(memory=3)], "rows", steps=4))


def test_copies_and_ranks_without_tokens_or_rows_make_the_same_step(tmp_path: Path) -> None:
    # Five sequences one by one: in the second pass one rank has tokens.
    uneven = trained_with(tmp_path, "value_update=catch_up", "micro_batch_size=1")
    # Few tokens, so that bags of copies differ in length, and fewer, so that steps leave a rank without a row that is
    # read. Few gradients are large beside their error.
    keys = ("seq_len=2", "value_update=catch_up", "value_weight_decay=0.1")
    few, fewer = (trained_with(tmp_path, f"batch_size={size}", *keys) for size in (2, 1))
    require_equal(
        Case(uneven, [Mesh(2, 1, 2), Mesh(1, 2, 2), Mesh(1, 1, 4)], "rows", steps=3),
        Case(few, [Mesh(2, 1, 2)], "rows", steps=4, single=1e-4),
        Case(fewer, [Mesh(1, 1, 4)], "rows", steps=12, single=1e-4),
    )
