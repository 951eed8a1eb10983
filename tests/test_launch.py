"""Ranks of one machine: their variables, their exit codes, and who gets which signal how often."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import write

from memforge.errors import DeviceError
from memforge.launch import launch

# One rank. What it is asked to do is its first argument; what happens to it, it notes in a file of its own.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path

rank, notes = int(os.environ["RANK"]), Path(os.environ["NOTES"])


def note(word):
    with (notes / f"rank-{rank}").open("a") as file:
        file.write(f"{word}\\n")


def heard(number, frame):
    note(signal.Signals(number).name)


def saves(number, frame):
    heard(number, frame)
    for stop in STOPS:
        signal.signal(stop, leaves)
    time.sleep(float(sys.argv[2]))
    sys.exit(128 + number)


def leaves(number, frame):
    heard(number, frame)
    os._exit(128 + number)


def wait(handler):
    for stop in STOPS:
        if signal.getsignal(stop) != signal.SIG_IGN:
            signal.signal(stop, handler)
    note("ready")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.02)


def all_reduce():
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    note(total.item())
    note("ready")
    while not (notes / "go").exists():
        time.sleep(0.02)
    dist.destroy_process_group()


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
task = sys.argv[1]
if task == "exit":
    os.write(1, b"out %d\\n" % rank)  # whole lines, however Python buffers
    os.write(2, b"err %d\\n" % rank)
    sys.exit(int(sys.argv[2:][rank]))
if task == "show":
    note(json.dumps([dict(os.environ), sys.argv, str(Path.cwd()) in sys.path]))
if task == "die":
    if rank == int(sys.argv[3]):
        os.kill(os.getpid(), signal.Signals[sys.argv[2]])
    wait({"and leave": leaves, "and hang": heard}[sys.argv[4]])
if task == "save":
    wait(saves)
if task == "hang":
    wait(heard)
if task == "all_reduce":
    all_reduce()
"""

WRAPPER = """
import resource, sys
from memforge import launch

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
launch.LAST_WORD = 0.3
nproc, grace, lost_grace, *arguments = sys.argv[1:]
sys.exit(launch.launch(arguments, int(nproc), module="worker", grace=float(grace), lost_grace=float(lost_grace)))
"""


class Launched:
    """A wrapper and the notes of its ranks."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.notes = directory, directory / "notes"
        self.notes.mkdir()
        write(directory / "modules" / "worker.py", WORKER)
        self.wrapper = write(directory / "bin" / "wrapper.py", WRAPPER)
        self.process: subprocess.Popen[str] | None = None

    def start(self, nproc: int, *arguments: object, grace: float = 60, lost_grace: float = 60, **how: object) -> None:
        self.nproc = nproc
        variables = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        variables["GLOO_SOCKET_IFNAME"] = "eth0"  # as the profile of a cluster has it
        self.process = subprocess.Popen(
            [sys.executable, str(self.wrapper), *map(str, (nproc, grace, lost_grace, *arguments))],
            cwd=self.directory,
            env={**variables, "PYTHONPATH": str(self.directory / "modules"), "NOTES": str(self.notes)},
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
        )

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def run(self, nproc: int, *arguments: object, **how: float) -> tuple[int, str, str]:
        self.start(nproc, *arguments, **how)
        return self.end()

    def noted(self, rank: int) -> list[str]:
        file = self.notes / f"rank-{rank}"
        return file.read_text().splitlines() if file.exists() else []

    def until(self, word: str) -> None:
        """Waits for every rank to have noted the word."""
        wait_for(lambda: all(word in self.noted(rank) for rank in range(self.nproc)))

    def ranks(self) -> list[int]:
        """The processes that the wrapper has started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]


def wait_for(true: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    made = Launched(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()  # which ends the ranks
        made.process.communicate()


@pytest.mark.parametrize("code", [0, 1, 5, 130])
def test_ranks_that_agree_speak_for_themselves(launched: Launched, code: int) -> None:
    ended, out, err = launched.run(2, "exit", code, code)
    assert ended == code
    assert sorted(out.splitlines()) == ["out 0", "out 1"]
    assert sorted(err.splitlines()) == ["err 0", "err 1"]


@pytest.mark.parametrize(("codes", "named"), [((0, 4), 4), ((7, 7), 7)])
def test_a_rank_that_leaves_alone_or_with_a_code_of_another_program_is_named(
    launched: Launched, codes: tuple[int, int], named: int
) -> None:
    ended, _, err = launched.run(2, "exit", *codes)
    assert ended == named
    assert re.fullmatch(rf"error: rank [01] \(process \d+\) left with exit code {named}.*", err.splitlines()[-1])


def test_a_killed_rank_is_named_and_the_others_are_ended(launched: Launched) -> None:
    code, out, err = launched.run(3, "die", "SIGKILL", 2, "and leave", lost_grace=0.3)
    assert (code, out) == (3, "")
    assert re.fullmatch(
        r"error: rank 2 \(process \d+\) was killed by SIGKILL; the other ranks were ended; "
        r"--resume auto goes on from the last checkpoint\n",
        err,
    )
    assert [launched.noted(rank) for rank in range(3)] == [["ready", "SIGTERM"], ["ready", "SIGTERM"], []]


def test_a_rank_that_hangs_after_another_died_is_killed(launched: Launched) -> None:
    code, _, err = launched.run(2, "die", "SIGSEGV", 0, "and hang", lost_grace=0.3)
    assert code == 3
    assert "rank 0 " in err
    assert "SIGSEGV; the other ranks were ended" in err
    assert launched.noted(1) == ["ready", "SIGTERM"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_reaches_each_rank_once_and_they_have_time_to_save(
    launched: Launched, number: signal.Signals, code: int
) -> None:
    launched.start(2, "save", 0.5, lost_grace=0)
    launched.until("ready")
    launched.process.send_signal(number)
    assert launched.end() == (code, "", "")
    assert [launched.noted(rank) for rank in range(2)] == [["ready", number.name]] * 2


def test_a_second_signal_ends_ranks_that_save(launched: Launched) -> None:
    launched.start(2, "save", 60)
    launched.until("ready")
    launched.process.send_signal(signal.SIGTERM)
    launched.until("SIGTERM")
    launched.process.send_signal(signal.SIGINT)
    assert launched.end() == (130, "", "")
    assert [launched.noted(rank) for rank in range(2)] == [["ready", "SIGTERM", "SIGINT"]] * 2


def test_a_second_signal_ends_ranks_that_do_not_hear_it(launched: Launched) -> None:
    launched.start(2, "hang")
    launched.until("ready")
    launched.process.send_signal(signal.SIGTERM)
    launched.until("SIGTERM")
    launched.process.send_signal(signal.SIGTERM)
    code, _, err = launched.end()
    assert code == 143
    assert re.fullmatch(r"error: rank 0 \(process \d+\) did not stop in time and was killed\n", err)


def test_grace_ends(launched: Launched) -> None:
    launched.start(2, "hang", grace=0.3)
    launched.until("ready")
    launched.process.send_signal(signal.SIGTERM)
    code, _, err = launched.end()
    assert code == 143
    assert re.fullmatch(r"error: rank 0 \(process \d+\) did not stop in time and was killed\n", err)
    assert launched.noted(1) == ["ready", "SIGTERM"]


def test_under_nohup_a_lost_terminal_is_nothing(launched: Launched) -> None:
    launched.start(2, "save", 0, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    launched.until("ready")
    launched.process.send_signal(signal.SIGHUP)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end() == (143, "", "")
    assert launched.noted(0) == ["ready", "SIGTERM"]


def test_ctrl_c_in_a_terminal_reaches_each_rank_once(launched: Launched) -> None:
    keyboard, terminal = os.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    launched.start(2, "save", 0.2, preexec_fn=lambda: os.login_tty(os.dup(terminal)), **streams)
    launched.until("ready")
    sessions = {os.getsid(pid) for pid in (launched.process.pid, *launched.ranks())}
    assert len(sessions) == 3
    os.write(keyboard, b"\x03")
    assert launched.end()[0] == 130
    assert [launched.noted(rank) for rank in range(2)] == [["ready", "SIGINT"]] * 2
    assert os.read(keyboard, 1000) == b"^C"
    os.close(keyboard)
    os.close(terminal)


def test_ranks_stop_when_the_wrapper_is_killed(launched: Launched) -> None:
    launched.start(2, "save", 0)
    launched.until("ready")
    launched.process.kill()
    launched.until("SIGTERM")
    assert launched.end()[0] == -signal.SIGKILL  # and the pipes are closed


def test_ranks_find_the_variables_of_torchrun(launched: Launched) -> None:
    assert launched.run(3, "show", "--set", "a b=$c")[0] == 0
    for rank in range(3):
        variables, arguments, finds_cwd = json.loads(launched.noted(rank)[0])
        assert (variables["RANK"], variables["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (variables["WORLD_SIZE"], variables["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert (variables["MASTER_ADDR"], variables["MEMFORGE_LAUNCHED"]) == ("127.0.0.1", "1")
        assert int(variables["MASTER_PORT"]) > 0
        assert variables["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 3))
        assert arguments[1:] == ["show", "--set", "a b=$c"]
        assert not finds_cwd, "a console script finds no modules there"


def test_ranks_reduce_and_nothing_listens_beyond_the_loopback_interface(launched: Launched) -> None:
    launched.start(2, "all_reduce")
    launched.until("ready")
    listening = [address for pid in (launched.process.pid, *launched.ranks()) for address in listens_on(pid)]
    (launched.notes / "go").touch()
    code, out, err = launched.end()
    assert code == 0, out + err
    assert [launched.noted(rank)[0] for rank in range(2)] == ["3.0", "3.0"]
    assert len(listening) >= 3, "the store, and one socket of each rank"
    assert set(listening) <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def listens_on(pid: int) -> list[str]:
    """The addresses of a process's listening sockets, as the kernel writes them."""
    proc = Path(f"/proc/{pid}")
    files = {str(file.readlink()) for file in (proc / "fd").iterdir()}
    rows = [row.split() for table in ("tcp", "tcp6") for row in (proc / "net" / table).read_text().splitlines()]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in files]


def test_a_rank_that_cannot_be_started_ends_the_launch() -> None:
    with pytest.raises(DeviceError, match="rank 0 of 2 cannot be started: Argument list too long"):
        launch(["x" * 2**20], 2)


def test_the_command_line_needs_no_torch_to_import_it() -> None:
    subprocess.run(
        [sys.executable, "-c", "import memforge.launch, sys; assert 'torch' not in sys.modules"], check=True, timeout=30
    )
