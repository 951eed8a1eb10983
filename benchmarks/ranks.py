"""Weak scaling: the same work for each rank, on one rank and on two, and the share of a step spent on others.

    python benchmarks/ranks.py          # about 5 minutes on two cores

Each rank has one thread and 32 sequences. One rank and each mesh of two take turns; the figures are medians over all
steps of all rounds. "In collectives" is the time that the thread that trains spends in collectives, of FSDP2, memory
groups and agreements alike: launching them and waiting for their results. On one machine two ranks share caches and
memory bandwidth, so the speed says little about two machines; the share says more. Writes results/ranks.json.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results" / "ranks.json"
SPECS = ("demo/dense", "demo/memory")
MESHES: dict[str, dict[str, int]] = {
    "one rank": {},
    "dp_replicate=2": {"dp_replicate": 2},
    "dp_shard=2": {"dp_shard": 2},
    "memory=2": {"memory": 2},
}
ROUNDS, WARM_UP, STEPS, SEQUENCES = 3, 5, 25, 32


def worker(spec: str, axes: dict[str, int]) -> dict[str, list[float]]:
    """Seconds of each step on this rank, and those of them in collectives."""
    import torch
    import torch.distributed as dist

    from memforge.mesh import Mesh
    from memforge.plan import make_plan
    from memforge.spec import load_spec
    from memforge.training.distributed import ProcessRanks
    from memforge.training.optimizer import Stepper
    from memforge.training.ranks import ALONE
    from memforge.training.schedule import PEAK
    from memforge_kernels.shared_out import gloo

    mesh = Mesh(**axes)
    plan = make_plan(
        load_spec(REPO / "specs" / f"{spec}.toml", overrides=[f"train.batch_size={SEQUENCES * mesh.ranks}"])
    )
    run = plan.run.train
    assert run is not None
    if mesh.ranks > 1:
        dist.init_process_group(gloo())
    ranks = ProcessRanks(mesh, "cpu") if mesh.ranks > 1 else ALONE
    waited = _timed_collectives() if mesh.ranks > 1 else lambda: 0.0
    model = ranks.build(plan.model, seed=1).train()
    stepper = Stepper(model, plan.model, run, ranks=ranks)
    windows = torch.Generator().manual_seed(ranks.rank)
    steps, collectives = [], []
    for step in range(WARM_UP + STEPS):
        window = torch.randint(plan.model.vocab_size, (SEQUENCES, run.seq_len + 1), generator=windows)
        before, start = waited(), time.perf_counter()
        stepper.update(stepper.backward(window, step=step).norm, PEAK)
        if step >= WARM_UP:
            steps.append(time.perf_counter() - start)
            collectives.append(waited() - before)
    return {"steps": steps, "collectives": collectives}


def _timed_collectives() -> Callable[[], float]:
    """Has the thread that trains count its seconds in collectives; what is returned tells them."""
    import torch.distributed as dist
    import torch.distributed._functional_collectives as functional

    total, depth = 0.0, 0

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal total, depth
            depth += 1
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                depth -= 1
                if not depth:  # what is called by another is in its time
                    total += time.perf_counter() - start

        return call

    from memforge_kernels import shared_out

    names = (
        "all_gather_into_tensor",
        "all_gather_single",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
        "all_reduce",
    )
    for name in names:
        if hasattr(dist, name):
            setattr(dist, name, timed(getattr(dist, name)))
    dist.Work.wait = timed(dist.Work.wait)
    for module in (shared_out, *(m for n, m in sys.modules.items() if n.startswith("memforge_kernels.shared_out."))):
        for name in ("_all_gather", "_reduce_scatter", "done"):
            if hasattr(module, name):
                setattr(module, name, timed(getattr(module, name)))
    functional.all_to_all_single = timed(functional.all_to_all_single)
    return lambda: total


def measured(spec: str, axes: dict[str, int]) -> list[dict[str, list[float]]]:
    ranks = 1
    for size in axes.values():
        ranks *= size
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, spec, json.dumps(axes)]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a rank failed")
    return [json.loads(out.splitlines()[-1]) for out in found]


def main() -> None:
    from memforge.machine import cpu_name

    all_steps: dict[tuple[str, str], list[float]] = {(spec, mesh): [] for spec in SPECS for mesh in MESHES}
    shares: dict[tuple[str, str], list[float]] = {key: [] for key in all_steps}
    for number in range(ROUNDS):
        for spec, mesh in all_steps:
            print(f"round {number + 1}/{ROUNDS}  {spec}  {mesh}", file=sys.stderr, flush=True)
            for rank in measured(spec, MESHES[mesh]):
                all_steps[spec, mesh] += rank["steps"]
                shares[spec, mesh] += [c / s for c, s in zip(rank["collectives"], rank["steps"], strict=True)]
    rows = []
    print("spec          ranks            ms/step   beside one rank   in collectives")
    for (spec, mesh), steps in all_steps.items():
        one = median(all_steps[spec, "one rank"])
        row = {"spec": spec, "mesh": mesh, "ms": 1e3 * median(steps), "ratio": median(steps) / one}
        row["in_collectives"] = median(shares[spec, mesh])
        rows.append(row)
        print(f"{spec:12}  {mesh:15}  {row['ms']:7.1f}   {row['ratio']:15.2f}   {row['in_collectives']:14.1%}")
    record = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "sequences_per_rank": SEQUENCES,
        "rounds": ROUNDS,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(worker(sys.argv[1], json.loads(sys.argv[2]))))
    else:
        main()
