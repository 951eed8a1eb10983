"""Shared fixtures. `pytest --update-golden` rewrites golden files; the diff is the review."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import server

# Threads that spin while they wait take the cores of the tests beside this one. Before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A script's background job ignores Ctrl-C, and so would every command that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"

# A small model that uses every kind; tests change single lines of it.
SMALL = """\
[model]
name = "small"
dim = 32
num_layers = 4
vocab_size = 300
max_seq_len = 96

[attention]
num_heads = 4
num_kv_heads = 2

[ffn]
hidden_dim = 48

[pool.facts]
num_sub_keys = 8

[[place]]
layers = [0, 2]
block = { kind = "memory", pool = "facts", num_heads = 2, top_k = 4, key_dim = 16, gate = "swilu", qk_norm = true }

[[place]]
layers = [3]
block = { kind = "moe", num_experts = 4, top_k = 2, hidden_dim = 24 }

[data]
kind = "facts"
num_facts = 12

[train]
steps = 4
batch_size = 4
seq_len = 48
learning_rate = 1e-3
log_every = 1
"""


# A layer of single-neuron experts; it goes before the [data] of SMALL.
PEER = '\n[[place]]\nlayers = [1]\nblock = { kind = "peer", num_sub_keys = 6, num_heads = 2, top_k = 3, key_dim = 8 }\n'


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with tests/golden/NAME, or write it there under --update-golden."""

    def compare(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        assert text == file.read_text(encoding="utf-8"), f"{name} differs; pytest --update-golden rewrites it"

    return compare


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The small spec in a file of its own."""
    return write(tmp_path / "small.toml", SMALL)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and shards so small that there are several."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("memforge.training.data.shards.SHARD_TOKENS", 64)
    return tmp_path / "cache" / "memforge" / "data"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def memforge(
    *args: object, cwd: Path | None = None, timeout: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; with an environment of its own, in a new interpreter."""
    if not env:
        return server().run([str(arg) for arg in args], cwd, timeout)
    return subprocess.run(
        [sys.executable, "-m", "memforge", *map(str, args)],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
