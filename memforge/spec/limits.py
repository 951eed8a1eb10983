"""Limits on spec text that are checked before any parser sees it.

The standard TOML parser is quadratic in the parts of a dotted key (81 s for a 100 KB key, CPython 3.11) and
recursive in nesting, so hostile text is refused by one linear scan.
"""

import re
from collections.abc import Iterator

MAX_BYTES = 256 * 1024
MAX_NESTING = 32
MAX_KEY_PARTS = 16
# Python converts integers of up to 4,300 decimal digits to text; a hexadecimal digit is 1.2 decimal ones.
MAX_DIGITS = 1000

# Every alternative consumes what it cannot match to the end of (an unterminated string, say), so that no character is
# looked at from two starting points. A multi-line string may end in up to two quotes of its own.
_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"{3,5}|\Z)|'
    r"'''.*?(?:'{3,5}|\Z)|"
    r'"(?:\\.|[^"\\\n])*"?|'
    r"'[^'\n]*'?|"
    r"#[^\n]*|"
    r"(?P<open>[\[{])|(?P<close>[\]}])|"
    r"(?P<number>[+-]?[0-9][A-Za-z0-9_]*)|"
    r"[A-Za-z_][A-Za-z0-9_+-]*|"
    r"(?P<dot>\.)|"
    r"(?P<end>[=,\n])",
    re.DOTALL,
)


def oversteps(text: str) -> Iterator[tuple[int, str]]:
    """Character offset and message of the first limit that `text` oversteps, if any."""
    depth = dots = 0
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        depth += (kind == "open") - (kind == "close" and depth > 0)
        dots = 0 if kind in ("open", "close", "end") else dots + (kind == "dot")
        if depth > MAX_NESTING:
            yield token.start(), f"values are nested more than {MAX_NESTING} deep"
            return
        if dots >= MAX_KEY_PARTS:
            yield token.start(), f"a dotted key has more than {MAX_KEY_PARTS} parts"
            return
        if kind == "number" and len(token.group()) > MAX_DIGITS:
            yield token.start(), f"a number has more than {MAX_DIGITS} digits"
            return
