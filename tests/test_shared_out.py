"""Readers of tables that are shared out among ranks against one that has all of them, and the bytes they send."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write
from made_ranks import on_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from memforge.errors import SpecError
from memforge.mesh import Mesh, PoolReads, Split, part_of_pool, sizes
from memforge.pieces import Piece
from memforge.plan import ModelPlan, ParamRow, make_plan, split_of
from memforge.spec import load_spec
from memforge.training.ranks import Ranks
from memforge.training.stored import Stored, own_parts, own_tensors, part_of
from memforge.training.telemetry import update_figures
from memforge_kernels import Reader, Recorder, Tape, expert_lookup

RANKS, SLOTS, WIDTH, K = 3, 20, 7, 4
TOKENS = {"even": (4, 4, 4), "uneven": (3, 0, 5), "one": (0, 0, 1), "none": (0, 0, 0)}
INNER = {"reader": Reader, "recorder": Recorder, "tape": Tape}


def random_slots(n: int) -> Tensor:
    """With several reads of one row in a bag: 4 of 20, by chance."""
    return torch.randint(SLOTS, (n, K))


def slots_of_one_rank(n: int) -> Tensor:
    return 1 + RANKS * torch.randint(SLOTS // RANKS, (n, K))


def repeated_slots(n: int) -> Tensor:
    return torch.randint(SLOTS, (n, 1)).expand(n, K).contiguous()


def read(kind: str, reader: Reader, x: Tensor, tables: Sequence[Tensor], slots: Tensor, weights: Tensor) -> Tensor:
    """What a memory or a PEER block does with its slots."""
    reader.announce(slots, SLOTS)
    if kind == "memory":
        return reader.weighted_gather(tables[0], slots, weights)
    return expert_lookup(x, tables[0], tables[1], slots, weights, reader=reader)


def gradient_of(table: Tensor, idx: int, reader: Reader) -> Tensor:
    """Of a table, dense, as autograd or the records have it."""
    if table.grad is not None:
        return table.grad
    read = reader.records[idx].read()
    assert read is not None
    rows = (read.weights[:, :, None] * read.rows[:, None]).reshape(-1, table.shape[1])
    return torch.zeros_like(table).index_add_(0, read.slots.reshape(-1), rows)


def differences(kind: str, split: Split, inner: str, counts: Sequence[int], chosen: Any, *, again: bool) -> list[float]:
    """Of what a rank reads and of all gradients, relative to what one reader of whole tables finds."""
    import torch.distributed as dist

    from memforge_kernels.shared_out import PartReader

    torch.manual_seed(5)
    rank, total = dist.get_rank(), sum(counts)
    group = memory_group()
    whole = [torch.randn(SLOTS, WIDTH, dtype=torch.float64) for _ in range(2 if kind == "peer" else 1)]
    slots, weights = chosen(total), torch.randn(total, K, dtype=torch.float64)
    x, sent_back = torch.randn(2, total, WIDTH, dtype=torch.float64)

    leaves = [t.clone().requires_grad_() for t in (x, weights, *whole)]
    expected = read(kind, Reader(), leaves[0], leaves[2:], slots, leaves[1])
    expected.backward(sent_back)

    piece = part_of_pool((SLOTS, WIDTH), Mesh(memory=RANKS), rank, split)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    mine = [t[own].clone().requires_grad_() for t in (x, weights)]
    tables = [part_of(t, piece).clone().requires_grad_() for t in whole]
    for table in tables:
        group.share_out(table, split, (SLOTS, WIDTH))
    readers: list[Reader] = []

    def run(x: Tensor, weights: Tensor) -> Tensor:
        readers.append(PartReader(INNER[inner](), group))
        return read(kind, readers[-1], x, tables, slots[own], weights)

    with group.tokens(counts):
        found = checkpoint(run, *mine, use_reentrant=False) if again else run(*mine)
        found.backward(sent_back[own])
    errors = [_error(found, expected[own])]
    errors += [_error(m.grad, e.grad[own]) for m, e in zip(mine, leaves, strict=False) if e.grad is not None]
    for idx, (table, e) in enumerate(zip(tables, leaves[2:], strict=True)):
        errors.append(_error(gradient_of(table, idx, readers[0]), part_of(e.grad, piece)))
    for record in readers[0].records:
        assert torch.equal(record.slots, slots[own])
        if inner == "tape" and split == "rows":
            assert set(record.served.slots.flatten().tolist()) == {
                s // RANKS for s in slots[slots % RANKS == rank].tolist()
            }
    assert len(readers) == 1 + again
    return errors


def memory_group() -> Any:
    import torch.distributed as dist

    from memforge_kernels.shared_out import MemoryGroup

    return MemoryGroup(dist.group.WORLD, partial(sizes, parts=RANKS))


def _error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300)) if expected.numel() else 0.0


def not_a_number(split: Split) -> list[bool]:
    """A query that is not a number chooses the first slots, by weights that are none: of its token all is lost, of
    the others nothing.
    """
    import torch.distributed as dist

    from memforge_kernels.shared_out import PartReader

    group = memory_group()
    torch.manual_seed(5)
    piece = part_of_pool((SLOTS, WIDTH), Mesh(memory=RANKS), dist.get_rank(), split)
    table = part_of(torch.randn(SLOTS, WIDTH), piece).clone()
    group.share_out(table, split, (SLOTS, WIDTH))
    slots, weights = torch.arange(K).repeat(2, 1), torch.ones(2, K, requires_grad=True)
    given = weights * torch.tensor([[1.0], [torch.nan if dist.get_rank() == 1 else 1.0]])
    reader = PartReader(Tape(), group)
    found = reader.weighted_gather(table, slots, given)
    found.nan_to_num().sum().backward()
    lost = found.isnan()
    return [bool(lost[0].any()), bool(lost[1].any()), bool(lost[1].all())]


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends others."""

    def __init__(self, ranks: int, rank: int) -> None:
        super().__init__()
        self.ranks, self.rank, self.bytes = ranks, rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, others = func.name(), self.ranks - 1
        if "all_gather" in name:
            self.bytes += args[0].nbytes * others
        elif "reduce_scatter" in name:
            self.bytes += args[0].nbytes // self.ranks * others
        elif "all_to_all" in name:
            row = args[0].nbytes // max(1, len(args[0]))
            self.bytes += sum(size for rank, size in enumerate(args[2]) if rank != self.rank) * row
        else:
            assert "c10d" not in name or "wait" in name or "wrap" in name, name
        return func(*args, **(kwargs or {}))


def sent(kind: str, split: Split, k: int) -> int:
    """Bytes that all ranks send for two tokens each, whose slots are shared out evenly."""
    import torch.distributed as dist

    from memforge_kernels.shared_out import PartReader

    group = memory_group()
    piece = part_of_pool((SLOTS, WIDTH), Mesh(memory=RANKS), dist.get_rank(), split)
    tables = [torch.zeros(piece.shape((SLOTS, WIDTH))) for _ in range(2 if kind == "peer" else 1)]
    for table in tables:
        group.share_out(table, split, (SLOTS, WIDTH))
    slots = torch.arange(k).repeat(2, 1) % (SLOTS // RANKS * RANKS)
    x, weights = torch.ones(2, WIDTH, requires_grad=True), torch.ones(2, k, requires_grad=True)
    with Sent(RANKS, dist.get_rank()) as counted:
        read(kind, PartReader(Tape(), group), x, tables, slots, weights).sum().backward()
    total = torch.tensor(counted.bytes)
    dist.all_reduce(total)
    return int(total)


def on_this_rank() -> dict[str, Any]:
    import torch.distributed as dist

    from memforge_kernels.shared_out import gloo

    dist.init_process_group(gloo())
    found: dict[str, Any] = {"nan": {split: not_a_number(split) for split in ("columns", "rows")}, "errors": {}}
    for name, arguments in cases():
        found["errors"][name] = max(differences(*arguments[:-1], again=arguments[-1]))
    found["sent"] = {f"{kind} {split} {k}": sent(kind, split, k) for kind, split, k in SENT}
    dist.destroy_process_group()
    return found


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for split in ("columns", "rows"):
        for kind in ("memory", "peer"):
            for inner in INNER:
                for again in (False, True):
                    for name, counts in TOKENS.items():
                        yield (
                            f"{split} {kind} {inner} {name} {again}",
                            (kind, split, inner, counts, random_slots, again),
                        )
            for chosen in (slots_of_one_rank, repeated_slots):
                yield f"{split} {kind} {chosen.__name__}", (kind, split, "tape", TOKENS["uneven"], chosen, False)


SENT = [(kind, split, k) for kind in ("memory", "peer") for split in ("columns", "rows") for k in (6, 258)]


def test_shared_out_tables_are_read_as_whole_ones() -> None:
    for rank, found in enumerate(on_ranks(RANKS, "test_shared_out:on_this_rank")):
        assert len(found["errors"]) == len(list(cases()))
        for case, error in found["errors"].items():
            assert error <= 1e-14, (rank, case, error)
        for split, seen in found["nan"].items():
            assert seen == [False, rank == 1, rank == 1], (rank, split)
        for kind, split, k in SENT:
            reads = PoolReads(SLOTS, (WIDTH,) * (2 if kind == "peer" else 1), (k,))
            assert found["sent"][f"{kind} {split} {k}"] == 2 * reads.group_bytes(split, RANKS), (kind, split, k)


def test_auto_shares_out_a_pool_in_the_way_that_moves_fewer_bytes() -> None:
    def auto(width: int, *reads: int, tables: int = 1, ranks: int = 2, slots: int = 2**20) -> str:
        return PoolReads(slots, (width,) * tables, reads).split("auto", ranks)

    # v < 1.5k - M / 8(M - 1) of values, 1.25k - M / 16(M - 1) of experts
    assert [auto(width, 64) for width in (64, 95, 96, 1024)] == ["rows", "rows", "columns", "columns"]
    assert [auto(width, 64, tables=2) for width in (64, 79, 80)] == ["rows", "rows", "columns"]
    # Readers are decided by together, and a tie goes to columns.
    assert [auto(64, *reads) for reads in ((64, 24), (64, 16), (64,), (16,))] == [
        "rows",
        "columns",
        "rows",
        "columns",
    ]
    # What is not possible is not chosen.
    assert auto(64, 64, ranks=65, slots=64) == auto(64, 64, slots=1) == "columns"
    assert auto(8, 4, ranks=16) == "rows"
    assert PoolReads(2**20, (1024,), (4,)).split("rows", 2) == "rows"


SPEC = """
[model]
name = "shared"
dim = 32
num_layers = 3
vocab_size = 64
max_seq_len = 16

[attention]
num_heads = 2

[ffn]
hidden_dim = 16

[pool.narrow]
num_sub_keys = 8
value_dim = 8

[[place]]
layers = [0, 1]
block = { kind = "memory", pool = "narrow", num_heads = 2, top_k = 8, key_dim = 8 }

[[place]]
layers = [2]
block = { kind = "peer", num_sub_keys = 3, num_heads = 1, top_k = 2, key_dim = 8 }
"""


def planned(path: Path) -> ModelPlan:
    return make_plan(load_spec(write(path / "shared.toml", SPEC))).model


def test_a_plan_says_how_each_of_its_pools_is_shared_out(tmp_path: Path) -> None:
    plan, mesh = planned(tmp_path), Mesh(memory=4)
    assert split_of(plan, "auto", mesh) == {"pool.narrow": "rows", "layers.2.peer.pool": "columns"}
    assert set(split_of(plan, "rows", mesh).values()) == {"rows"}
    assert set(split_of(plan, "columns", mesh).values()) == {"columns"}


@pytest.mark.parametrize(
    ("memory", "pools", "message"),
    [
        (9, "auto", None),
        (8, "columns", None),
        (9, "columns", "memory = 9 is more than the 8 columns of a pool"),
        (10, "rows", "memory = 10 is more than the 9 rows of a pool"),
        (33, "auto", "memory = 33 is more than the 32 columns and the 9 rows of a pool"),
    ],
)
def test_more_ranks_than_a_pool_has_parts_are_refused(
    tmp_path: Path, memory: int, pools: str, message: str | None
) -> None:
    file = write(tmp_path / "shared.toml", f'{SPEC}\n[parallel]\nmemory = {memory}\npools = "{pools}"\n')
    if message is None:
        assert make_plan(load_spec(file)).run.parallel.pools == pools
        return
    with pytest.raises(SpecError, match=message):
        load_spec(file)


def test_ranks_tell_each_other_of_updates_whether_or_not_they_made_any() -> None:
    """Otherwise those that have read none of their rows would not take part in the sum."""
    asked = []

    class OfTwo(Ranks):
        def total_of_group(self, x: Tensor) -> Tensor:
            asked.append(x)
            return x + torch.tensor([1.0, 4.0, 0.0, 8.0])

    tables, touched = {"t": torch.ones(4, 8)}, {"t": torch.empty(0, dtype=torch.int64)}
    assert update_figures(tables, touched, lambda: None, OfTwo()) == {"t.moved": 0.5}
    assert len(asked) == 1
    assert update_figures(tables, touched, lambda: None) == {}


class OneOf(Ranks):
    """A rank that has its part of pools, and all of the rest."""

    def __init__(self, rank: int, memory: int, split: Split) -> None:
        self.rank, self.mesh, self.pools = rank, Mesh(memory=memory), split

    def piece(self, row: ParamRow) -> Piece | None:
        return part_of_pool(row.shape, self.mesh, self.rank, self.pools) if row.group == "values" else None


@pytest.mark.parametrize("split", ["columns", "rows"])
def test_parts_that_were_stored_are_read_as_any_others(tmp_path: Path, split: Split) -> None:
    plan = planned(tmp_path)
    pools = [row for row in plan.params if row.group == "values"]
    whole = {row.path: torch.randn(row.shape) for row in pools}
    whole |= {f"{row.path}.exp_avg": torch.randn(row.shape) for row in pools}
    whole |= {f"{row.path}.last": torch.arange(row.shape[0], dtype=torch.int32) for row in pools}
    # As long as a table has rows, after so many steps.
    whole |= {f"{row.path}.missed": torch.randn(row.shape[0], dtype=torch.float64) for row in pools}

    def part(name: str, rank: Ranks) -> Tensor:
        row = next(row for row in pools if name.startswith(row.path))
        piece = rank.piece(row)
        per_row = name.endswith(".last")
        is_part = piece is not None and not name.endswith(".missed") and not (per_row and piece.dim == 1)
        return part_of(whole[name], piece) if is_part else whole[name]

    cuts, files = {}, []
    for rank in range(5):
        ranks = OneOf(rank, 5, split)
        found, cuts[f"{rank}.safetensors"] = own_parts({name: part(name, ranks) for name in whole}, plan, ranks)
        files.append(tmp_path / f"{rank}.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, files[-1])
    stored = Stored(files, cuts)
    for memory in (1, 2, 3, 5, 8):
        for other in ("columns", "rows"):
            for rank in range(memory):
                ranks = OneOf(rank, memory, other)
                for name, tensor in own_tensors(stored, plan, ranks).items():
                    assert torch.equal(tensor, part(name, ranks)), (name, memory, other)


def test_files_without_what_is_wanted_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cuts, opened = torch.randn(6, 8), {}, []
    for part in range(4):
        save_file({"a": whole[:, 2 * part : 2 * part + 2].contiguous()}, tmp_path / f"{part}.safetensors")
        cuts[f"{part}.safetensors"] = {"a": [1, 2 * part, 2, 1, 8]}
    stored = Stored([tmp_path / name for name in cuts], cuts)

    def counted(path: Path, **given: Any) -> Any:
        opened.append(path.stem)
        return safe_open(path, **given)

    monkeypatch.setattr("memforge.training.stored.safe_open", counted)
    assert stored.shape("a") == (6, 8)
    assert torch.equal(stored.read("a", Piece(1, 4, 3)), whole[:, 4:7])
    assert opened == ["0", "2", "3"]  # the first for the type
    assert torch.equal(stored.read("a", Piece(0, 2, 3)), whole[2:5])
    assert stored.read("a", Piece(1, 8, 0)).shape == (6, 0)
