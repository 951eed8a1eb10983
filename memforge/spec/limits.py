"""Limits on spec text that are checked before any parser sees it.

The standard TOML parser is quadratic in the parts of a dotted key (81 s for a 100 KB key, CPython 3.11) and
recursive in nesting, so hostile text is refused by one linear scan.
"""

import re
from collections.abc import Iterator

MAX_BYTES = 256 * 1024
MAX_NESTING = 32
MAX_KEY_PARTS = 16
MAX_DIGITS = 64

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"""|' + r"'''.*?'''|"
    r'"(?:\\.|[^"\\\n])*"|'
    r"'[^'\n]*'|"
    r"(?P<comment>#[^\n]*)|"
    r"(?P<open>[\[{])|(?P<close>[\]}])|"
    r"(?P<word>[A-Za-z0-9_+-]+)|"
    r"(?P<dot>[ \t]*\.[ \t]*)|"
    r"(?P<end>[=,\n])",
    re.DOTALL,
)


def oversteps(text: str) -> Iterator[tuple[int, str]]:
    """Character offset and message of the first limit that `text` oversteps, if any."""
    depth = dots = 0
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "open":
            depth += 1
            dots = 0
        elif kind == "close":
            depth = max(0, depth - 1)
            dots = 0
        elif kind == "end":
            dots = 0
        elif kind == "dot":
            dots += 1
        if depth > MAX_NESTING:
            yield token.start(), f"values are nested more than {MAX_NESTING} deep"
            return
        if dots >= MAX_KEY_PARTS:
            yield token.start(), f"a dotted key has more than {MAX_KEY_PARTS} parts"
            return
        if kind == "word" and sum(c.isdigit() for c in token.group()) > MAX_DIGITS:
            yield token.start(), f"a number or key has more than {MAX_DIGITS} digits"
            return
