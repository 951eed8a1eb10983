"""Runs as they are read from their files and told on the terminal."""

import json
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import memforge
from made_runs import POOL, ROUTER, TOKENS_PER_STEP, change, lines, make_run, record_of, summary

from memforge.errors import StorageError
from memforge.report.html import run_page
from memforge.report.inspect import ASCII, BLOCKS, duration, sparkline
from memforge.report.run import read_run


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
