"""memforge kernels, tune and build --target: what kernels compile to, on a machine without a GPU."""

import io
import json
from pathlib import Path

import pytest
from conftest import REPO, memforge
from rich.console import Console

from memforge.errors import DeviceError
from memforge.export.kernels import kernel_configs, kernel_keys
from memforge.plan import make_plan
from memforge.report.kernels import show_kernels
from memforge.spec import load_spec
from memforge_kernels import machine_code, tuning

SPEC = REPO / "specs" / "demo" / "memory.toml"


def test_a_build_holds_what_its_kernels_compile_to(tmp_path: Path) -> None:
    done = memforge("build", SPEC, "--out", tmp_path / "b", "--target", "sm_90")
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "b" / "kernels.json").read_text())["kernels"]
    assert {r["op"] for r in records} >= {
        "weighted_gather",
        "gather_dot",
        "row_update.adamw",
        "product_key_topk.halves",
    }
    for r in records:
        assert (r["target"], r["spill_bytes"]) == ("sm_90", 0)
        assert 0 < r["registers"] <= 255
        assert r["wide_share"] is None or r["wide_share"] >= 0.9


def test_without_a_target_a_build_names_the_config_of_every_shipped_one() -> None:
    plan = make_plan(load_spec(REPO / "specs" / "paper" / "memory-plus-373m.toml"))
    records = kernel_configs(plan, None)
    assert {r["target"] for r in records} == set(tuning.shipped()) == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(records) == 4 * len(kernel_keys(plan))
    gather = next(r for r in records if (r["op"], r["target"]) == ("weighted_gather", "sm_90"))
    assert (gather["width"], gather["k"], gather["found"], gather["provenance"]) == (1024, 128, "bucket", "static")


def test_a_dense_model_has_no_kernels_of_ours() -> None:
    assert kernel_keys(make_plan(load_spec(REPO / "specs" / "demo" / "dense.toml"))) == []


@pytest.mark.parametrize(
    "command",
    [
        ("kernels", "--target", "sm_1"),
        ("tune", "--target", "H100"),
        ("tune", "--target", "sm_86"),  # it compiles, but nothing is known of its memory
        ("build", SPEC, "--target", "x"),
    ],
)
def test_an_unknown_target_is_refused_with_the_known_ones(command: tuple[object, ...], tmp_path: Path) -> None:
    done = memforge(*command, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "sm_90" in done.stderr
    assert "gfx942" in done.stderr
    assert not list(tmp_path.iterdir())


def test_tuning_by_the_clock_needs_a_gpu() -> None:
    done = memforge("tune", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)
    assert "--target sm_90" in done.stderr


def test_a_missing_compiler_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *_: object) -> str:
        raise machine_code.ToolMissing(name)

    monkeypatch.setattr(machine_code, "_tool", missing)
    with pytest.raises(DeviceError, match=r"is not in the installed triton package"):
        kernel_configs(make_plan(load_spec(SPEC)), ["sm_90"])


def test_no_number_of_a_kernel_is_cut_on_a_narrow_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    narrow = Console(file=screen, width=40, height=25, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr("memforge.report.kernels.console", lambda: narrow)
    plan = make_plan(load_spec(SPEC))
    show_kernels(kernel_configs(plan, ["sm_90"])[:1])
    shown = screen.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert "product_key_topk.halves" in shown
