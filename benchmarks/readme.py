"""Run the commands whose output the README and docs/profile.md show, and write their real output into them.

Those are the blocks of a console, and tables in Markdown below a comment that is the command.
"""

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PAGES = (REPO / "README.md", REPO / "docs" / "profile.md")
SHOWN = re.compile(r"^(```console\n\$ (memforge [^\n]+)\n)(?!\$)(.*?)^```", re.DOTALL | re.MULTILINE)
QUOTED = re.compile(r"^(<!-- python -m ([^\n]+) -->\n\n)(.*?)\n(?=^<!-- end -->)", re.DOTALL | re.MULTILINE)


def output_of(command: str, directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1, 2), done.stderr
    return "".join(line.rstrip() + "\n" for line in (done.stdout + done.stderr).splitlines())


def refreshed(shown: str, real: str) -> str:
    """The real output; where the README leaves sections out ("..."), only those that it shows, by their first words."""
    if "\n...\n" not in shown:
        return real
    parts = shown.strip("\n").split("\n\n")
    fresh = {title_of(section): section for section in real.strip("\n").split("\n\n")}
    return "\n\n".join(part if part == "..." else fresh[title_of(part)] for part in parts) + "\n"


def title_of(section: str) -> tuple[str, ...]:
    return tuple(section.split()[:2])


def main() -> None:
    spec = re.search(r"^```toml\n(.*?)^```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert spec is not None
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "specs").symlink_to(REPO / "specs")
        typo = spec[1].replace("num_heads = 4\n", "num_head = 4\n").replace("top_k = 16", "top_k = 128")
        (directory / "typo.toml").write_text(typo, encoding="utf-8")
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            text = SHOWN.sub(lambda m: m[1] + refreshed(m[3], output_of(m[2], directory)) + "```", text)
            text = QUOTED.sub(lambda m: m[1] + output_of(m[2], REPO) + "\n", text)
            page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
