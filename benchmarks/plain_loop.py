"""The loop that people write: nanoGPT's, on torch's own operators, with models of the demo specs' shapes."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memforge import build_model
from memforge.plan import ModelPlan, Plan, TrainPlan
from memforge.training.data import Corpus


class PlainAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (w(x).view(b, t, self.heads, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        y = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(b, t, d))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class PlainFfn(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PlainMemory(nn.Module):
    """The layer as the paper has it; the table belongs to the model."""

    def __init__(self, plan: Any, eps: float, *, sparse: bool) -> None:
        super().__init__()
        self.heads, self.top_k, self.num_sub_keys, self.sparse = plan.num_heads, plan.top_k, plan.num_sub_keys, sparse
        half = plan.key_dim // 2
        self.query = nn.Linear(plan.dim, plan.num_heads * plan.key_dim)
        self.sub_keys = nn.Parameter(torch.empty(plan.num_heads, 2, plan.num_sub_keys, half))
        self.query_norm, self.key_norm = nn.RMSNorm(half, eps=eps), nn.RMSNorm(half, eps=eps)
        self.w1 = nn.Linear(plan.dim, plan.value_dim, bias=False)
        self.w2 = nn.Linear(plan.value_dim, plan.dim, bias=False)

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        halves = self.query_norm(self.query(flat).view(len(flat), self.heads, 2, -1))
        scores = torch.einsum("nhcd,hcsd->nhcs", halves, self.key_norm(self.sub_keys))
        first, i = scores[:, :, 0].topk(self.top_k, dim=-1)
        second, j = scores[:, :, 1].topk(self.top_k, dim=-1)
        best, pair = (first[..., :, None] + second[..., None, :]).flatten(2).topk(self.top_k, dim=-1)
        slots = (i[..., :, None] * self.num_sub_keys + j[..., None, :]).flatten(2).gather(2, pair).flatten(1)
        weights = best.softmax(-1).flatten(1)
        y = F.embedding_bag(slots, values, mode="sum", per_sample_weights=weights, sparse=self.sparse)
        return self.w2(y * F.silu(self.w1(flat))).view_as(x)


class PlainLayer(nn.Module):
    def __init__(self, layer: Any, model: ModelPlan, *, sparse: bool) -> None:
        super().__init__()
        (block,) = layer.blocks
        self.mixer_norm = nn.RMSNorm(model.dim, eps=model.norm_eps)
        self.attention = PlainAttention(model.dim, layer.mixer.num_heads)
        self.block_norm = nn.RMSNorm(model.dim, eps=model.norm_eps)
        self.ffn = PlainFfn(model.dim, block.hidden_dim) if block.kind == "ffn" else None
        self.memory = PlainMemory(block, model.norm_eps, sparse=sparse) if block.kind == "memory" else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, values: Tensor | None) -> Tensor:
        x = x + self.attention(self.mixer_norm(x), cos, sin)
        normed = self.block_norm(x)
        return x + (self.ffn(normed) if self.ffn is not None else self.memory(normed, values))


class PlainDecoder(nn.Module):
    """A model of the demo specs' shape on torch's own operators. Its state dict has the names of ours, so that loading
    one into the other shows that not a parameter is missing.
    """

    def __init__(self, model: ModelPlan, *, sparse: bool = False) -> None:
        super().__init__()
        mixer = model.layers[0].mixer
        self.embedding = nn.Embedding(model.vocab_size, model.dim)
        self.layers = nn.ModuleList(PlainLayer(layer, model, sparse=sparse) for layer in model.layers)
        self.pool = nn.ModuleDict({pool.path.removeprefix("pool."): PlainTable(pool) for pool in model.pools})
        self.norm = nn.RMSNorm(model.dim, eps=model.norm_eps)
        self.head = nn.Linear(model.dim, model.vocab_size, bias=False)
        frequency = mixer.rope_theta ** (-torch.arange(0, mixer.head_dim, 2).double() / mixer.head_dim)
        angle = torch.arange(model.max_seq_len).double()[:, None] * frequency
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and loss, as nanoGPT's model gives them; so torch.compile sees the loss as well."""
        x, t = self.embedding(tokens), tokens.shape[1]
        values = self.pool["facts"].values if "facts" in self.pool else None
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t], values)
        logits = self.head(self.norm(x))
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class PlainTable(nn.Module):
    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.empty(pool.num_sub_keys**2, pool.value_dim))


class PlainLoop:
    """nanoGPT's loop: a random batch, forward, backward, clipping, AdamW at a scheduled rate."""

    def __init__(self, plan: Plan, corpus: Corpus, *, sparse: bool, compiled: bool) -> None:
        assert plan.run.train is not None
        self.run = plan.run.train
        self.model = PlainDecoder(plan.model, sparse=sparse)
        self.model.load_state_dict(build_model(plan.model, seed=self.run.seed).state_dict(), strict=True)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimizers = plain_optimizers(self.model, plan, sparse=sparse)
        window = self.run.seq_len + 1
        stream = corpus.stream(window, self.run.seed)
        self.data = stream.windows(0, stream.epoch_tokens // window).ravel().astype(np.uint16)

    def batch(self) -> tuple[Tensor, Tensor]:
        t, data = self.run.seq_len, self.data
        starts = torch.randint(len(data) - t, (self.run.batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + t].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + t].astype(np.int64)) for i in starts])
        return x, y

    def step(self, step: int) -> Tensor:
        x, y = self.batch()
        _, loss = self.forward(x, y)
        loss.backward()
        clip(self.model, float(self.run.clip_norm))
        share = linear_share(step, self.run)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss


def plain_optimizers(model: PlainDecoder, plan: Plan, *, sparse: bool) -> list[torch.optim.Optimizer]:
    """The groups that memforge makes; the table goes to SparseAdam if its gradient is sparse."""
    run = plan.run.train
    assert run is not None
    parameters, rules = dict(model.named_parameters()), {"betas": tuple(run.betas), "eps": run.eps}
    decayed = [parameters[row.path] for row in plan.model.params if row.group == "dense" and row.decay]
    others = [parameters[row.path] for row in plan.model.params if row.group == "dense" and not row.decay]
    table = [parameters[row.path] for row in plan.model.params if row.group == "values"]
    groups = [
        {"params": decayed, "peak": run.learning_rate, "weight_decay": run.weight_decay},
        {"params": others, "peak": run.learning_rate, "weight_decay": 0.0},
    ]
    of_table = {"params": table, "peak": run.value_learning_rate}
    if table and not sparse:
        groups.append({**of_table, "weight_decay": run.value_weight_decay})
    dense = torch.optim.AdamW(groups, lr=run.learning_rate, fused=True, **rules)
    return [dense, torch.optim.SparseAdam([of_table], lr=run.value_learning_rate, **rules)] if sparse else [dense]


def clip(model: nn.Module, limit: float) -> Tensor:
    """clip_grad_norm_, which torch does not have for sparse gradients: for them by hand, on their coalesced rows."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if not any(p.grad.is_sparse for p in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    for p in parameters:
        p.grad = p.grad.coalesce() if p.grad.is_sparse else p.grad
    found = [p.grad._values() if p.grad.is_sparse else p.grad for p in parameters]
    norm = nn.utils.get_total_norm(found)
    torch._foreach_mul_(found, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def linear_share(step: int, run: TrainPlan) -> float:
    if step < run.warmup_steps:
        return (step + 1) / run.warmup_steps
    left = 1 - (step - run.warmup_steps) / max(1, run.steps - 1 - run.warmup_steps)
    return run.final_rate + (1 - run.final_rate) * left
