"""benchmarks/train.py: the plain models that memforge is timed against are the same functions."""

import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import pytest
from conftest import REPO


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    monkeypatch.delitem(sys.modules, "train", raising=False)
    return import_module("train")


@pytest.mark.parametrize("arm", ["dense-plain", "memory-plain"])
def test_plain_models_are_ours(bench: ModuleType, arm: str) -> None:
    found = bench.differences(bench.ARMS[arm].quick())
    assert all(value <= bench.TOLERANCE for value in found.values()), found


def test_clock_counts_what_is_within_something_else_once(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 1.0, 4.0, 9.0))  # outer from 0 to 9, inner from 1 to 4
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = bench.Clock()
    clock.timed("outer", clock.timed("inner", lambda: None))()
    assert clock.seconds == {"outer": 6.0, "inner": 3.0}
