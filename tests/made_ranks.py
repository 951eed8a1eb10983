"""Functions of test modules run by several processes that are ranks of one run, over gloo.

    python tests/made_ranks.py WORLD MODULE:FUNCTION ARGUMENTS

The ranks are forked from one process, which has imported everything and computed nothing.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 300


def on_ranks(world: int, function: str, *arguments: Any) -> list[Any]:
    """What `module:function` returns on each of `world` ranks, as JSON has it; its failure is the caller's."""
    command = [sys.executable, __file__, str(world), function, json.dumps(arguments)]
    # The checks are of numbers: without a thread for each rank two cores would do little but change between them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    # All of it: what the C library says of a damaged heap stands before the stacks of all ranks.
    assert done.returncode == 0, done.stderr[-100_000:]
    return [json.loads(line) for line in done.stdout.splitlines()[-world:]]


def main(world: int, function: str, arguments: Sequence[Any]) -> int:
    sys.path.insert(0, str(HERE))
    module, _, name = function.partition(":")
    # All that ranks need; torch starts no thread before it computes.
    __import__("torch._dynamo")
    __import__("memforge.training.distributed")
    found = getattr(__import__(module), name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as directory:
        results = [Path(directory) / str(rank) for rank in range(world)]
        children = {_forked(rank, result, found, arguments): rank for rank, result in enumerate(results)}
        failed = 0
        while children:
            child, status = os.wait()
            rank = children.pop(child)
            if status and not failed:
                failed = 1
                sys.stderr.write(f"rank {rank} ended with {os.waitstatus_to_exitcode(status)}\n")
        if not failed:
            sys.stdout.write("".join(result.read_text() + "\n" for result in results))
    return failed


def _forked(rank: int, result: Path, function: Any, arguments: Sequence[Any]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        result.write_text(json.dumps(function(*arguments)))
        sys.stdout.flush()
        os._exit(0)
    except BaseException:  # noqa: BLE001  told to whoever has started the ranks
        sys.stderr.write(f"rank {rank}:\n{traceback.format_exc()}")
        sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])))
