"""Scores on held-out sequences, and text from a model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memforge.errors import StorageError
from memforge.plan import Plan
from memforge.training.checkpoint import open_run
from memforge.training.data import Corpus, load_corpus
from memforge.training.data.corpus import HeldOut, split_evenly
from memforge.training.data.tokenizer import END_ID, end_id
from memforge.training.ranks import ALONE, Ranks
from memforge.training.run_directory import SUMMARY, Summary, read_record


@torch.no_grad()
def evaluate(
    model: nn.Module, held_out: HeldOut, *, batch_size: int, max_prompts: int, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Mean negative log-likelihood per answer token and, of facts, the share of answers given exactly.

    An answer counts as given when each of its tokens, the end included, is the most likely one after the true tokens
    before it; that is the same as greedy decoding giving the whole answer.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    chosen = np.argsort(held_out.sequences.lengths[:max_prompts], kind="stable")
    nll, num_tokens, num_exact = 0.0, 0, 0
    parts = [chosen[part] for part in split_evenly(len(chosen), batch_size)]
    # Batches are dealt out; all ranks make as many passes, in the last one some without sequences.
    parts += [chosen[:0]] * (-len(parts) % ranks.size)
    for first in range(0, len(parts), ranks.size):
        dealt = parts[first : first + ranks.size]
        tokens, scored = _padded(held_out, dealt[ranks.rank], device)
        with ranks.tokens([len(part) * _longest(held_out, part) for part in dealt]):
            logits = model(tokens[:, :-1])[0].float()
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        right = logits.argmax(dim=-1) == tokens[:, 1:]
        nll += float(losses[scored].double().sum())
        num_tokens += int(scored.sum())
        num_exact += int((right | ~scored).all(dim=1).sum())
    sums = torch.tensor([nll, num_tokens, num_exact], dtype=torch.float64, device=device)
    nll, num_tokens, num_exact = ranks.total(sums).tolist()
    model.train(was_training)
    scores = {"held_out_loss": nll / num_tokens}
    return scores | ({"recall": num_exact / len(chosen)} if held_out.exact_match else {})


def _longest(held_out: HeldOut, chosen: np.ndarray) -> int:
    """Tokens that a model is given of the longest of these sequences: all but its last."""
    return max(1, int(held_out.sequences.lengths[chosen].max(initial=0)) - 1)


def corpus_scores(model: nn.Module, corpus: Corpus, plan: Plan, ranks: Ranks = ALONE) -> dict[str, float]:
    """The scores of a model on its corpus, in batches of the training's size."""
    assert plan.run.train is not None
    size, most = plan.run.train.micro_batch_size, plan.run.eval.max_prompts
    scores = {}
    for part, held_out in corpus.held_out.items():
        found = evaluate(model, held_out, batch_size=size, max_prompts=most, ranks=ranks)
        scores |= {f"{name}.{part}" if part else name: value for name, value in found.items()}
    return scores


# Of a held-out window of text, the tokens that a sample goes on from.
PROMPT_TOKENS = 16


def samples(model: nn.Module, corpus: Corpus, plan: Plan, ranks: Ranks = ALONE) -> Iterator[tuple[str, str]]:
    """Prompts of [eval], or one for each part of the held-out data, and how the model goes on."""
    given = plan.run.eval
    if not given.sample_tokens:
        return
    end, seed = end_id(corpus.tokenizer), 0 if plan.run.train is None else plan.run.train.seed
    for prompt in given.samples or _prompts(corpus):
        tokens = generate(
            model,
            [end, *corpus.tokenizer.encode(prompt).ids],
            max_tokens=given.sample_tokens,
            max_seq_len=plan.model.max_seq_len,
            temperature=given.sample_temperature,
            seed=seed,
            end=end,
            agreed=ranks.share,
        )
        yield prompt, corpus.tokenizer.decode(tokens)


def _prompts(corpus: Corpus) -> Iterator[str]:
    for held_out in corpus.held_out.values():
        tokens, first = held_out.sequences[0], int(held_out.scored_from[0])
        given = tokens[: first if held_out.exact_match else PROMPT_TOKENS]
        yield corpus.tokenizer.decode(given.tolist())


def _padded(held_out: HeldOut, chosen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [b, t] padded on the right, where a causal model never looks, and the answers' mask [b, t - 1]."""
    rows = [torch.from_numpy(held_out.sequences[int(i)].astype(np.int64)) for i in chosen]
    tokens = torch.full((len(rows), _longest(held_out, chosen) + 1), END_ID)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    target = torch.arange(1, tokens.shape[1])[None]
    starts = torch.from_numpy(held_out.scored_from[chosen])[:, None]
    ends = torch.tensor([len(row) for row in rows], dtype=torch.int64)[:, None]
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
    model: nn.Module,
    tokens: list[int],
    *,
    max_tokens: int,
    max_seq_len: int,
    temperature: float,
    seed: int,
    end: int = END_ID,
    agreed: Callable[[int], int] = lambda token: token,
) -> list[int]:
    """Continue `tokens` until the end token or `max_tokens`; temperature 0 takes the most likely token.

    Several ranks do the same, and take each token that they have `agreed` on.
    """
    was_training = model.training
    model.eval()
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
        token = agreed(token)
        if token == end:
            break
        out.append(token)
    model.train(was_training)
    return out
