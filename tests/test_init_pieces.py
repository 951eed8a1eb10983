"""A rank draws only its own elements, and they are those of the whole tensor, bit for bit."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from memforge.blocks.base import Init
from memforge.nn import init as nn_init
from memforge.nn.init import draws, fill
from memforge.nn.philox import raw_draws
from memforge.pieces import Piece, Runs

INITS = [
    Init(kind="constant", scale=0.3),
    Init(kind="uniform", scale=0.3),
    Init(kind="normal", scale=0.3),
    Init(kind="sphere", scale=0.3, width=12),
    Init(kind="sphere", scale=0.3, width=4),
]
NORMAL = INITS[2]
SHAPES = [(24,), (7, 12), (3, 5, 12), (2, 3, 2, 12)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
WORD = st.integers(0, 2**64 - 1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def numpy_raw(key: int, first: int, count: int) -> np.ndarray:
    generator = np.random.Philox(key=key)
    generator.advance(first // 4)
    return generator.random_raw(first % 4 + count)[first % 4 :]


def whole(init: Init, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    parameter = torch.empty(shape, dtype=dtype)
    fill(parameter, init, 3, "x")
    return parameter


def part(init: Init, piece: Piece, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    parameter = torch.full(piece.shape(shape), torch.nan, dtype=dtype)
    fill(parameter, init, 3, "x", shape=shape, piece=piece)
    return parameter


def cut(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor.index_select(piece.dim, torch.tensor(list(piece.indices), dtype=torch.int64))


def pieces(dim: int, size: int) -> Iterator[Piece]:
    """Every start and step, with none, one, half and all of the indices that there are."""
    for step in range(1, size + 2):
        for start in range(size):
            longest = len(range(start, size, step))
            yield from (Piece(dim, start, length, step) for length in {0, 1, longest // 2, longest})


@settings(max_examples=300, deadline=None)
@given(
    words=st.tuples(WORD, WORD),
    first=st.one_of(st.integers(0, 40), st.integers(2**40, 2**62)),
    stride=st.one_of(st.integers(0, 40), st.integers(2**31, 2**40)),
    num_runs=st.integers(1, 5),
    run_length=st.integers(1, 9),
    group_stride=st.one_of(st.integers(0, 200), st.integers(2**31, 2**50)),
    start=st.integers(0, 60),
    count=st.integers(0, 60),
)
@example((2**64 - 1, 2**64 - 1), 2**62 + 3, 2**32 - 1, 5, 9, 2**33 + 1, 7, 60)
def test_runs_are_the_draws_of_numpy(
    words: tuple[int, int],
    first: int,
    stride: int,
    num_runs: int,
    run_length: int,
    group_stride: int,
    start: int,
    count: int,
) -> None:
    key = words[0] + (words[1] << 64)
    groups = -(-(start + count) // (num_runs * run_length))
    starts = [first + g * group_stride + i * stride for g in range(groups) for i in range(num_runs)]
    expected = np.concatenate([np.empty(0, np.uint64), *(numpy_raw(key, at, run_length) for at in starts)])
    runs = Runs(first, stride, num_runs, run_length, group_stride)
    assert np.array_equal(raw_draws(key, runs, start, count), expected[start : start + count])


@pytest.mark.parametrize("run_length", [1, 3, 4, 17, 1000, 20_000])
def test_threads_share_out_runs_of_any_length(run_length: int, two_threads: None) -> None:
    stride, count = run_length + 5, 20_000
    expected = numpy_raw(9, 3, -(-count // run_length) * stride)
    rows = np.resize(expected, (len(expected) // stride, stride))[:, :run_length]
    found = raw_draws(9, Runs(3, stride, 2**40, run_length), 0, count)
    assert np.array_equal(found, rows.reshape(-1)[:count])


@pytest.mark.parametrize("init", INITS, ids=lambda init: f"{init.kind}{init.width}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_piece_holds_the_elements_of_the_whole(init: Init, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    expected = whole(init, *shape, dtype=dtype)
    for dim, size in enumerate(shape):
        for piece in pieces(dim, size):
            assert torch.equal(part(init, piece, *shape, dtype=dtype), cut(expected, piece)), piece


@pytest.mark.parametrize("init", INITS, ids=lambda init: f"{init.kind}{init.width}")
@pytest.mark.parametrize("chunk", [1, 5, 12, 20])
def test_pieces_are_the_same_in_chunks_of_any_size(init: Init, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (3, 5, 12)
    expected, drawn = whole(init, *shape, dtype=torch.float64), []

    def spy(*arguments: object) -> Tensor:
        drawn.append(draws(*arguments))
        return drawn[-1]

    monkeypatch.setattr(nn_init, "CHUNK", chunk)
    monkeypatch.setattr(nn_init, "draws", spy)
    for dim, start, length, step in (
        (0, 1, 2, 1),
        (0, 0, 2, 2),
        (1, 1, 3, 1),
        (1, 0, 3, 2),
        (2, 5, 7, 1),
        (2, 1, 3, 4),
    ):
        piece = Piece(dim, start, length, step)
        assert torch.equal(part(init, piece, *shape, dtype=torch.float64), cut(expected, piece)), piece
    # Rows on a sphere are drawn whole.
    bound = chunk if init.kind != "sphere" else max(chunk, shape[-1]) + 2 * init.width
    assert max(len(values) for values in drawn) <= bound


@pytest.mark.parametrize("init", INITS, ids=lambda init: f"{init.kind}{init.width}")
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_all_ranks_together_hold_the_whole(init: Init, dim: int) -> None:
    shape, ranks = (5, 7, 12), 4
    expected, blocks, strided = whole(init, *shape), [], torch.full(shape, torch.nan)
    size = shape[dim]
    each = -(-size // ranks)
    for rank in range(ranks):
        start = min(size, rank * each)
        blocks.append(part(init, Piece(dim, start, min(each, size - start)), *shape))
        turn = Piece(dim, rank, len(range(rank, size, ranks)), ranks)
        strided.index_copy_(dim, torch.tensor(list(turn.indices)), part(init, turn, *shape))
    assert torch.equal(torch.cat(blocks, dim), expected)
    assert torch.equal(strided, expected)


@pytest.mark.parametrize("init", INITS, ids=lambda init: f"{init.kind}{init.width}")
def test_tensors_without_elements_have_pieces(init: Init) -> None:
    for shape in ((0, 12), (5, 0, 12)):
        assert part(init, Piece(len(shape) - 1, 3, 6), *shape).shape == (*shape[:-1], 6)
    assert part(init, Piece(0, 5, 0), 5, 12).shape == (0, 12)
    assert part(init, Piece(1, 12, 0, 3), 5, 12).shape == (5, 0)


def test_the_end_of_a_table_that_no_machine_holds() -> None:
    shape, rows = (2**40, 2048), 2**40 - 3
    last = part(NORMAL, Piece(0, rows, 3), *shape, dtype=torch.float64)
    assert torch.equal(last.view(-1), draws(NORMAL, 3, "x", rows * 2048, 3 * 2048))
    columns = Piece(1, 1021, 32)
    found = draws(NORMAL, 3, "x", rows * 32, 3 * 32, columns.runs(shape))
    assert torch.equal(found.view(3, 32), cut(last, columns))


def test_a_row_on_a_sphere_is_the_same_with_and_without_others(two_threads: None) -> None:
    # From 2**15 terms on torch shares out a sum to a single number among its threads: one or two of 12 then differ.
    init = Init(kind="sphere", scale=1.0, width=100_003)
    expected = whole(init, 12, 100_003, dtype=torch.float64)
    for row in range(12):
        assert torch.equal(part(init, Piece(0, row, 1), 12, 100_003, dtype=torch.float64)[0], expected[row])


def test_quantiles_do_not_depend_on_their_neighbours() -> None:
    tail = torch.logspace(-16, -0.4, 2000, dtype=torch.float64)
    unit = torch.cat([tail, 1 - tail, torch.linspace(0.01, 0.99, 2001, dtype=torch.float64)])
    expected = torch.special.ndtri(unit)
    for size in (1, 3, 4, 7, 8, 9, 31):
        found = torch.cat([torch.special.ndtri(few.clone()) for few in unit.split(size)])
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("held", "piece"),
    [((4, 6), Piece(0, 0, 3)), ((3, 6), Piece(1, 0, 3)), ((3, 6), Piece(0, 3, 3)), ((3, 6), Piece(0, 0, 3, 3))],
)
def test_a_piece_that_is_none_of_the_whole_is_refused(held: tuple[int, ...], piece: Piece) -> None:
    with pytest.raises(AssertionError):
        fill(torch.empty(held), NORMAL, 3, "x", shape=(5, 6), piece=piece)


def test_a_whole_of_another_shape_is_refused() -> None:
    fill(torch.empty(5, 6), NORMAL, 3, "x", shape=(5, 6))
    with pytest.raises(AssertionError):
        fill(torch.empty(5, 6), NORMAL, 3, "x", shape=(6, 5))
