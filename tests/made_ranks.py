"""Functions of test modules run by several processes that are ranks of one run, over gloo."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 300


def on_ranks(world: int, function: str, *arguments: Any) -> list[Any]:
    """What `module:function` returns on each of `world` ranks, as JSON has it; its failure is the caller's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The checks are of numbers: without a thread for each rank two cores would do little but change between them.
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, function, json.dumps(arguments)]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        ended = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [
        (rank, err) for rank, (process, (_, err)) in enumerate(zip(started, ended, strict=True)) if process.returncode
    ]
    assert not failed, "\n".join(f"rank {rank}: {err[-4000:]}" for rank, err in failed)
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def main(function: str, arguments: Sequence[Any]) -> None:
    sys.path.insert(0, str(HERE))
    module, _, name = function.partition(":")
    found = getattr(__import__(module), name)(*arguments)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
