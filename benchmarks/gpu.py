"""Every Triton kernel on this GPU: checked against float64, timed beside torch and the copy bandwidth, then tuned.

    python benchmarks/gpu.py              # under 8 minutes on a CUDA machine; writes benchmarks/results/gpu-NAME.json
    python benchmarks/gpu.py --out DIR    # the result and the tuned tables go there instead

A kernel is timed only after its results agree. Rates count the bytes that an op must move at least.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memforge_kernels import tuning
from memforge_kernels.registry import BYTE_FORMULAS

HERE = Path(__file__).parent
MINUTES = 7.5
# Slots of the tables, tokens, rows a token reads, and width: those of the paper's 373m model, and a wide one.
SHAPES = ((2**20, 8192, 128, 1024), (2**18, 8192, 128, 2048), (2**20, 4096, 32, 768))
QUANTILES = [0.2, 0.5, 0.8]


def milliseconds(run: Callable[[], object]) -> list[float]:
    from triton.testing import do_bench

    return [round(t, 4) for t in do_bench(run, quantiles=QUANTILES)]


def copy_rate() -> float:
    """Bytes a second of a copy of 1 GiB, both directions counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2**31 / (milliseconds(lambda: target.copy_(source))[1] / 1e3)


def checked(device: torch.device) -> dict[str, dict[str, Any]]:
    """Whether each kernel agrees with float64, with the config it would run with, at every bucket."""
    from memforge_kernels.trials import trial

    found = {}
    for op in tuning.OPS:
        keys = tuning.buckets(op)
        right = [trial(op, key, device).agrees(tuning.config(op, key, device)) for key in keys]
        found[op] = {
            "agree": sum(right),
            "of": len(keys),
            "failed": [str(k) for k, ok in zip(keys, right, strict=True) if not ok],
        }
        say(f"{op}: {found[op]['agree']}/{found[op]['of']} agree with float64")
    return found


def bag_work(m: int, n: int, k: int, v: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """The read of a memory layer, torch's own, and the gradient of the weights, with the bytes that each must move."""
    ops, values = torch.ops.memforge, torch.randn(m, v, device="cuda").to(dtype)
    slots = torch.randint(m, (n, k), device="cuda")
    weights, x = torch.rand(n, k, device="cuda"), torch.randn(n, v, device="cuda")
    typed = weights.to(dtype)
    return {
        "weighted_gather": (
            lambda: ops.weighted_gather(values, slots, weights),
            BYTE_FORMULAS[ops.weighted_gather](values, slots, weights),
        ),
        "F.embedding_bag": (
            lambda: F.embedding_bag(slots, values, mode="sum", per_sample_weights=typed),
            BYTE_FORMULAS[ops.weighted_gather](values, slots, typed),
        ),
        "gather_dot": (lambda: ops.gather_dot(x, values, slots), BYTE_FORMULAS[ops.gather_dot](x, values, slots)),
    }


def bags(rate: float) -> list[dict[str, Any]]:
    """Times and rates of reading rows, at every shape in two types."""
    rows = []
    for m, n, k, v in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            shape = {"slots": m, "tokens": n, "reads": k, "width": v, "dtype": str(dtype).removeprefix("torch.")}
            for name, (run, moved) in bag_work(m, n, k, v, dtype).items():
                times = milliseconds(run)
                share = moved / (times[1] / 1e3) / rate
                rows.append({"op": name, **shape, "ms": times, "bytes": moved, "of_copy": round(share, 3)})
                say(f"{name} {shape}: {times[1]} ms, {share:.0%} of the copy bandwidth")
    return rows


def steps() -> list[dict[str, Any]]:
    """A training step of one memory layer, ours and plain PyTorch's, at two sizes of its table."""
    sys.path.insert(0, str(HERE))
    from memory_layer import ARMS

    rows = []
    for sub_keys in (512, 1024, 2048):
        row: dict[str, Any] = {"slots": sub_keys**2, "tokens": 8192}
        for name in ("ours", "dense"):
            torch.cuda.empty_cache()
            with torch.device("cuda"):
                arm = ARMS[name][0](sub_keys, 8192)

            def step(arm: Any = arm) -> None:
                arm.backward(arm.forward())
                arm.update()

            step()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            beyond = torch.cuda.max_memory_allocated() - before
            row[name] = {"ms": milliseconds(step), "beyond_bytes": beyond}
            del arm
        row["dense_to_ours"] = round(row["dense"]["ms"][1] / row["ours"]["ms"][1], 2)
        say(f"{sub_keys**2:,} slots: {row['ours']['ms'][1]} ms, plain PyTorch {row['dense_to_ours']} times that")
        rows.append(row)
    return rows


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        say("not run: no CUDA device")
        return 3
    deadline = time.monotonic() + 60 * MINUTES
    device, name = torch.device("cuda"), torch.cuda.get_device_name()
    record: dict[str, Any] = {
        "device": name,
        "versions": {package: version(package) for package in ("torch", "triton", "memforge")},
        "copy_bytes_per_second": copy_rate(),
        "checked": checked(device),
    }
    say(f"copy: {record['copy_bytes_per_second'] / 1e12:.2f} TB/s")
    record["bags"] = bags(record["copy_bytes_per_second"])
    record["steps"] = steps()
    tables = tuning.tune_measured(device, deadline=deadline)
    tuning.write_tables(tables, args.out / "tuned" if args.out else tuning.TUNED)
    results = args.out or HERE / "results"
    results.mkdir(parents=True, exist_ok=True)
    file = results / f"gpu-{re.sub('[^a-z0-9]+', '-', name.lower())}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    say(f"wrote {file}")
    return 0 if all(found["agree"] == found["of"] for found in record["checked"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
