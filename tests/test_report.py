"""The profile as CSV and as one HTML page, the latter in a real browser."""

import csv
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPO, SMALL, memforge, write

DEMO, PAPER = REPO / "specs" / "demo", REPO / "specs" / "paper"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="not run: no Chromium")


@pytest.mark.parametrize("spec", ["memory-plus-373m", "moe-1.3b", "peer-134m"])
def test_the_rows_of_the_csv_add_up_to_the_ledger(spec: str) -> None:
    cost = json.loads(memforge("profile", PAPER / f"{spec}.toml", "--json", "--no-parity").stdout)
    rows = list(csv.DictReader(io.StringIO(memforge("profile", PAPER / f"{spec}.toml", "--csv", "--no-parity").stdout)))
    assert [row["path"] for row in rows[:3]] == ["embedding", "norm", "head"]

    def total(column: str) -> float:
        return sum(float(row[column]) for row in rows)

    assert total("params") == cost["params"]["total"]
    assert total("active_params") == cost["params"]["active"]
    assert total("bytes_read") == cost["bytes_per_token"]["read"]
    assert total("flops_forward") == pytest.approx(cost["flops_per_token"]["forward"], rel=1e-12)
    assert total("flops_backward") == pytest.approx(cost["flops_per_token"]["backward"], rel=1e-12)


def test_several_baselines_are_compared_and_any_failure_counts(tmp_path: Path) -> None:
    wide = write(
        tmp_path / "wide.toml", SMALL.replace("hidden_dim = 48", "hidden_dim = 200").replace('"small"', '"wide"')
    )
    spec = write(tmp_path / "small.toml", SMALL)
    same = write(tmp_path / "same.toml", SMALL.replace('"small"', '"same"'))
    both = memforge("profile", spec, "--against", same, "--against", wide)
    assert both.returncode == 1
    assert "parity fails: small against wide: flops" in both.stderr
    assert "small beside each" in both.stdout
    record = json.loads(memforge("profile", spec, "--against", same, "--against", wide, "--json").stdout)
    assert [(c["against"], c["ok"]) for c in record["comparisons"]] == [("same", True), ("wide", False)]
    assert record["parity"] == record["comparisons"][0]
    assert memforge("profile", spec, "--against", same).returncode == 0
    absent = memforge("profile", spec, "--against", same, "--against", tmp_path / "absent.toml")
    assert (absent.returncode, "absent.toml:1:1: no such file" in absent.stderr) == (2, True)


class Page(html.parser.HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def report(tmp_path: Path, *args: object) -> str:
    file = tmp_path / "report.html"
    memforge("profile", *args, "--html", file)
    return file.read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_and_says_what_the_ledger_says(tmp_path: Path) -> None:
    args = (DEMO / "memory.toml", "--against", DEMO / "dense.toml", "--against", DEMO / "moe.toml")
    text, cost = report(tmp_path, *args), json.loads(memforge("profile", *args, "--json").stdout)
    page = Page(text)
    assert page.references == ["data:,"]
    assert "url(" not in text
    assert re.findall(r"https?://[^\s\"<]+", text) == []
    for number in (cost["params"]["total"], cost["params"]["active"], cost["parity"]["axes"]["flops"]["value"]):
        assert f"{number:,}" in page.words
    assert text.count("<h2>Parity with") == 2
    assert report(tmp_path, *args) == text


def test_text_of_a_spec_is_text_in_the_page(tmp_path: Path) -> None:
    """Names are letters and digits, paths are not."""
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    write(folder / "wide.toml", SMALL.replace("hidden_dim = 48", "hidden_dim = 300").replace('"small"', '"wide"'))
    spec = write(folder / "small.toml", SMALL)
    text = report(tmp_path, spec, "--against", folder / "wide.toml")
    assert "<img" not in text
    assert "&lt;img src=x" in text


def test_a_page_that_cannot_be_written_ends_with_4(tmp_path: Path) -> None:
    done = memforge("profile", DEMO / "dense.toml", "--html", tmp_path / "absent" / "r.html")
    assert (done.returncode, done.stderr.startswith("error: ")) == (4, True)
    assert "r.html" in done.stderr


def browse(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    # The network is taken away by name and by proxy; what the page logs comes out on stderr.
    alone = ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9", "--disable-background-networking"]
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--no-first-run"]
    profile = f"--user-data-dir={page.parent / 'browser'}"
    return subprocess.run(
        [CHROMIUM, *quiet, *alone, profile, "--virtual-time-budget=3000", *flags, page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@needs_browser
@pytest.mark.parametrize("spec", ["memory-plus-373m", "moe-134m", "memory-plus-1.3b-64m"])
def test_a_browser_without_network_shows_the_page_and_complains_of_nothing(tmp_path: Path, spec: str) -> None:
    report(tmp_path, PAPER / f"{spec}.toml")
    shown = browse(tmp_path / "report.html", "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert spec in shown.stdout
    assert shown.stdout.count("<svg") >= 4


@needs_browser
def test_a_table_is_sorted_by_the_keyboard(tmp_path: Path) -> None:
    """Focus the header of a column and press enter, as a browser does for a button: click."""
    text = report(tmp_path, PAPER / "memory-plus-373m.toml")
    press = """<script>
    const button = document.querySelectorAll("[aria-label='By kind'] th button")[1];
    button.focus();
    if (document.activeElement !== button) throw new Error("a header cannot be focused");
    button.click();
    </script></body>"""
    (tmp_path / "report.html").write_text(text.replace("</body>", press), encoding="utf-8")
    shown = browse(tmp_path / "report.html", "--dump-dom")
    assert "CONSOLE" not in shown.stderr, shown.stderr
    table, unsorted = (
        page.partition('aria-label="By kind"')[2].partition("</table>")[0] for page in (shown.stdout, text)
    )
    assert ('aria-sort="ascending"' in table, "aria-sort" in unsorted) == (True, False)
    before, after = (
        [int(n) for n in re.findall(r"<td>\w+</td><td data-value=\"(\d+)\"", t)] for t in (unsorted, table)
    )
    assert len(after) == 6
    assert after == sorted(before) != before


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_nothing_sticks_out_of_the_page_at_either_width(tmp_path: Path, width: int, height: int) -> None:
    """Wide figures scroll inside their frames; the page itself does not."""
    text = report(tmp_path, PAPER / "memory-plus-373m.toml", "--against", PAPER / "dense-373m.toml")
    ask = '<script>document.title = "wide:" + document.documentElement.scrollWidth + ":" + innerWidth</script></body>'
    (tmp_path / "report.html").write_text(text.replace("</body>", ask), encoding="utf-8")
    shown = browse(tmp_path / "report.html", f"--window-size={width},{height}", "--dump-dom")
    found = re.search(r"<title>wide:(\d+):(\d+)</title>", shown.stdout)
    assert found is not None
    assert int(found[1]) <= int(found[2])
