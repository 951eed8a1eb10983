"""Runs as they are reported: read from their files, on the terminal, as a page in a real browser; and lookups."""

import json
import math
import os
import pty
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO, SMALL, memforge, write
from test_report import Page, browse, needs_browser

from memforge.build import build_model
from memforge.errors import StorageError, UsageError
from memforge.plan import Plan, make_plan
from memforge.report.html import run_page
from memforge.report.html.charts import SMALL as SMALL_FRAME
from memforge.report.html.charts import WIDE, Look, chart, value_axis
from memforge.report.inspect import ASCII, BLOCKS, duration, sparkline
from memforge.report.run import Series, read_run, run_record
from memforge.spec import load_spec

PEER = '\n[[place]]\nlayers = [1]\nblock = { kind = "peer", num_sub_keys = 6, num_heads = 2, top_k = 3, key_dim = 8 }\n'
MEMORIES = ("layers.0.memory", "layers.1.peer", "layers.2.memory")
POOL, ROUTER = "pool.facts.values", "layers.3.moe"
TOKENS_PER_STEP = 192
PLAIN = Look()


def planned(folder: Path, *overrides: str) -> Plan:
    """A model with a shared pool, one of single-neuron experts and a router."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = write(folder / "spec.toml", SMALL.replace("[data]", PEER + "[data]"))
    return make_plan(load_spec(spec, overrides=overrides))


def metrics(step: int, last: int, noise: random.Random) -> dict[str, float]:
    """A row of a run that learns: every number follows from the step, up to some noise."""
    done = step / last
    row = {
        "step": step,
        "tokens": step * TOKENS_PER_STEP,
        "loss": 0.4 + 6 * math.exp(-6 * done) + noise.random() * 0.2,
        "grad_norm": 1.5 + noise.random() * (20 if noise.random() < 0.01 else 1),
        "learning_rate": 1e-3 * min(1, 10 * done) * (1 - 0.9 * done),
        "value_learning_rate": 1e-2 * min(1, 10 * done),
    }
    for i, path in enumerate(MEMORIES):
        used = 0.9 - 0.2 * i * done + 0.03 * noise.random()
        figures = (
            used,
            min(1.0, used + done / 4),
            3.2 - i * done / 2,
            0.5 + i * done,
            0.1 + 0.15 * i * done,
            0.3 + done / 9,
        )
        names = ("slots_used", "slots_ever", "entropy", "kl", "top_1pct", "read_norm")
        row |= {f"{path}.{name}": figure for name, figure in zip(names, figures, strict=True)}
    row |= {f"{POOL}.moved": 0.02 * (1 - 0.9 * done), f"{POOL}.lost": 0.1 * done}
    row |= {f"{ROUTER}.load_max": 1.2 + noise.random() / 5, f"{ROUTER}.load_entropy": 1.3}
    return row


def speed(step: int, *, started: bool, since: int) -> dict[str, Any]:
    row = {"step": step, "seconds": (step - since) * 0.05, "training_seconds": step * 0.05}
    row |= {"tokens_per_second": 3840.0 + step % 7, "mfu": 0.31}
    row |= {"memory_bandwidth": 0.42, "waiting_for_data": 0.01}
    return row | ({"started": True} if started else {})


def make_run(
    folder: Path,
    rows: int = 40,
    *,
    starts: tuple[int, ...] = (1,),
    every: int = 1,
    ended: str | None = "done",
    **given: Any,
) -> Path:
    """A run directory of `rows` logged steps whose processes began at `starts`; each row of metrics holds `given`."""
    last, noise = rows * every, random.Random(0)
    plan = planned(folder, f"train.steps={last}")
    run = folder / "run"
    run.mkdir()
    (run / "plan.json").write_text(plan.to_json())
    steps = [every * (i + 1) for i in range(rows)]
    scored = {steps[round(i * (rows - 1) / 8)] for i in range(9)}
    with (run / "metrics.jsonl").open("w") as file:
        for step in steps:
            row = metrics(step, last, noise)
            row |= (
                {"held_out_loss": 0.7 + 5 * math.exp(-5 * step / last), "recall": step / last / 2}
                if step in scored
                else {}
            )
            file.write(json.dumps(row | given) + "\n")
    with (run / "speed.jsonl").open("w") as file:
        for step in steps:
            since = max(start for start in starts if start <= max(step, starts[0]))
            file.write(json.dumps(speed(step, started=step in starts, since=since)) + "\n")
    texts = [
        {"step": steps[i], "prompt": "Flights to ", "text": f"<b>{i}</b> land & take off"}
        for i in range(0, rows, max(rows // 15, 1))
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (run / "run.json").write_text(
        json.dumps({"memforge": "9.9.9", "device": {"name": "abacus"}, "argv": ["train", "x"]})
    )
    if ended is not None:
        (run / "summary.json").write_text(json.dumps(summary(plan, last, ended)))
    return run


def summary(plan: Plan, steps: int, ended: str) -> dict[str, Any]:
    return {
        "name": plan.name,
        "model_hash": plan.model.model_hash,
        "steps": steps,
        "epochs": 2.5,
        "params": 1,
        "active_params": 1,
        "flops_per_token": 123456,
        "data": {"kind": "facts", "facts": 12, "corpus_sha256": "ab" * 32},
        "baselines": {"majority": 0.125},
        "final": {"loss": 0.5},
        "training_seconds": 4000.0,
        "checkpoint": f"step-{steps:08d}",
        "ended": ended,
        "exposures_per_fact": 7.5,
        "caveats": [],
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def change(path: Path, edit: Callable[[int, dict[str, Any]], None]) -> None:
    """Edit each row of a file of lines."""
    rows = lines(path)
    for i, row in enumerate(rows):
        edit(i, row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def record_of(run: Path) -> dict[str, Any]:
    return run_record(read_run(run))


def test_the_record_holds_the_last_number_of_every_kind(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=40, starts=(1, 15))
    last, found = lines(run / "metrics.jsonl")[-1], record_of(run)
    assert (found["step"], found["steps"], found["tokens"]) == (40, 40, 40 * TOKENS_PER_STEP)
    assert (found["loss"], found["grad_norm"]) == (last["loss"], last["grad_norm"])
    assert found["scores"] == {"held_out_loss": last["held_out_loss"], "recall": 0.5}
    assert (found["state"], found["seconds"], found["starts"]) == ("done", 4000.0, [1, 15])
    assert found["speed"] == {
        "tokens_per_second": 3845.0, "mfu": 0.31, "memory_bandwidth": 0.42, "waiting_for_data": 0.01,
    }  # fmt: skip
    assert [(layer["path"], layer["pool"], layer["slots"]) for layer in found["layers"]] == [
        ("layers.0.memory", "pool.facts", 64),
        ("layers.1.peer", "layers.1.peer.pool", 36),
        ("layers.2.memory", "pool.facts", 64),
    ]
    for layer in found["layers"]:
        for name in ("slots_used", "slots_ever", "entropy", "kl", "top_1pct", "read_norm"):
            assert layer[name] == last[f"{layer['path']}.{name}"]
        assert layer["entropy_share"] == pytest.approx(layer["entropy"] / math.log(layer["slots"]))
    assert found["pools"] == [{"tensor": POOL, "moved": last[f"{POOL}.moved"], "lost": last[f"{POOL}.lost"]}]
    assert found["routers"][0]["load_max"] == last[f"{ROUTER}.load_max"]
    assert found["warnings"] == []


def test_a_run_with_nothing_but_a_plan_is_one_that_has_not_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("metrics.jsonl", "speed.jsonl", "samples.jsonl", "summary.json", "run.json"):
        (run / name).unlink()
    found = record_of(run)
    assert (found["step"], found["loss"], found["seconds"], found["scores"]) == (0, None, None, {})
    assert found["state"] == "running, or killed"
    assert "No step has been logged yet" in run_page(run)


def test_a_summary_of_an_earlier_step_is_not_how_the_run_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=40)
    plan = read_run(run).plan
    (run / "summary.json").write_text(json.dumps(summary(plan, 30, "interrupted")))
    found = record_of(run)
    assert (found["state"], found["seconds"]) == ("running, or killed", 40 * 0.05)
    ended = summary(plan, 40, "budget") | {"final": {"loss": 0.5, "held_out_loss": 0.25, "recall.web": 1}}
    (run / "summary.json").write_text(json.dumps(ended))
    found = record_of(run)
    assert found["state"] == "budget"
    assert found["scores"] == {"held_out_loss": 0.25, "recall": 0.5, "recall.web": 1.0}


def test_rows_that_a_resumed_run_made_again_count_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=20)
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(16, 19):
            file.write(json.dumps({"step": step, "loss": step / 100}) + "\n")
    with (run / "speed.jsonl").open("a") as file:
        file.write(json.dumps({"step": 16, "tokens_per_second": 5, "started": True}) + "\n")
    found = read_run(run)
    assert list(found.metrics.steps) == list(range(1, 19))
    assert list(found.metrics.series("loss").values)[-3:] == [0.16, 0.17, 0.18]
    assert len(found.metrics.series("grad_norm")) == 15
    assert (list(found.speed.steps), found.starts) == (list(range(1, 17)), (1, 16))


@pytest.mark.parametrize("kept", [1, 2, 20, 300])
@pytest.mark.parametrize("name", ["metrics.jsonl", "speed.jsonl", "samples.jsonl"])
def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path, name: str, kept: int) -> None:
    run = make_run(tmp_path, rows=12)
    text = (run / name).read_text()
    whole, last = text.splitlines(keepends=True)[:-1], text.splitlines()[-1]
    (run / name).write_text("".join(whole) + last[: min(kept, len(last) - 1)])
    found = read_run(run)
    rows = {"metrics.jsonl": found.metrics.steps, "speed.jsonl": found.speed.steps, "samples.jsonl": found.samples}
    assert len(rows[name]) == len(whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "speed.jsonl", "samples.jsonl"])
@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "7",
        "{}",
        '{"step": "1"}',
        '{"step": 1.5}',
        '{"step": -1}',
        "\x00\x00",
        "",
        '{"step": 3, "loss": NaN}',
    ],
)
def test_any_other_damage_names_file_and_line(tmp_path: Path, name: str, line: str) -> None:
    run = make_run(tmp_path, rows=12)
    rows = (run / name).read_text().splitlines()
    (run / name).write_text("\n".join([*rows[:4], line, *rows[5:]]) + "\n")
    with pytest.raises(StorageError, match=rf"{name}:5: damaged"):
        read_run(run)


@pytest.mark.parametrize("value", ["1e999", "[1]", '{"a": 1}', "1" + "0" * 400])
def test_a_value_that_is_no_finite_number_is_damage(tmp_path: Path, value: str) -> None:
    run = make_run(tmp_path, rows=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 4, "loss": {value}}}\n')
    with pytest.raises(StorageError, match=r"metrics.jsonl:4: damaged: `loss`"):
        read_run(run)


def test_text_and_null_are_let_through(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.25, "note": "x", "other": null, "flag": true}\n')
    assert record_of(run)["loss"] == 0.25


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("summary.json", "{", "summary.json: damaged: not JSON"),
        ("summary.json", "[]", "summary.json: damaged: not an object"),
        ("summary.json", '{"caveats": 3}', "summary.json: damaged at `caveats`"),
        ("run.json", '"x"', "run.json: damaged: not an object"),
        ("plan.json", "{}", "plan.json: the file"),
    ],
)
def test_damaged_documents_are_errors_of_storage(tmp_path: Path, name: str, text: str, why: str) -> None:
    run = make_run(tmp_path, rows=3)
    (run / name).write_text(text)
    with pytest.raises(StorageError, match=re.escape(why)):
        read_run(run)


def test_what_is_no_run_is_an_error_of_storage(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such run directory"):
        read_run(tmp_path / "absent")
    with pytest.raises(StorageError, match=r"plan\.json"):
        read_run(tmp_path)


def test_a_loss_that_is_missing_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=12)
    change(run / "metrics.jsonl", lambda i, row: row.pop("loss") and None if i in (3, 7) else row.update(skipped=i))
    assert record_of(run)["warnings"] == [
        "the loss was not finite: 2 rows have none, the last at step 8",
        "steps were left out because their gradients were not finite: 11",
    ]
    (run / "summary.json").write_text(json.dumps(summary(read_run(run).plan, 12, "non-finite")))
    change(run / "metrics.jsonl", lambda i, row: row.update(loss=1.0, skipped=0))
    assert record_of(run)["warnings"] == ["the run ended at step 12 because its loss or gradients were not finite"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (f"{ROUTER}.load_max", 2.6, "layers.3.moe: its busiest expert gets 2.6 times an even share"),
        (f"{POOL}.lost", 0.33, "pool.facts.values: 33% of the elements of updated rows did not change"),
        ("layers.2.memory.top_1pct", 0.71, "layers.2.memory: the most read 1% of its slots take 71% of the weight"),
    ],
)
def test_what_should_worry_a_reader_is_said(tmp_path: Path, name: str, value: float, says: str) -> None:
    found = record_of(make_run(tmp_path, **{name: value}))["warnings"]
    assert len(found) == 1
    assert found[0].startswith(says)


def test_a_memory_of_few_slots_is_a_worry_only_if_it_is_falling_and_was_read_often(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=40)
    path = "layers.2.memory"

    def use(first: float, last: float) -> None:
        change(
            run / "metrics.jsonl",
            lambda i, row: row.update(
                {f"{path}.slots_used": first + (last - first) * i / 39, f"{path}.slots_ever": 0.4}
            ),
        )

    use(0.4, 0.1)
    assert record_of(run)["warnings"] == [
        "layers.2.memory: only 40.0% of 64 slots were ever read, and the share in use is falling (21.2% to 13.5%)"
    ]
    use(0.3, 0.3)
    assert record_of(run)["warnings"] == []
    use(0.4, 0.1)
    # 8 reads a token of 64 slots: ten reads for each slot need 80 tokens.
    change(run / "metrics.jsonl", lambda i, row: row.update(tokens=79))
    assert record_of(run)["warnings"] == []
    change(run / "metrics.jsonl", lambda i, row: row.update(tokens=80))
    assert len(record_of(run)["warnings"]) == 1


def test_waiting_for_data_is_a_worry(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    change(run / "speed.jsonl", lambda i, row: row.update(waiting_for_data=0.25))
    assert record_of(run)["warnings"] == ["training waits for data 25% of the time"]


def test_a_sparkline_is_as_high_as_the_means_of_its_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == ASCII
    assert sparkline([7, 7, 0, 0], 2) == ASCII[-1] + ASCII[0]
    assert sparkline([5.0] * 9, 4) == ASCII[0] * 4
    assert sparkline([5.0, 5.0], 12, low=0.0) == ASCII[-1] * 2
    assert len(sparkline(range(1000), 60)) == 60


def test_durations_are_in_two_units() -> None:
    assert [duration(s) for s in (0.04, 59.94, 75, 3599.6, 3725, 90061)] == [
        "0.0 s", "59.9 s", "1 min 15 s", "1 h 00 min", "1 h 02 min", "25 h 01 min",
    ]  # fmt: skip


def test_the_terminal_says_what_the_record_says(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=40, starts=(1, 15), **{f"{ROUTER}.load_max": 3.0})
    shown, found = memforge("inspect", run), json.loads(memforge("inspect", run, "--json").stdout)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert found == record_of(run)
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in shown.stdout.splitlines()}
    assert rows["step"] == "step 40 of 40 (100%)"
    assert rows["loss"] == f"loss {found['loss']:.4f}"
    assert rows["held-out loss"] == f"held-out loss {found['scores']['held_out_loss']:.4f}"
    assert rows["recall"] == "recall 50.0%"
    assert rows["speed"] == "speed 3,845 tokens/s"
    assert (rows["MFU"], rows["time"]) == ("MFU 31.0%", "time 1 h 06 min, resumed 1 time")
    layer = found["layers"][2]
    cells = rows["layers.2.memory"].split()
    assert cells[1:3] == ["64", f"{layer['slots_used']:.1%}"]
    assert cells[4:] == [
        f"{layer['slots_ever']:.1%}", f"{layer['entropy_share']:.1%}", "2.5", "40.0%", f"{layer['read_norm']:.4g}",
    ]  # fmt: skip
    assert rows["layers.3.moe"].split()[1:] == ["3", "1.3"]
    assert rows[POOL].split()[1:] == [f"{found['pools'][0]['moved']:.1%}", "10.0%"]
    assert shown.stdout.endswith("warning: layers.3.moe: its busiest expert gets 3.0 times an even share\n")


def test_a_falling_layer_has_a_falling_trend(tmp_path: Path) -> None:
    shown = memforge("inspect", make_run(tmp_path, rows=48), LC_ALL="en_US.UTF-8").stdout
    trend = re.search(r"layers\.2\.memory .*% +([▁-█]{12}) ", shown)
    assert trend is not None
    levels = [BLOCKS.index(c) for c in trend[1]]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] - levels[-1] in (2, 3, 4)


def on_a_terminal(*args: object, **env: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    given = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    command = [sys.executable, "-m", "memforge", *map(str, args)]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env={**given, "TERM": "xterm", **env}):
        os.close(theirs)
        found = bytearray()
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            found += part
    os.close(ours)
    return found.decode().replace("\r\n", "\n")


def test_colour_is_for_terminals_that_want_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, **{f"{ROUTER}.load_max": 3.0})
    warning = "warning: layers.3.moe"
    assert f"\x1b[33m{warning}" in on_a_terminal("inspect", run)
    plain = on_a_terminal("inspect", run, NO_COLOR="1")
    assert warning in plain
    assert "\x1b[33m" not in plain
    assert "\x1b" not in memforge("inspect", run).stdout


@pytest.mark.parametrize("columns", ["20", "300"])
def test_no_number_is_cut_at_any_width(tmp_path: Path, columns: str) -> None:
    run = make_run(tmp_path, rows=40)
    wide, found = on_a_terminal("inspect", run, COLUMNS=columns, NO_COLOR="1"), record_of(run)
    assert f"{found['loss']:.4f}" in wide
    row = next(line for line in wide.splitlines() if line.startswith("layers.2.memory"))
    assert row.split()[-1] == f"{found['layers'][2]['read_norm']:.4g}"
    assert "…" not in wide


@pytest.mark.parametrize("env", [{"LC_ALL": "C"}, {"LANG": "C", "LC_ALL": ""}, {"PYTHONIOENCODING": "ascii"}])
def test_where_there_are_no_blocks_sparklines_are_ascii(tmp_path: Path, env: dict[str, str]) -> None:
    shown = memforge("inspect", make_run(tmp_path), **env)
    assert (shown.returncode, shown.stdout.isascii()) == (0, True)
    assert re.search(r"layers\.2\.memory .*% +[_.=+*#@-]{12} ", shown.stdout)


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("--slot", "pool.facts:1"), 2, "--slot shows which tokens read it"),
        (("--device", "cpu"), 2, "--device runs the model on a text"),
        (("--text", "a", "--file", "b"), 2, "--text and --file: give one of them"),
        (("--text", "a", "--html", "b"), 2, "--html is the page of a run"),
        (("--file", "/nonexistent/file"), 4, "/nonexistent/file: No such file"),
        (("--html", "/nonexistent/x.html"), 4, "/nonexistent/x.html: No such file"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, args: tuple[str, ...], code: int, says: str) -> None:
    done = memforge("inspect", make_run(tmp_path), *args)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(f"error: {says}")
    assert done.stderr.count("\n") == 1


def test_a_damaged_line_is_one_line_and_code_4(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "metrics.jsonl").write_text("{}\n")
    done = memforge("inspect", run)
    assert (done.returncode, done.stderr) == (4, f"error: {run}/metrics.jsonl:1: damaged: no step\n")


# The page.


def drawn(values: list[float], look: Look = PLAIN, **given: Any) -> Any:
    steps = list(range(1, len(values) + 1))
    found = chart(
        "Loss", [("loss", Series(steps, values))], frame=WIDE, steps=(1, max(len(values), 1)), look=look, **given
    )
    assert found is not None
    return found


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path)]


def test_ticks_stand_where_their_numbers_do() -> None:
    for low, high, look in (
        (0.4, 6.2, Look()),
        (0.3, 4000.0, Look(log=True)),
        (0.0, 0.93, Look(percent=True, from_zero=True)),
    ):
        axis = value_axis(low, high, SMALL_FRAME, look)
        assert axis.low <= low
        assert axis.high >= high
        assert 2 <= len(axis.ticks) <= 9
        middle = math.sqrt(axis.low * axis.high) if axis.log else (axis.low + axis.high) / 2
        halfway = (SMALL_FRAME.top + SMALL_FRAME.bottom) / 2
        assert axis.all_at([axis.low, middle, axis.high]) == pytest.approx(
            [SMALL_FRAME.bottom, halfway, SMALL_FRAME.top]
        )
        assert axis.log == (high / max(low, 1e-9) > 20 and look.log)
    assert drawn([1.0, 10.0]).y_ticks[0].label == "0"
    assert [tick.label for tick in drawn([1.0, 100.0], Look(log=True)).y_ticks] == [
        "1",
        "2",
        "5",
        "10",
        "20",
        "50",
        "100",
    ]


@pytest.mark.parametrize(
    "values", [[2.0], [2.0, 2.0], [0.0], [-1.0, 1.0], [1e-30, 1e30], [5e-324, 1.0], [1e300, 1e308]]
)
@pytest.mark.parametrize("look", [Look(), Look(log=True), Look(percent=True, from_zero=True)])
def test_any_values_can_be_drawn(values: list[float], look: Look) -> None:
    for x, y in points(drawn(values, look).curves[0].path):
        assert WIDE.left <= x <= WIDE.right
        assert WIDE.top - 0.1 <= y <= WIDE.bottom + 0.1


def test_a_long_curve_is_as_many_points_as_pixels_and_shows_every_spike() -> None:
    values = [1.0 + math.sin(i / 500) for i in range(100_000)]
    values[54_321] = 9.0
    found = drawn(values)
    curve = found.curves[0]
    assert len(points(curve.path)) <= WIDE.right - WIDE.left + 2
    assert len(points(curve.spread)) <= 2 * (WIDE.right - WIDE.left + 2)
    top = min(y for _, y in points(curve.spread))
    assert top == pytest.approx(value_axis(0.0, 9.0, WIDE, Look()).all_at([9.0])[0], abs=0.06)
    assert "greatest 9 at 54,322" in found.text


def test_a_curve_breaks_where_there_is_no_number() -> None:
    short = drawn([1.0, 2.0, math.nan, 3.0]).curves[0]
    assert short.path.count("M") == 2
    long = drawn([1.0] * 5000 + [math.nan] * 5000 + [1.0] * 5000).curves[0]
    assert (long.path.count("M"), long.spread.count("M")) == (2, 2)


def test_resumes_are_marked_and_labelled_where_there_is_room() -> None:
    found = drawn([1.0] * 1000, starts=(1, 300, 310, 600))
    assert [(resume.step, resume.label) for resume in found.resumes] == [(300, ""), (310, "resumed"), (600, "resumed")]


def test_the_page_refers_to_nothing_and_says_what_the_record_says(tmp_path: Path) -> None:
    run = make_run(tmp_path, rows=60, starts=(1, 20, 41))
    text, found = run_page(run), record_of(run)
    page = Page(text)
    assert page.references == ["data:,"]
    assert "url(" not in text
    assert re.findall(r"https?://[^\s\"<]+", text) == []
    assert f"{found['tokens']:,}" in page.words
    assert f"{found['loss']:.4f}" in page.words
    assert f"{found['scores']['held_out_loss']:.4f}" in page.words
    assert text.count('class="resume"') == 2 * text.count("<svg")
    assert text.count("<svg") == text.count('role="img" aria-label="')
    assert text.count("<details>") == 2 + 2 + 3 + 1 + 1
    assert f'<td data-value="{found["layers"][2]["kl"]}">2.5</td>' in text
    assert all(
        fact in page.words for fact in (found["model_hash"], found["run_hash"], "abacus", "9.9.9", "ab" * 32, "0.125")
    )
    assert run_page(read_run(run)) == text


def test_samples_are_text_and_only_the_newest_are_shown(tmp_path: Path) -> None:
    text = run_page(make_run(tmp_path, rows=60))
    assert "<b>Flights to </b>&lt;b&gt;56&lt;/b&gt; land &amp; take off" in text
    assert (text.count('class="sample"'), "12 of 15, samples.jsonl has all" in text) == (12, True)


def test_numbers_of_long_runs_are_a_hundred_rows_with_the_first_and_the_last(tmp_path: Path) -> None:
    text = run_page(make_run(tmp_path, rows=2000, every=10))
    table = text.partition("Loss in numbers</summary>")[2].partition("</table>")[0]
    steps = [int(step) for step in re.findall(r'<tr><td data-value="(\d+)"', table)]
    assert (len(steps), steps[0], steps[-1]) == (100, 10, 20_000)
    assert "100 of 2,000 rows; metrics.jsonl has all" in table
    scores = text.partition("Scores in numbers</summary>")[2].partition("</table>")[0]
    assert scores.count("<tr><td") == 9
    assert len(text) < 600_000


def test_mixtures_have_a_curve_for_each_part(tmp_path: Path) -> None:
    run = make_run(tmp_path, **{"held_out_loss.code": 1.5, "held_out_loss.web": 2.5})
    text = run_page(run)
    assert '<li><i class="k2"></i>held-out loss, code</li>' in text
    assert record_of(run)["scores"]["held_out_loss.web"] == 2.5


@needs_browser
@pytest.mark.parametrize("rows", [1, 3, 500])
def test_a_browser_shows_the_page_and_complains_of_nothing(tmp_path: Path, rows: int) -> None:
    file = write(tmp_path / "run.html", run_page(make_run(tmp_path, rows=rows)))
    shown = browse(file, "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert shown.stdout.count("<svg") == 2 + 2 + 4 + 3 * 4 + 2 + 2
    assert "NaN" not in shown.stdout


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (420, 844)])
def test_nothing_sticks_out_of_the_page_at_either_width(tmp_path: Path, width: int, height: int) -> None:
    """Wide charts scroll inside their frames; the page itself does not."""
    ask = (
        "<script>for (const d of document.querySelectorAll('details')) d.open = true;"
        'document.title = "wide:" + document.documentElement.scrollWidth + ":" + innerWidth</script></body>'
    )
    text = run_page(make_run(tmp_path, rows=200, **{"held_out_loss." + "long" * 20: 1.0}))
    file = write(tmp_path / "run.html", text.replace("</body>", ask))
    found = re.search(
        r"<title>wide:(\d+):(\d+)</title>", browse(file, f"--window-size={width},{height}", "--dump-dom").stdout
    )
    assert found is not None
    assert int(found[1]) <= int(found[2])


@needs_browser
def test_labels_of_charts_do_not_cover_each_other(tmp_path: Path) -> None:
    """The boxes of all texts of each drawing, as the browser sets them."""
    ask = """<script>
    const met = [];
    for (const svg of document.querySelectorAll("svg")) {
      const boxes = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
      for (const [i, [a, p]] of boxes.entries()) for (const [b, q] of boxes.slice(i + 1))
        if (p.left < q.right && q.left < p.right && p.top + 3 < q.bottom && q.top + 3 < p.bottom)
          met.push(svg.getAttribute("aria-label").slice(0, 20) + ": " + a + " | " + b);
      const frame = svg.getBoundingClientRect();
      for (const [a, p] of boxes) if (p.left < frame.left - 1 || p.right > frame.right + 1) met.push("out: " + a);
    }
    document.title = "met:" + met.join(";") + ":";
    </script></body>"""
    for i, (rows, every) in enumerate(((3, 1), (700, 1), (300, 777))):
        run = make_run(tmp_path / str(i), rows=rows, every=every, starts=(1, rows * every // 2 or 1))
        change(run / "metrics.jsonl", lambda i, row: row.update(grad_norm=10.0 ** (i % 9 - 4)))
        file = write(tmp_path / str(i) / "run.html", run_page(run).replace("</body>", ask))
        found = re.search(r"<title>met:(.*):</title>", browse(file, "--window-size=1280,900", "--dump-dom").stdout)
        assert found is not None
        assert found[1] == ""


@needs_browser
def test_a_table_with_empty_cells_is_sorted(tmp_path: Path) -> None:
    press = """<script>
    const table = document.querySelector("[aria-label='Memory layers at the last step'] table");
    const button = table.querySelectorAll("th button")[2];
    button.focus(); button.click();
    document.title = "order:" + [...table.tBodies[0].rows].map((row) => row.cells[0].textContent).join(",") + ":";
    </script></body>"""
    run = make_run(tmp_path)
    change(run / "metrics.jsonl", lambda i, row: row.pop("layers.1.peer.slots_used") and None)
    file = write(tmp_path / "run.html", run_page(run).replace("</body>", press))
    shown = browse(file, "--dump-dom").stdout
    assert "<title>order:layers.1.peer,layers.2.memory,layers.0.memory:</title>" in shown


# Lookups.


@pytest.fixture(scope="module")
def lookups() -> Any:
    return pytest.importorskip("memforge.training.lookups")


def test_slots_of_a_text_are_those_that_the_blocks_choose(tmp_path: Path, lookups: Any) -> None:
    """Against the lookups of the blocks themselves, on what each of them was given."""
    plan = planned(tmp_path)
    model = build_model(plan.model, seed=1).eval()
    tokens = list(range(7, 47))
    inputs: dict[str, torch.Tensor] = {}
    for path in MEMORIES:
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
    found = lookups.token_slots(model, plan.model, tokens, 3)
    assert len(found) == len(tokens)
    for path in MEMORIES:
        block, flat = model.get_submodule(path), inputs[path].flatten(0, 1)
        slots, weights = block.lookup(flat)
        if path == "layers.1.peer":
            hidden = torch.einsum("nd,nkd->nk", flat, block.pool.down[slots])
            weights = weights * torch.nn.functional.gelu(hidden)
        for i in range(len(tokens)):
            total = torch.zeros(64).index_add_(0, slots[i], weights[i].detach())
            best = total.abs().topk(3).indices.tolist()
            assert [slot for slot, _ in found[i][path]] == best
            assert [weight for _, weight in found[i][path]] == pytest.approx(total[best].tolist(), rel=1e-4)


def test_the_readers_of_a_slot_are_the_tokens_that_read_it_most(tmp_path: Path, lookups: Any) -> None:
    plan = planned(tmp_path)
    model = build_model(plan.model, seed=1).eval()
    tokens = [i % 50 for i in range(250)]  # more than two windows of 96
    every = lookups.token_slots(model, plan.model, tokens, 10**6)
    wanted = lookups.find_slot(plan.model, "pool.facts:5")
    assert wanted.layers == ("layers.0.memory", "layers.2.memory")
    found = lookups.slot_tokens(model, plan.model, tokens, wanted, 4)
    for path in wanted.layers:
        reads = {i: dict(of[path])[5] for i, of in enumerate(every) if 5 in dict(of[path])}
        most = sorted(reads, key=lambda i: -reads[i])[:4]
        assert [i for i, _ in found[path]] == most
        assert [weight for _, weight in found[path]] == pytest.approx([reads[i] for i in most])
        assert len(most) == 4
    assert lookups.find_slot(plan.model, "layers.1.peer:35").layers == ("layers.1.peer",)


@pytest.mark.parametrize(
    ("slot", "says"),
    [
        ("pool.other:1", "there are layers.0.memory, layers.1.peer, layers.2.memory, pool.facts, layers.1.peer.pool"),
        ("layers.3.moe:0", "expected LAYER:INDEX or POOL:INDEX"),
        ("pool.facts", "expected LAYER:INDEX or POOL:INDEX"),
        ("pool.facts:64", "pool.facts has the slots 0 to 63"),
        ("layers.1.peer:36", "layers.1.peer has the slots 0 to 35"),
        ("pool.facts:-1", "pool.facts has the slots 0 to 63"),
        ("pool.facts:²", "pool.facts has the slots 0 to 63"),
        ("pool.facts:" + "9" * 5000, "pool.facts has the slots 0 to 63"),
    ],
)
def test_a_slot_that_does_not_exist_is_a_mistake_that_names_those_that_do(
    tmp_path: Path, lookups: Any, slot: str, says: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        lookups.find_slot(planned(tmp_path).model, slot)


def test_a_model_without_memories_has_no_slots(lookups: Any) -> None:
    plan = make_plan(load_spec(REPO / "specs" / "demo" / "dense.toml"))
    with pytest.raises(UsageError, match="no memory or PEER layers"):
        lookups.reading_blocks(plan.model)


def test_lookups_of_a_trained_run(tmp_path: Path) -> None:
    spec, run = write(tmp_path / "spec.toml", SMALL), tmp_path / "run"
    assert memforge("train", spec, "--out", run).returncode == 0
    text = "Flights to [bold]Oslo"
    found = json.loads(memforge("inspect", run, "--text", text, "--json").stdout)
    assert found["layers"] == ["layers.0.memory", "layers.2.memory"]
    assert "".join(token["text"] for token in found["tokens"][1:]) == text
    assert all(len(token["reads"][path]) == 4 for token in found["tokens"] for path in found["layers"])
    shown = memforge("inspect", run, "--text", text).stdout
    first = found["tokens"][-1]["reads"]["layers.2.memory"][0]
    assert f"{first['slot']}:{first['weight']:.2f}" in shown.splitlines()[-1]
    write(tmp_path / "text.txt", text)
    args = ("inspect", run, "--file", tmp_path / "text.txt", "--slot", f"pool.facts:{first['slot']}", "--top", 50)
    readers = json.loads(memforge(*args, "--json").stdout)
    read = {token["position"]: token for token in readers["layers"]["layers.2.memory"]}
    last = read[len(found["tokens"]) - 1]
    assert last["weight"] == pytest.approx(first["weight"])
    assert (text.endswith(last["before"] + last["text"]), last["after"]) == (True, "")
    assert f"[{last['text']}]" in memforge(*args).stdout
    wrong = memforge("inspect", run, "--text", text, "--slot", "pool.facts:64")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --slot pool.facts:64: pool.facts has the slots 0 to 63\n")
