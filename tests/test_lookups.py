"""Which slots a text reads, and which tokens read a slot."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import REPO, SMALL, memforge, write
from made_runs import MEMORIES, planned

from memforge.build import build_model
from memforge.errors import UsageError
from memforge.plan import make_plan
from memforge.spec import load_spec
from memforge.training import lookups
from memforge_kernels import Reader


def test_slots_of_a_text_are_those_that_the_blocks_choose(tmp_path: Path) -> None:
    """Against the lookups of the blocks themselves, on what each of them was given."""
    plan = planned(tmp_path)
    model = build_model(plan.model, seed=1).eval()
    tokens = list(range(7, 47))
    inputs: dict[str, torch.Tensor] = {}
    for path in MEMORIES:
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
    found = lookups.token_slots(model, plan.model, tokens, 3)
    assert len(found) == len(tokens)
    for path in MEMORIES:
        block, flat = model.get_submodule(path), inputs[path].flatten(0, 1)
        slots, weights = block.lookup(flat, Reader())
        if path == "layers.1.peer":
            hidden = torch.einsum("nd,nkd->nk", flat, block.pool.down[slots])
            weights = weights * torch.nn.functional.gelu(hidden)
        for i in range(len(tokens)):
            total = torch.zeros(64).index_add_(0, slots[i], weights[i].detach())
            best = total.abs().topk(3).indices.tolist()
            assert [slot for slot, _ in found[i][path]] == best
            assert [weight for _, weight in found[i][path]] == pytest.approx(total[best].tolist(), rel=1e-4)


def test_the_readers_of_a_slot_are_the_tokens_that_read_it_most(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    model = build_model(plan.model, seed=1).eval()
    tokens = [i % 50 for i in range(250)]  # more than two windows of 96
    every = lookups.token_slots(model, plan.model, tokens, 10**6)
    wanted = lookups.find_slot(plan.model, "pool.facts:5")
    assert wanted.layers == ("layers.0.memory", "layers.2.memory")
    found = lookups.slot_tokens(model, plan.model, tokens, wanted, 4)
    for path in wanted.layers:
        reads = {i: dict(of[path])[5] for i, of in enumerate(every) if 5 in dict(of[path])}
        most = sorted(reads, key=lambda i: -reads[i])[:4]
        assert [i for i, _ in found[path]] == most
        assert [weight for _, weight in found[path]] == pytest.approx([reads[i] for i in most])
        assert len(most) == 4
    assert lookups.find_slot(plan.model, "layers.1.peer:35").layers == ("layers.1.peer",)


@pytest.mark.parametrize(
    ("slot", "says"),
    [
        ("pool.other:1", "there are layers.0.memory, layers.1.peer, layers.2.memory, pool.facts, layers.1.peer.pool"),
        ("layers.3.moe:0", "expected LAYER:INDEX or POOL:INDEX"),
        ("pool.facts", "expected LAYER:INDEX or POOL:INDEX"),
        ("pool.facts:64", "pool.facts has the slots 0 to 63"),
        ("layers.1.peer:36", "layers.1.peer has the slots 0 to 35"),
        ("pool.facts:-1", "pool.facts has the slots 0 to 63"),
        ("pool.facts:²", "pool.facts has the slots 0 to 63"),
        ("pool.facts:" + "9" * 5000, "pool.facts has the slots 0 to 63"),
    ],
)
def test_a_slot_that_does_not_exist_is_a_mistake_that_names_those_that_do(tmp_path: Path, slot: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        lookups.find_slot(planned(tmp_path).model, slot)


def test_a_model_without_memories_has_no_slots() -> None:
    plan = make_plan(load_spec(REPO / "specs" / "demo" / "dense.toml"))
    with pytest.raises(UsageError, match="no memory or PEER layers"):
        lookups.reading_blocks(plan.model)


def test_lookups_of_a_trained_run(tmp_path: Path) -> None:
    spec, run = write(tmp_path / "spec.toml", SMALL), tmp_path / "run"
    assert memforge("train", spec, "--out", run).returncode == 0
    text = "Flights to [bold]Oslo"
    found = json.loads(memforge("inspect", run, "--text", text, "--json").stdout)
    assert found["layers"] == ["layers.0.memory", "layers.2.memory"]
    assert "".join(token["text"] for token in found["tokens"][1:]) == text
    assert all(len(token["reads"][path]) == 4 for token in found["tokens"] for path in found["layers"])
    shown = memforge("inspect", run, "--text", text).stdout
    first = found["tokens"][-1]["reads"]["layers.2.memory"][0]
    assert f"{first['slot']}:{first['weight']:.2f}" in shown.splitlines()[-1]
    write(tmp_path / "text.txt", text)
    args = ("inspect", run, "--file", tmp_path / "text.txt", "--slot", f"pool.facts:{first['slot']}", "--top", 50)
    readers = json.loads(memforge(*args, "--json").stdout)
    read = {token["position"]: token for token in readers["layers"]["layers.2.memory"]}
    last = read[len(found["tokens"]) - 1]
    assert last["weight"] == pytest.approx(first["weight"])
    assert (text.endswith(last["before"] + last["text"]), last["after"]) == (True, "")
    assert f"[{last['text']}]" in memforge(*args).stdout
    wrong = memforge("inspect", run, "--text", text, "--slot", "pool.facts:64")
    assert (wrong.returncode, wrong.stderr) == (2, "error: --slot pool.facts:64: pool.facts has the slots 0 to 63\n")
