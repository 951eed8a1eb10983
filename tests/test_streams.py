"""Windows as a function of their position, over epochs, shards, mixtures and threads."""

import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_data import packed_of

from memforge.errors import StorageError
from memforge.training.data import Prefetch
from memforge.training.data.corpus import Ragged
from memforge.training.data.stream import MAX_ORDERS, Stream
from memforge.training.data.text import WindowUnits


def ragged() -> Ragged:
    return Ragged.of([[i] * (i % 5 + 1) for i in range(1, 30)])


def stream(seed: int = 0, window: int = 7) -> Stream:
    return Stream(ragged(), window=window, seed=seed)


def naive(units: Ragged, window: int, seed: int, epochs: int) -> np.ndarray:
    """Whole epochs, materialised: every unit in the order of a Philox permutation, then cut."""
    flat = []
    for epoch in range(epochs):
        order = np.random.Generator(np.random.Philox(key=(seed << 64) + epoch)).permutation(len(units))
        flat += [units[int(i)] for i in order]
    tokens = np.concatenate(flat)
    return tokens[: len(tokens) // window * window].reshape(-1, window)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(any),
    window=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_any_chunking_of_a_stream_is_the_naive_one(lengths: list[int], window: int, seed: int, cuts: list[int]) -> None:
    units = Ragged.cut(np.arange(sum(lengths), dtype=np.int32), np.array(lengths))
    wanted = naive(units, window, seed, epochs=-(-31 * window // sum(lengths)))
    one = Stream(units, window=window, seed=seed)
    places = sorted({0, 30, *cuts})
    parts = [one.windows(a, b - a) for a, b in itertools.pairwise(places)]
    assert np.array_equal(np.concatenate(parts), wanted[:30])
    assert all(part.dtype == np.int32 for part in parts)


def test_windows_are_a_function_of_their_position() -> None:
    whole = stream().windows(0, 60)
    for start, count in ((0, 1), (13, 5), (59, 1), (20, 40), (7, 0)):
        assert np.array_equal(stream().windows(start, count), whole[start : start + count])
    assert not np.array_equal(stream(1).windows(0, 60), whole)


def test_each_epoch_holds_every_token_once_in_a_new_order() -> None:
    s = stream()
    tokens = s.windows(0, 3 * s.epoch_tokens).reshape(-1)
    epochs = [tokens[i * s.epoch_tokens : (i + 1) * s.epoch_tokens] for i in range(3)]
    assert all(np.array_equal(np.sort(e), np.sort(ragged().flat)) for e in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_a_stream_keeps_few_orders() -> None:
    s = stream()
    for start in (0, 100, 5, 300, 0):
        s.windows(start, 3)
        assert len(s._orders) <= MAX_ORDERS


def test_threads_may_share_a_stream() -> None:
    whole, shared = stream().windows(0, 400), stream()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: shared.windows(i * 7 % 397, 3), range(400)))
    assert all(np.array_equal(part, whole[i * 7 % 397 :][:3]) for i, part in enumerate(found))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 5), size=st.integers(1, 90), start=st.integers(0, 60), count=st.integers(0, 20))
def test_windows_in_shards_are_those_of_the_flat_sequence(
    cache: Path, seed: int, size: int, start: int, count: int
) -> None:
    tokens = np.arange(400) % 389
    packed = packed_of(tokens)
    assert len(packed.shards) == 7
    num = 400 // size
    held = np.sort(np.random.default_rng(seed).permutation(num)[: max(1, num // 5)])
    kept = [i for i in range(num) if i not in held] or [0]
    units = WindowUnits(packed, size, held if num > 1 else held[:0])
    assert (len(units), units.num_tokens) == (len(kept), len(kept) * size)
    cut = Ragged.of([tokens[i * size : (i + 1) * size].tolist() for i in kept])
    wanted = naive(cut, size, seed, epochs=-(-(start + count) // len(kept)) or 1)
    assert np.array_equal(Stream(units, window=size, seed=seed).windows(start, count), wanted[start : start + count])


class Slow:
    """A stream whose windows take a while, and one of them cannot be read."""

    epoch_tokens = 10

    def __init__(self, broken: int | None = None) -> None:
        self.broken, self.threads = broken, set()

    def windows(self, start: int, count: int) -> np.ndarray:
        self.threads.add(threading.current_thread())
        time.sleep(0.002 * (start % 3))
        if self.broken == start:
            raise StorageError("a shard: changed")
        return np.arange(start, start + count, dtype=np.int32)[:, None]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("first", [0, 23])
def test_batches_are_the_same_for_any_number_of_workers(workers: int, first: int) -> None:
    with Prefetch(stream(), 3, first_step=first, workers=workers) as ahead:
        found = [ahead.batch(step) for step in range(first, first + 40)]
    assert np.array_equal(np.concatenate(found), stream().windows(3 * first, 120))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_what_goes_wrong_in_a_worker_is_raised_at_its_step(workers: int) -> None:
    slow = Slow(broken=10)
    with Prefetch(slow, 2, first_step=0, workers=workers) as ahead:
        for step in range(5):
            assert ahead.batch(step)[0, 0] == 2 * step
        with pytest.raises(StorageError, match="changed"):
            ahead.batch(5)
    assert not [t for t in slow.threads if t.is_alive() and t is not threading.current_thread()]


def test_closing_waits_for_no_batch_that_was_not_begun() -> None:
    slow = Slow()
    ahead = Prefetch(slow, 1, first_step=0, workers=2)
    ahead.batch(0)
    began = time.monotonic()
    ahead.close()
    ahead.close()
    assert time.monotonic() - began < 5
    assert not any(t.is_alive() for t in slow.threads)


def test_steps_follow_each_other() -> None:
    with Prefetch(stream(), 1, first_step=4, workers=1) as ahead, pytest.raises(AssertionError, match="4 is next"):
        ahead.batch(5)
