"""Predicted beside measured: the time and the peak memory of training steps of seven models on this CPU.

    memforge doctor --calibrate         # once
    python benchmarks/step_time.py      # about 6 minutes on two cores

The models take turns, A B C .., A B C ..; the time of a model is the median of its rounds, each of which is the median
of up to 40 steps. Writes results/step_time.json and prints the table of docs/profile.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from memforge.machine import cpu_name

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results" / "step_time.json"
ROUNDS = 2
# Small models whole; wide ones on few tokens, with tables and experts that fit.
RUNS: dict[str, tuple[str, ...]] = {
    "demo/dense": (),
    "demo/memory": (),
    "demo/moe": (),
    "paper/dense-134m": ("--batch", "2", "--seq-len", "128"),
    "paper/memory-plus-134m": ("--batch", "2", "--seq-len", "256", "--set", "pool.facts.num_sub_keys=256"),
    "paper/moe-134m": ("--batch", "2", "--seq-len", "128", "--set", "place.0.block.num_experts=4"),
    "paper/peer-134m": ("--batch", "1", "--seq-len", "128", "--set", "place.0.block.num_sub_keys=128"),
}


def measured(name: str) -> dict[str, Any]:
    command = ["profile", REPO / "specs" / f"{name}.toml", "--no-parity", "--measure", "--json", *RUNS[name]]
    done = subprocess.run([sys.executable, "-m", "memforge", *command], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for number in range(ROUNDS):
        for name in RUNS:
            print(f"round {number + 1}/{ROUNDS}  {name}", file=sys.stderr, flush=True)
            rounds[name].append(measured(name))
    rows = []
    for name, runs in rounds.items():
        times = [run["measured"]["seconds"]["total"] for run in runs]
        if times[0]["predicted"] is None:
            sys.exit("this machine is not calibrated: memforge doctor --calibrate")
        rows.append(
            {
                "spec": name,
                "options": list(RUNS[name]),
                "tokens": runs[0]["batch"] * runs[0]["seq_len"],
                "measured_ms": 1e3 * median(t["median"] for t in times),
                "predicted_ms": 1e3 * median(t["predicted"] for t in times),
                "peak": median(run["measured"]["peak"] for run in runs),
                "predicted_peak": runs[0]["memory"]["peak"],
            }
        )
    record = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "rounds": ROUNDS, "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        time, peak = row["measured_ms"] / row["predicted_ms"], row["peak"] / row["predicted_peak"]
        options = " ".join(row["options"][4:])
        print(
            f"| {row['spec']}{f' `{options}`' if options else ''} | {row['tokens']:,} | {row['measured_ms']:,.0f} "
            f"| {row['predicted_ms']:,.0f} | {time:.3f} | {peak:.3f} |"
        )


if __name__ == "__main__":
    main()
