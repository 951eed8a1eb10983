"""Write specs/paper/README.md: every model of the paper as the ledger counts it, beside what was published."""

from functools import cache
from pathlib import Path

from memforge.cost import CostReport, estimate
from memforge.match import parse_free, solve
from memforge.plan import ModelPlan, make_plan
from memforge.spec import load_spec

PAPER = Path(__file__).resolve().parent.parent / "specs" / "paper"
SIZES = ("134m", "373m", "720m", "1.3b", "8b")
KINDS = ("dense", "moe", "peer", "memory", "memory-plus")

# Totals known from elsewhere, at their precision, and where from: printed in table 1 of arXiv 2412.09764, computed by
# hand from a published shape, or from the authors' released configuration.
KNOWN: dict[str, tuple[str, str]] = {
    "dense-134m": ("134.1M", "by hand"),
    "dense-373m": ("373.9M", "released"),
    "dense-720m": ("721.2M", "by hand, shape guessed"),
    "dense-1.3b": ("1261.5M", "by hand"),
    "dense-8b": ("8.03B", "by hand"),
    "moe-1.3b": ("3.545B", "table 1"),
    "peer-1.3b": ("3.646B", "table 1"),
    "memory-1.3b": ("3.377B", "table 1"),
    "memory-plus-1.3b": ("3.377B", "table 1"),
    "memory-plus-1.3b-4m": ("9.823B", "table 1"),
    "memory-plus-1.3b-16m": ("35.618B", "table 1"),
    "memory-plus-1.3b-64m": ("138.748B", "table 1"),
}
# Where our total, rounded as the paper prints it, is another number.
DISAGREES = {
    "memory-1.3b": "arithmetic gives 3.3776, which rounds to 3.378; 3.377 is the same number cut off",
    "memory-plus-1.3b": "arithmetic gives 3.368; the paper seems to repeat the row above it",
    "moe-1.3b": "3.5455 with the routers, which rounds to 3.546; without their 180,224 weights it is 3.545",
}
# Size and sub-keys of the layers whose FLOPs the second table compares.
LAYERS = (("373m", 1024), ("1.3b", 1024), ("1.3b", 4096), ("1.3b", 8192))

PAGE = """\
# The models of "Memory Layers at Scale"

One file for each model of [arXiv 2412.09764](https://arxiv.org/abs/2412.09764) (Berges et al., 2024), each showing only
what differs from the file it `extends`. Nothing here needs a GPU:

    memforge profile specs/paper/memory-plus-1.3b.toml     # the ledger, and parity with dense-1.3b
    memforge build specs/paper/memory-plus-373m.toml       # checked against torch, exported
    memforge build specs/paper/memory-plus-1.3b-64m.toml --plan-only

This page is written by `python benchmarks/paper.py`, and a test fails when it is stale. FLOPs are per token, forward
and backward, at 4,096 tokens, counted as the ledger's conventions say; `ratio` is that to the dense model of the size.

{models}
Known totals are compared at the precision they are printed in: those of table 1 of the paper, that of the authors'
released 373M configuration, and those worked out by hand from the shape (of 720m a guess). Where they differ:

{differences}
Six layers of the ablation (`memory-373m-layers-six`) are not listed in the paper; those here are a guess.

## What a memory layer costs beside the FFN it replaces

Forward matmul MFLOP per token (4 heads, 32 slots each, keys half as wide as the model). Key scoring grows with the
square root of the slots, so that a layer with enough of them costs more than its FFN.

{layers}
## How the paper chose its experts

It compares MoE, PEER and Memory+ of about the same size, an MoE having one expert of full size at work. What
`memforge match --axis params` finds nearest, beside what the paper has:

{choices}
Neither rule gives all of its expert counts: full-size experts come in steps of 6 to 23% of a model, and at 373m and
720m the paper takes more than either. PEER with 768 sub-keys per half has 12% more rows than would match: a row is two
vectors there, so that 724 sub-keys weigh what 1,024 do in a Memory+ pool.

A counter that charges 6 FLOPs for every parameter would add {naive:.2f} GFLOP per token for the pool of
memory-plus-373m, whose whole step takes {step:.2f}.
"""


@cache
def report_of(name: str) -> tuple[ModelPlan, CostReport]:
    plan = make_plan(load_spec(PAPER / f"{name}.toml")).model
    return plan, estimate(plan)


def as_printed(total: int, known: str) -> str:
    """`total` in the unit and with the decimals of the known figure."""
    unit, digits = known[-1], len(known[:-1].partition(".")[2])
    return f"{total / {'M': 10**6, 'B': 10**9}[unit]:.{digits}f}{unit}"


def size_of(name: str) -> str:
    return next(size for size in SIZES if f"-{size}" in name)


def names() -> list[str]:
    """Every spec: by size; dense first, ablations last, otherwise by parameters."""

    def order(name: str) -> tuple[int, bool, bool, int | float]:
        ablation = name not in {f"{kind}-{size_of(name)}" for kind in KINDS} and name not in KNOWN
        return SIZES.index(size_of(name)), ablation, not name.startswith("dense"), report_of(name)[1].axes()["params"]

    return sorted(sorted(file.stem for file in PAPER.glob("*.toml")), key=order)


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown; the first row is the head, and all columns but the first are numbers."""
    rule = ("---", *("---:" for _ in rows[0][1:]))
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


def model_rows() -> list[tuple[str, ...]]:
    rows = [("model", "parameters", "known", "from", "equal", "active", "FLOPs/token", "ratio")]
    for name in names():
        axes, base = report_of(name)[1].axes(), report_of(f"dense-{size_of(name)}")[1].axes()
        known, source = KNOWN.get(name, ("", ""))
        equal = "" if not known else "no" if name in DISAGREES else "yes"
        rows.append(
            (
                f"[{name}]({name}.toml)",
                f"{axes['params']:,}",
                known,
                source,
                equal,
                f"{axes['active_params']:,}",
                f"{axes['flops'] / 10**9:.3f}G",
                f"{axes['flops'] / base['flops']:.3f}",
            )
        )
    return rows


def layer_rows() -> list[tuple[str, ...]]:
    """Forward MFLOP of one Memory+ layer and of the feed-forward network it replaces."""
    rows = [("width / FFN", "sub-keys", "slots", "memory layer", "FFN", "ratio")]
    for size, sub_keys in LAYERS:
        spec = load_spec(PAPER / f"memory-plus-{size}.toml", overrides=[f"pool.facts.num_sub_keys={sub_keys}"])
        forward: dict[str, int] = {}
        for row in estimate(make_plan(spec).model, seq_len=1).rows:
            if row.kind in ("memory", "ffn"):
                forward[row.path] = forward.get(row.path, 0) + row.cost.forward
        memory = next(f for path, f in forward.items() if path.endswith("memory"))
        ffn = next(f for path, f in forward.items() if path.endswith("ffn"))
        assert spec.ffn is not None
        shape = f"{spec.model.dim} / {spec.ffn.hidden_dim}"
        rows.append(
            (shape, f"{sub_keys}", f"{sub_keys**2:,}", f"{memory / 1e6:.2f}", f"{ffn / 1e6:.1f}", f"{memory / ffn:.2f}")
        )
    return rows


# Of each size, the experts of the paper's MoE.
EXPERTS = {"134m": 16, "373m": 8, "720m": 6, "1.3b": 4}


def choice_rows() -> list[tuple[str, ...]]:
    """The experts, or sub-keys, at which parameters come nearest to those of another model, and the ratio there."""
    to = ("MoE to Memory+", "MoE to PEER", "PEER to Memory+")
    rows = [("size", "experts in the paper", *(cell for pair in to for cell in (pair, "ratio")))]
    for size, experts in EXPERTS.items():
        cells = [size, str(experts)]
        for name, baseline, key in (
            ("moe", "memory-plus", "moe.num_experts"),
            ("moe", "peer", "moe.num_experts"),
            ("peer", "memory-plus", "peer.num_sub_keys"),
        ):
            spec, plan = load_spec(PAPER / f"{name}-{size}.toml"), report_of(f"{baseline}-{size}")[0]
            best = solve(spec, baseline, plan, [parse_free(spec, key)], {"params": 0.005}, 4096).best
            ratio = next(axis.ratio for axis in best.axes if axis.name == "params")
            cells += [str(best.values[0]), f"{ratio:.3f}"]
        rows.append(tuple(cells))
    return rows


def page() -> str:
    plan, report = report_of("memory-plus-373m")
    return PAGE.format(
        models=table(model_rows()),
        differences="".join(f"- `{name}`: {why}.\n" for name, why in DISAGREES.items()),
        layers=table(layer_rows()),
        choices=table(choice_rows()),
        naive=6 * sum(row.numel for row in plan.params if row.group == "values") / 1e9,
        step=sum(report.flops()) / report.tokens / 1e9,
    )


if __name__ == "__main__":
    (PAPER / "README.md").write_text(page(), encoding="utf-8")
