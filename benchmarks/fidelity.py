"""The same models through other counters, beside the ledger: writes docs/fidelity.md.

    pip install -c constraints.txt -e ".[fidelity]"
    python benchmarks/fidelity.py            # --check: fail if the page would change

Every counter is given the built model and one batch of tokens on a CPU, as its own documentation has it.
"""

import argparse
import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from memforge.build import build_model
from memforge.cost import estimate
from memforge.plan import ModelPlan, make_model_plan
from memforge.profile.counter import count_flops
from memforge.spec import load_spec

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "fidelity.md"
SPECS = ("dense", "memory", "moe")
BATCH, SEQ_LEN = 1, 64
LARGE = ("dense-373m", "memory-plus-373m", "memory-plus-1.3b", "memory-plus-1.3b-64m", "peer-1.3b")

HEAD = """\
# What other counters say

Written by `python benchmarks/fidelity.py` with
{versions}.

Forward FLOPs of one batch of {batch} x {seq_len} tokens, a multiply-add being 2, and their ratio to what the ledger
says is executed. Counters that speak of multiply-adds are doubled.

"""
NOTES = """\

**Ledger, counted** takes causal attention at half and, of a mixture, no padding: what a model needs. **Ledger,
executed** is every op as implemented, and must equal torch's counter on the meta device with the formulas that the
kernels register; `memforge build` refuses a model where it does not.

What the others miss:

- **torch's counter on a CPU**, as it comes: fused attention on a CPU has no formula, and an operator it does not know,
  such as those of memory layers, counts nothing and is not mentioned.
- **fvcore** traces the model; operators without a handle are skipped with a warning, among them fused attention, the
  scoring of product keys and the reading of rows. Its unit is the multiply-add.
- **calflops** replaces functions of `torch.nn.functional` while the model runs: what calls an operator directly is not
  seen, and of what it sees norms and activations are counted as FLOPs too.
- **torchinfo** multiplies the parameters of a linear layer with the batch, not with the tokens, and takes other
  parameters, sub-keys and experts among them, for weights that every output uses.
- **6 per parameter and token**, as trainers log it, is right for a dense model without attention. Of a memory layer it
  counts every row of the pool, though a token reads a few:

"""


def ledger(plan: ModelPlan, *, executed: bool) -> int:
    return estimate(plan, batch=BATCH, seq_len=SEQ_LEN, devices=()).flops(executed=executed)[0]


def torch_as_it_comes(model: nn.Module, tokens: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    return counter.get_total_flops()


def fvcore_count(model: nn.Module, tokens: Tensor) -> int:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, tokens)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return 2 * int(analysis.total())


def calflops_count(model: nn.Module, tokens: Tensor) -> int:
    from calflops import calculate_flops

    flops, _, _ = calculate_flops(
        model, args=[tokens], print_results=False, print_detailed=False, output_as_string=False
    )
    return int(flops)


def torchinfo_count(model: nn.Module, tokens: Tensor) -> int:
    from torchinfo import summary

    return 2 * int(summary(model, input_data=[tokens], verbose=0).total_mult_adds)


def six_per_parameter(plan: ModelPlan) -> int:
    """The forward third of 6 FLOPs per parameter and token, the embedding left out."""
    return 2 * BATCH * SEQ_LEN * sum(row.numel for row in plan.params if row.kind != "embedding")


def counters(plan: ModelPlan) -> dict[str, int | str]:
    torch.manual_seed(0)
    tokens = torch.randint(plan.vocab_size, (BATCH, SEQ_LEN))
    given: dict[str, Callable[[nn.Module, Tensor], int]] = {
        "torch on a CPU": torch_as_it_comes,
        "fvcore": fvcore_count,
        "calflops": calflops_count,
        "torchinfo": torchinfo_count,
    }
    found: dict[str, int | str] = {
        "ledger, executed": ledger(plan, executed=True),
        "torch on meta, our formulas": count_flops(plan, BATCH, SEQ_LEN)[0],
        "ledger, counted": ledger(plan, executed=False),
    }
    for name, count in given.items():
        model = build_model(plan).eval()
        try:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = count(model, tokens)
        except Exception as error:  # noqa: BLE001  a counter may fail in any way, which is what the page is about
            found[name] = f"fails: {type(error).__name__}"
    return found | {"6 per parameter": six_per_parameter(plan)}


def page() -> str:
    names = ", ".join(f"{name} {version(name)}" for name in ("torch", "fvcore", "calflops", "torchinfo"))
    plans = {name: make_model_plan(load_spec(REPO / "specs" / "demo" / f"{name}.toml")) for name in SPECS}
    columns = {name: counters(plan) for name, plan in plans.items()}
    lines = [
        "| counter | " + " | ".join(f"demo-{name} | ratio" for name in SPECS) + " |",
        "|---|" + "---:|" * 2 * len(SPECS),
    ]
    for counter in columns[SPECS[0]]:
        cells: list[Any] = []
        for name in SPECS:
            value, whole = columns[name][counter], columns[name]["ledger, executed"]
            assert isinstance(whole, int)
            cells += [value, ""] if isinstance(value, str) else [f"{value:,}", f"{value / whole:.3f}"]
        lines.append(f"| {counter} | " + " | ".join(cells) + " |")
    large = ["| spec | 6 per parameter and token | the ledger, forward and backward | ratio |", "|---|---:|---:|---:|"]
    for name in LARGE:
        plan = make_model_plan(load_spec(REPO / "specs" / "paper" / f"{name}.toml"))
        six = 6 * sum(row.numel for row in plan.params if row.kind != "embedding")
        ours = estimate(plan, seq_len=4096, devices=()).axes()["flops"]
        large.append(f"| {name} | {six:,} | {ours:,.0f} | {six / ours:.2f} |")
    head = HEAD.format(versions=names, batch=BATCH, seq_len=SEQ_LEN)
    return head + "\n".join(lines) + "\n" + NOTES + "\n".join(large) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    text = page()
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
    elif text != PAGE.read_text(encoding="utf-8"):
        sys.exit(f"{PAGE.name} is not what this writes now")


if __name__ == "__main__":
    main()
