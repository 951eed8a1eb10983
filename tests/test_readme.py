"""The README and docs/profile.md are run: the spec, the commands, and the outputs they show."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, memforge, write

README = (REPO / "README.md").read_text(encoding="utf-8")
PAGES = README + (REPO / "docs" / "profile.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGES, re.DOTALL | re.MULTILINE)
SPEC = next(text for kind, text in BLOCKS if kind == "toml")
# Shown for what they say when a claim does not hold.
FAILING = ("memforge check specs/demo/moe.toml --set parity.tolerance.flops=0.001",)
CONSOLES = [text.splitlines() for kind, text in BLOCKS if kind == "console"]
# What a command of Python prints, in Markdown.
QUOTED = re.findall(r"^<!-- python -m ([^\n]+) -->\n\n(.*?)\n^<!-- end -->", PAGES, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the README's spec, its misspelt twin and the repository's specs."""
    path = tmp_path_factory.mktemp("readme")
    write(path / "spec.toml", SPEC)
    write(path / "typo.toml", SPEC.replace("num_heads = 4\n", "num_head = 4\n").replace("top_k = 16", "top_k = 128"))
    (path / "specs").symlink_to(REPO / "specs")
    for page in REPO.glob("docs/*.md"):
        write(path / "my-texts" / f"{page.stem}.txt", page.read_text(encoding="utf-8"))
    return path


def test_every_command_line_works(directory: Path) -> None:
    lines = [line[2:] for console in CONSOLES for line in console if line.startswith("$ memforge ")]
    assert len(lines) >= 10
    for line in lines:
        short = ("--max-steps", 3) if "text-demo" in line else ()
        done = memforge(*shlex.split(line)[1:], *short, cwd=directory)
        expected = 2 if "typo" in line else 1 if line in FAILING else 0
        assert done.returncode == expected, (line, done.stderr)


def test_shown_outputs_are_real(directory: Path) -> None:
    shown = [console for console in CONSOLES if len(console) > 1 and not console[1].startswith("$")]
    assert len(shown) == 8
    for command, *output in shown:
        done = memforge(*shlex.split(command)[2:], cwd=directory)
        real = "\n".join(line.rstrip() for line in (done.stdout + done.stderr).splitlines()).split("\n\n")
        # "..." stands for sections that are left out.
        parts = [part for part in "\n".join(output).split("\n\n") if part != "..."]
        assert parts == [part for part in real if part in parts], "run benchmarks/readme.py to refresh the README"
        assert len(parts) == len(real) or "..." in output


def test_quoted_tables_are_real() -> None:
    assert len(QUOTED) == 1
    for command, quoted in QUOTED:
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)], cwd=REPO, capture_output=True, text=True, check=True
        )
        assert quoted == done.stdout, "run benchmarks/readme.py to refresh the README"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


def test_the_map_names_what_exists() -> None:
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"^    ((?:memforge|kernels|benchmarks|specs)/\S*)  ", text, re.MULTILINE)
    assert len(paths) > 10
    for path in paths:
        assert (REPO / path).exists(), path
