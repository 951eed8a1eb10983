"""An experiment of benchmarks/facts in miniature, and records of it that were not trained."""

import json
import random
from pathlib import Path

from conftest import write

from benchmarks.facts.experiment import read_experiment
from benchmarks.facts.jobs import Jobs
from benchmarks.facts.records import Made, Records
from benchmarks.facts.runner import state

DENSE = """\
[model]
name = "plain"
dim = 16
num_layers = 2
vocab_size = 300
max_seq_len = 96

[attention]
num_heads = 2

[ffn]
hidden_dim = 40

[data]
kind = "facts"
num_facts = 20
rare_share = 0.2

[train]
steps = 3
batch_size = 2
learning_rate = 1e-2
compile = "off"

[eval]
max_prompts = 8
sample_tokens = 0
"""
MEMORY = """\
extends = "plain.toml"

[model]
name = "table"

[[place]]
layers = "middle"
block = { kind = "memory", num_sub_keys = 8, num_heads = 1, top_k = 2, key_dim = 8 }
"""
EXPERIMENT = """\
name = "fixture"
title = "A fixture"
about = "Which of 20 cities?"
baseline = "plain"
tolerance = 0.2
threads = 1

[set]
"data.num_facts" = 20
"data.num_unseen" = 5
"eval.every_steps" = 2

[search]
trials = 2
seed = 9
measure = "held_out_loss"
best = "least"
set = { "data.num_facts" = 10, "data.num_unseen" = 0, "train.steps" = 2 }

[arm.plain]
spec = "plain.toml"
label = "Plain"
search = [{ "train.learning_rate" = 1e-3 }, { "train.learning_rate" = 1e-2 }]

[arm.table]
spec = "table.toml"
label = "Table | of 64"
note = "64 rows."
search = { "train.value_learning_rate" = [1e-2, 1e-1] }

[arm.table-large]
spec = "table.toml"
label = "Table of 100"
set = { "place.0.block.num_sub_keys" = 10 }
tuned_as = "table"

[study.core]
title = "All of them"
arms = ["plain", "table", "table-large"]
seeds = [1, 2]

[study.counts]
arms = ["table"]
seeds = [1]
vary = { "data.num_facts" = [12, 20] }

[study.sizes]
arms = ["table", "table-large"]
seeds = [1]

[[question]]
text = "Does a table beat none?"
study = "core"
arm = "table"
than = "plain"
paper = "4.0 against 3.0"
paper_says = "more"

[worth]
title = "a small one as good"
along = ["plain", "table"]
measure = "recall.rare"
paper = "4"

[figure.flops]
title = "Recall by FLOPs"
study = "core"
x = "flops_per_token"
y = "held_out_loss"
lines = { "one line" = ["plain", "table"] }

[figure.course]
title = "Over training"
study = "core"
x = "train_flops"
y = "recall"
join = "runs"

[figure.sizes]
title = "Over slots"
study = "sizes"
x = "slots"
y = "slots_used"
join = "study"

[figure.slots]
title = "Over slots, or none"
study = "core"
x = "slots"
y = "recall"
beside = { "without slots" = ["plain"] }

[figure.counts]
title = "Over tokens"
study = "counts"
x = "tokens"
y = "held_out_loss"
beside = { "none of 20" = ["plain"] }

[ablation.sizes]
title = "Sizes"
study = "sizes"
paper_measure = "their loss"
paper = { table = "2.11", table-large = "2.10" }

[findings]
"It was tried:" = "{table recall} against {table.data.num_facts-12 held_out_loss}."
"""


MADE: Made = {
    "threads": 1, "at_once": 1, "load": 0.0, "seconds": 1.0, "commit": "0", "date": "2026-01-01", "cpu": "one",
    "python": "3.11", "versions": {},
}  # fmt: skip


def experiment_in(directory: Path) -> Path:
    """Write it and the specs of its arms; the path of its file."""
    write(directory / "plain.toml", DENSE)
    write(directory / "table.toml", MEMORY)
    return write(directory / "fixture.toml", EXPERIMENT)


def made(file: Path) -> tuple[Jobs, Records]:
    """The experiment with records that were not trained."""
    experiment, drawn = read_experiment(file), random.Random(0)
    jobs, records = Jobs(experiment, file.parent), Records(file.parent / "records")
    while (now := state(jobs, records)).left:
        for job in now.left:
            text = json.dumps(
                {
                    "name": job.name, "arm": job.arm, "fingerprint": job.fingerprint,
                    "model_hash": job.plan().model.model_hash,
                    "settings": dict(job.settings), "ended": "done", "params": 1, "active_params": 1, "slots": 0,
                    "flops_per_token": 1.0, "forward_flops_per_token": 1.0, "steps": 1, "tokens": 1, "data": {},
                    "baselines": {}, "exposures_per_fact": None, "final": {"held_out_loss": drawn.random()},
                    "curve": [], "usage": {},
                    "made": MADE | {"threads": job.threads, "seconds": 2.0 if job.arm == "plain" else 8.0},
                }
            )  # fmt: skip
            write(records.path(job.name), text)
    return jobs, records
