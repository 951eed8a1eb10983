"""The command line as a user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, SMALL, memforge, write

from memforge import __version__

DEMO = REPO / "specs" / "demo"
# Any import of torch fails in this process, as where torch is not installed.
NO_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "numpy", "tokenizers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from memforge.__main__ import main
sys.argv = ["memforge", *sys.argv[1:]]
main()
"""
# Module globals are destroyed as the interpreter is taken down, and no sooner.
LEAVING = """
import atexit, sys
class Kept:
    def __del__(self):
        print("taken down", flush=True)
kept = Kept()
atexit.register(print, "left")
from memforge.__main__ import main
sys.argv = ["memforge", "--version"]
main()
"""


def test_exit_handlers_run_and_the_interpreter_is_not_taken_down() -> None:
    run = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [f"memforge {__version__}", "left"]


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["check", DEMO / "memory.toml"],
        ["schema"],
        ["render", DEMO / "memory.toml"],
        ["profile", DEMO / "memory.toml", "--json"],
        ["profile", DEMO / "memory.toml", "--against", DEMO / "dense.toml"],
        *([command, "--help"] for command in ("build", "train", "eval", "generate", "init")),
    ],
    ids=lambda args: " ".join(Path(str(a)).name for a in args),
)
def test_what_needs_no_torch_never_imports_it(args: list[object]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_profile_json_has_the_promised_shape() -> None:
    done = memforge("profile", DEMO / "memory.toml", "--json", "--against", DEMO / "dense.toml")
    assert done.returncode == 0
    cost = json.loads(done.stdout)
    assert set(cost["params"]) >= {"total", "active", "by_kind"}
    assert set(cost["flops_per_token"]) >= {"forward", "backward", "by_kind"}
    assert len(cost["layers"]) == 6
    assert cost["seq_len"] == 64
    axes = cost["parity"]["axes"]
    assert list(axes) == ["params", "active_params", "flops", "bytes"]
    assert all(set(axis) == {"value", "baseline", "ratio", "tolerance", "ok"} for axis in axes.values())
    assert axes["flops"]["value"] == cost["flops_per_token"]["forward"] + cost["flops_per_token"]["backward"]
    assert axes["params"]["value"] == cost["params"]["total"]
    assert axes["flops"]["ok"] is cost["parity"]["ok"] is True


def test_a_claim_that_fails_is_reported_in_full_and_exit_code_1(tmp_path: Path) -> None:
    write(tmp_path / "dense.toml", SMALL)
    claim = '\n[parity]\nagainst = "dense.toml"\n'
    spec = write(tmp_path / "wide.toml", SMALL.replace("hidden_dim = 48", "hidden_dim = 300") + claim)
    alone = memforge("profile", spec, "--json")
    assert (alone.returncode, json.loads(alone.stdout)["parity"]["ok"]) == (1, False)
    shown = memforge("profile", spec)
    assert (shown.returncode, len(shown.stderr.splitlines())) == (1, 1)
    assert "excluded: norms" in shown.stdout
    assert "parity fails: small against small: flops" in shown.stderr
    assert memforge("profile", spec, "--no-parity").returncode == 0
    assert memforge("profile", spec, "--no-parity", "--against", tmp_path / "dense.toml").returncode == 2
    checked, record = memforge("check", spec), memforge("check", spec, "--json")
    assert (checked.returncode, len(checked.stdout.splitlines())) == (1, 1)
    assert "not matched: small, 4 layers" in checked.stdout
    assert "outside 1 +- 0.05" in checked.stderr
    (error,) = json.loads(record.stdout)["errors"]
    assert (record.returncode, json.loads(record.stdout)["ok"], error["key"]) == (1, False, "parity")
    for extra in ([], ["--json"]):
        assert memforge("profile", spec, "--against", tmp_path / "dense.toml", *extra).returncode == 1
    loose = memforge("profile", spec, "--against", tmp_path / "dense.toml", "--tolerance", "flops=9")
    assert loose.returncode == 0
    trained = memforge("train", spec, "--out", tmp_path / "run")
    assert (trained.returncode, "parity fails" in trained.stderr) == (1, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["check", "absent.toml"], 2),
        (["check"], 2),
        (["chekc", "x.toml"], 2),
        (["check", "small.toml", "--set", "train.steps"], 2),
        (["profile", "small.toml", "--seq-len", "0"], 2),
        (["profile", "small.toml", "--seq-len", "many"], 2),
        (["profile", "small.toml", "--against", "absent.toml"], 2),
        (["profile", "small.toml", "--tolerance", "flops=1"], 2),
        (["profile", "small.toml", "--against", "small.toml", "--tolerance", "speed=1"], 2),
        (["build", "small.toml", "--out", "small.toml"], 4),
        (["train", "small.toml", "--device", "tpu"], 2),
        (["train", "small.toml", "--set", "data.num_facts=1000000"], 2),
        (["train", "."], 2),
        (["train", "small.toml", "--out", "small.toml/run"], 4),
        (["eval", "absent"], 4),
        (["eval", "."], 4),
        (["generate", "absent", "--prompt", "x"], 4),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_have_an_exit_code_and_one_screen(small: Path, args: list[str], code: int) -> None:
    done = memforge(*args, cwd=small.parent, COLUMNS="200")
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert 1 <= len(done.stderr.splitlines()) <= 25
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert [p.name for p in small.parent.iterdir()] == ["small.toml"]


def test_one_report_has_one_length(tmp_path: Path) -> None:
    write(tmp_path / "dense.toml", SMALL.replace("max_seq_len = 96", "max_seq_len = 64"))
    claim = '\n[parity]\nagainst = "dense.toml"\ntolerance = { params = 0 }\n'
    spec = write(tmp_path / "claim.toml", SMALL + claim)
    untrained = write(tmp_path / "untrained.toml", SMALL[: SMALL.index("[train]")] + claim)
    against = ["--against", tmp_path / "dense.toml"]
    cases: list[tuple[list[object], int]] = [([spec], 48), ([spec, "--seq-len", 20], 20), ([untrained], 64)]
    cases += [([*args, *against], length) for args, length in cases]
    for args, length in cases:
        done = memforge("profile", *args, "--json")
        assert done.returncode == 0, done.stderr
        cost = json.loads(done.stdout)
        assert (cost["seq_len"], cost["parity"]["seq_len"]) == (length, length)
        assert cost["parity"]["axes"]["flops"]["value"] == cost["flops_per_token"]["total"]
    checked = json.loads(memforge("check", spec, "--json").stdout)
    assert checked["parity"]["seq_len"] == 48
    assert checked["parity"]["axes"]["flops"]["value"] == checked["flops"]
    longer = memforge("profile", spec, *against, "--seq-len", 80)
    assert (longer.returncode, "takes at most 64 tokens" in longer.stderr) == (2, True)


def test_the_claim_of_a_spec_compared_with_does_not_matter(tmp_path: Path) -> None:
    other = write(tmp_path / "other.toml", SMALL + '\n[parity]\nagainst = "absent.toml"\n')
    done = memforge("profile", write(tmp_path / "small.toml", SMALL), "--against", other)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["flops=1000"], "flops=1000: X must be a number from 0 to 100"),
        (["flops=inf"], "from 0 to 100"),
        (["flops=nan"], "from 0 to 100"),
        (["flops=-1"], "from 0 to 100"),
        (["flops=wide"], "from 0 to 100"),
        (["flops=1=2"], "from 0 to 100"),
        (["flops"], "expected AXIS=X with AXIS in params, active_params, flops, bytes"),
        (["flops=1", " flops = 2"], "flops has a tolerance already"),
    ],
)
def test_tolerances_that_mean_nothing_are_refused(small: Path, given: list[str], message: str) -> None:
    options = [part for item in given for part in ("--tolerance", item)]
    done = memforge("profile", small, "--against", small, *options)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert message in done.stderr


@pytest.mark.parametrize(
    "raised", ["ModuleNotFoundError(\"No module named 'torch'\", name='torch')", "ImportError('x')"]
)
def test_a_missing_package_is_named(small: Path, tmp_path: Path, raised: str) -> None:
    blocked = write(tmp_path / "blocked" / "torch" / "__init__.py", f"raise {raised}\n").parent.parent
    path = os.pathsep.join([str(blocked), os.environ.get("PYTHONPATH", "")])
    commands = (["build", small, "--out", tmp_path / "out"], ["train", small, "--out", tmp_path / "run"])
    for command in (*commands, ["profile", small, "--device", "cpu"], ["eval", tmp_path], ["generate", ".", "-p", "x"]):
        done = memforge(*command, PYTHONPATH=path)
        assert (done.returncode, len(done.stderr.splitlines())) == (3, 1), done.stderr
        assert done.stderr.startswith("error: this command needs torch, which is not installed")
        assert done.stdout == ""
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "run").exists()


def test_check_is_one_line(small: Path) -> None:
    done = memforge("check", small)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert ": ok: small, 4 layers, " in done.stdout


def test_errors_are_never_wrapped_off_a_terminal(small: Path, tmp_path: Path) -> None:
    deep = write(tmp_path / ("d" * 100) / ("e" * 100) / "bad.toml", SMALL.replace("num_facts = 12", "num_fact = 12"))
    done = memforge("check", deep, COLUMNS="20", NO_COLOR="1")
    assert done.stderr.splitlines()[0] == f"{deep}:28:1: unknown key `num_fact`"


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m memforge schema | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.stderr == ""


@pytest.mark.parametrize(
    "shell", ["{} schema >&-", "{} --help >/dev/full", "{} check absent.toml 2>&-", "{} schema <&-"]
)
def test_streams_that_are_closed_or_full_end_quietly(shell: str) -> None:
    command = shell.format(f"{sys.executable} -m memforge")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert done.returncode == (2 if "absent" in shell else 4 if "full" in shell else 0)


@pytest.mark.parametrize("args", [["profile", "x.toml", "--seq-len", "many"], ["eval", "absent"], ["check", "x.toml"]])
def test_errors_are_one_json_document_of_one_shape(args: list[str], tmp_path: Path) -> None:
    record = json.loads(memforge(*args, "--json", cwd=tmp_path).stdout)
    assert record["ok"] is False
    (error,) = record["errors"]
    assert set(error) == {"message", "file", "line", "column", "end_column", "key", "help", "related"}


def test_help_and_commands_stay_what_they_are(golden: object) -> None:
    text = "".join(memforge(*args, COLUMNS="100").stdout for args in (["--help"], ["train", "--help"]))
    golden("help.txt", text)  # type: ignore[operator]


def test_the_reference_page_is_fresh_and_names_every_key() -> None:
    done = memforge("schema", "--markdown")
    assert done.returncode == 0
    page = (REPO / "docs" / "spec.md").read_text(encoding="utf-8")
    assert page == done.stdout, "memforge schema --markdown > docs/spec.md"
    schema = json.loads(memforge("schema").stdout)
    keys = {key for table in schema["$defs"].values() for key in table["properties"]}
    assert [key for key in sorted(keys) if f"| `{key}` |" not in page] == []


def test_what_looks_ahead_is_said_in_every_report(tmp_path: Path) -> None:
    spec = write(
        tmp_path / "moe.toml", SMALL.replace("top_k = 2, hidden_dim = 24", 'router = "expert_choice", hidden_dim = 24')
    )
    out, run = tmp_path / "out", tmp_path / "run"
    causal = write(tmp_path / "causal.toml", SMALL)
    commands = (
        ["check", spec],
        ["profile", spec],
        ["profile", causal, "--against", spec, "--tolerance", "flops=1"],
        ["build", spec, "--out", out],
        ["train", spec, "--out", run],
        ["eval", run],
    )
    for command in commands:
        done = memforge(*command)
        assert done.returncode == 0, done.stderr
        assert "layers.3.moe: expert choice is not causal" in done.stdout + done.stderr, command
    (caveat,) = json.loads(memforge("profile", spec, "--json").stdout)["caveats"]
    assert caveat.startswith("layers.3.moe: expert choice is not causal")
    assert json.loads((out / "cost.json").read_text())["caveats"] == [caveat]
    for command in (["check", spec], ["build", spec, "--out", out]):
        assert json.loads(memforge(*command, "--json").stdout)["caveats"] == [caveat]
    compared = json.loads(memforge(*commands[2], "--json").stdout)
    assert (compared["caveats"], compared["parity"]["caveats"]) == ([], [f"small: {caveat}"])
