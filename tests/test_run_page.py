"""The page of a run: its charts, and what a real browser makes of it."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write
from made_runs import change, make_run, record_of
from test_report import Page, browse, needs_browser

from memforge.report.html import run_page
from memforge.report.html.charts import SMALL as SMALL_FRAME
from memforge.report.html.charts import WIDE, Look, chart, value_axis
from memforge.report.run import Series, read_run

PLAIN = Look()


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
