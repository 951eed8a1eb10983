"""specs/paper: the published totals, and the page that compares them."""

import importlib.util
import json
from types import ModuleType

import pytest
from conftest import REPO, memforge

PAPER = REPO / "specs" / "paper"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper", REPO / "benchmarks" / "paper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


paper = load_script()


@pytest.mark.parametrize("name", list(paper.KNOWN))
def test_totals_are_the_known_ones(name: str) -> None:
    cost = json.loads(memforge("profile", PAPER / f"{name}.toml", "--json").stdout)
    known = paper.KNOWN[name][0]
    assert (paper.as_printed(cost["params"]["total"], known) == known) == (name not in paper.DISAGREES)


def test_the_reasons_for_the_differences_hold() -> None:
    totals = {name: paper.report_of(name)[1].as_dict()["params"] for name in paper.DISAGREES}
    assert totals["memory-1.3b"]["total"] // 10**6 == 3377
    assert totals["memory-plus-1.3b"]["total"] // 10**6 == 3368
    routers = sum(r.numel for r in paper.report_of("moe-1.3b")[0].params if "router" in r.path)
    assert routers == 180_224
    assert paper.as_printed(totals["moe-1.3b"]["total"] - routers, "3.545B") == "3.545B"


def test_every_model_of_the_paper_is_there() -> None:
    sized = {f"{kind}-{size}" for kind in ("dense", "moe", "peer", "memory", "memory-plus") for size in paper.SIZES[:4]}
    larger = {"memory-plus-1.3b-4m", "memory-plus-1.3b-16m", "memory-plus-1.3b-64m", "dense-8b", "memory-plus-8b"}
    ablations = {f"memory-373m-layers-{where}" for where in ("12-16-20", "8-12-16", "4-12-20", "six")}
    gates = {"memory-373m-gate-sigmoid", "memory-373m-gate-swilu"}
    assert set(paper.names()) == sized | larger | ablations | gates


def test_the_page_is_fresh() -> None:
    assert (PAPER / "README.md").read_text(encoding="utf-8") == paper.page()
