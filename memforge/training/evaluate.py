"""Scores on held-out sequences, and text from a model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memforge.errors import StorageError
from memforge.plan import Plan
from memforge.training.checkpoint import SUMMARY, Summary, open_run, read_record
from memforge.training.data import Corpus, load_corpus
from memforge.training.data.corpus import HeldOut, split_evenly
from memforge.training.data.tokenizer import END_ID


@torch.no_grad()
def evaluate(
    model: nn.Module, held_out: HeldOut, *, batch_size: int, max_prompts: int, exact_match: bool
) -> dict[str, float]:
    """Mean negative log-likelihood per answer token and, if asked for, the share of answers given exactly.

    An answer counts as given when each of its tokens, the end included, is the most likely one after the true tokens
    before it; that is the same as greedy decoding giving the whole answer.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    chosen = np.argsort(held_out.sequences.lengths[:max_prompts], kind="stable")
    nll, num_tokens, num_exact = 0.0, 0, 0
    for part in split_evenly(len(chosen), batch_size):
        tokens, scored = _padded(held_out, chosen[part], device)
        logits = model(tokens[:, :-1])[0].float()
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        right = logits.argmax(dim=-1) == tokens[:, 1:]
        nll += float(losses[scored].double().sum())
        num_tokens += int(scored.sum())
        num_exact += int((right | ~scored).all(dim=1).sum())
    model.train(was_training)
    scores = {"held_out_loss": nll / num_tokens}
    return scores | ({"recall": num_exact / len(chosen)} if exact_match else {})


def corpus_scores(model: nn.Module, corpus: Corpus, plan: Plan) -> dict[str, float]:
    """The scores of a model on its corpus, in batches of the training's size."""
    assert plan.run.train is not None
    return evaluate(
        model,
        corpus.held_out,
        batch_size=plan.run.train.batch_size,
        max_prompts=plan.run.eval.max_prompts,
        exact_match=corpus.exact_match,
    )


def _padded(held_out: HeldOut, chosen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [b, t] padded on the right, where a causal model never looks, and the answers' mask [b, t - 1]."""
    rows = [torch.from_numpy(held_out.sequences[int(i)].astype(np.int64)) for i in chosen]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=END_ID)
    target = torch.arange(1, tokens.shape[1])[None]
    starts = torch.from_numpy(held_out.scored_from[chosen])[:, None]
    ends = torch.tensor([len(row) for row in rows])[:, None]
    return tokens.to(device), ((target >= starts) & (target < ends)).to(device)


def evaluate_run(run_dir: Path, *, data_root: Path, device: str) -> dict[str, Any]:
    """The summary of a run with the scores of its newest checkpoint measured anew.

    Raises StorageError when the run is damaged, or its data is not what it was trained on.
    """
    plan, model, tokenizer, checkpoint = open_run(run_dir, device)
    summary = read_record(run_dir / SUMMARY, Summary)
    corpus = load_corpus(plan, data_root, tokenizer)
    if corpus.description["corpus_sha256"] != summary.data.get("corpus_sha256"):
        raise StorageError(f"{run_dir}: the data is not what this run was trained on (its hash differs)")
    scores = corpus_scores(model, corpus, plan)
    measured = {"final": summary.final | scores, "checkpoint": checkpoint.name}
    return summary.model_dump(exclude_none=True) | measured


@torch.no_grad()
def generate(
    model: nn.Module, tokens: list[int], *, max_tokens: int, max_seq_len: int, temperature: float, seed: int
) -> list[int]:
    """Continue `tokens` until the end token or `max_tokens`; temperature 0 takes the most likely token."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    out: list[int] = []
    while len(out) < max_tokens:
        context = torch.tensor([(tokens + out)[-max_seq_len:]], device=device)
        logits = model(context)[0][0, -1].double().cpu()
        if temperature > 0:
            # Relative to the largest, so that no temperature, however small, makes an infinity of it.
            chances = ((logits - logits.max()) / temperature).softmax(-1)
            token = int(torch.multinomial(chances, 1, generator=generator))
        else:
            token = int(logits.argmax())
        if token == END_ID:
            break
        out.append(token)
    return out
