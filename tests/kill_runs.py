"""Train a plan in process after process, each killed at a random moment after its first step; the last one ends well.

    python tests/kill_runs.py PLAN RUN KILLS SEED

The processes are forked from this one, which has imported everything and computed nothing, so that a kill costs a
second and not an import of torch.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch._dynamo  # noqa: F401  training loads it

from memforge.errors import MemforgeError
from memforge.plan import read_plan
from memforge.training import Reporter, train


def train_in_child(plan: Path, run: Path) -> None:
    train(read_plan(plan), run, device="cpu", resume="auto" if run.exists() else None, reporter=Reporter())


def started(plan: Path, run: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        train_in_child(plan, run)
        os._exit(0)
    except MemforgeError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(error.exit_code)


def is_running(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG) == (0, 0)


def first_step_is_made(child: int, run: Path, size: int) -> bool:
    """Whether the log has grown: a process logs its steps as it makes them."""
    while is_running(child):
        speed = run / "speed.jsonl"
        if speed.exists() and speed.stat().st_size > size:
            return True
        time.sleep(0.005)
    return False


def main() -> None:
    plan, run, kills, chance = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
    made = 0
    while made < kills:
        speed = run / "speed.jsonl"
        size = speed.stat().st_size if speed.exists() else 0
        child = started(plan, run)
        if not first_step_is_made(child, run, size):
            raise SystemExit(f"the run ended after {made} kills; give it more steps")
        time.sleep(chance.uniform(0, 0.25))
        if not is_running(child):
            raise SystemExit(f"the run ended after {made} kills; give it more steps")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        made += 1
    child = started(plan, run)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, code
    print(made)


if __name__ == "__main__":
    main()
