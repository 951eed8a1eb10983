"""What the options that keep a memory alive do to the use of its slots: the table of docs/training.md.

    python benchmarks/alive.py                 # every option by itself and all together; about 15 minutes on 2 cores

Each arm trains the demo's memory model on 256 facts with a pool too large for them and few reads per token, from the
same weights but for the keys. Figures are means over three memory layers and all seeds, of the last 50 steps.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
SPEC = HERE.parent / "specs" / "demo" / "memory.toml"
# 262,144 slots; 4 x 8 of them for each of 2,048 tokens a step: 12.5 reads for each slot in 50 steps.
FRAME = {
    "pool.facts.num_sub_keys": "512",
    "place.0.block.top_k": "8",
    "place.0.block.qk_norm": "false",
    "train.log_every": "50",
    "train.compile": "off",
}
OPTIONS = {
    "none": {},
    "qk_norm": {"place.0.block.qk_norm": "true"},
    "key_init = sphere": {"place.0.block.key_init": "sphere"},
    "revive_every = 20": {"train.revive_every": "20"},
    "all three": {
        "place.0.block.qk_norm": "true",
        "place.0.block.key_init": "sphere",
        "train.revive_every": "20",
    },
}
MEASURES = ("slots_used", "slots_ever", "kl", "top_1pct", "read_norm")


def trained(changes: dict[str, str], steps: int, seed: int) -> dict[str, float]:
    """The last row of metrics of a run with these changes, memory layers averaged."""
    given = FRAME | {"train.steps": str(steps), "train.seed": str(seed)} | changes
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory) / "run"
        command = [sys.executable, "-m", "memforge", "train", str(SPEC), "--out", str(run), "--no-parity"]
        subprocess.run(
            [*command, *(word for key, value in given.items() for word in ("--set", f"{key}={value}"))],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    layers = sorted({name.rpartition(".")[0] for name in row if name.endswith(".slots_used")})
    found = {measure: mean(row[f"{layer}.{measure}"] for layer in layers) for measure in MEASURES}
    return found | {name: row[name] for name in ("loss", "held_out_loss", "recall")}


def table(rows: dict[str, dict[str, float]]) -> str:
    """The rows as a Markdown table."""
    head = ("option", "slots used", "ever used", "KL to uniform", "top 1% of slots take", "read norm", "held-out loss")
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, row in rows.items():
        cells = [f"{row['slots_used']:.1%}", f"{row['slots_ever']:.1%}", f"{row['kl']:.2f}", f"{row['top_1pct']:.1%}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['read_norm']:.2f} | {row['held_out_loss']:.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for name, changes in OPTIONS.items():
            print(f"seed {seed}  {name}", file=sys.stderr, flush=True)
            runs.setdefault(name, []).append(trained(changes, args.steps, seed))
    for name, found in runs.items():
        rows[name] = {measure: mean(run[measure] for run in found) for measure in found[0]}
    record: dict[str, Any] = {"steps": args.steps, "seeds": args.seeds, "slots": 512**2, "rows": rows, "runs": runs}
    record["machine"] = {"cpu": platform.machine(), "versions": {p: version(p) for p in ("torch", "memforge")}}
    (HERE / "results" / "alive.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(rows)
    page = HERE.parent / "docs" / "training.md"
    before, _, rest = page.read_text().partition("<!-- alive -->\n")
    page.write_text(f"{before}<!-- alive -->\n{text}<!-- /alive -->{rest.partition('<!-- /alive -->')[2]}")
    print(text)


if __name__ == "__main__":
    main()
