"""The decoder: embedding, layers of mixer and blocks, norm, head."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from memforge.blocks import load_module, registry
from memforge.blocks.base import KindPlan
from memforge.blocks.pools import Pools
from memforge.plan import LayerPlan, ModelPlan
from memforge_kernels import Reader, Record, Recorder, Tape


class Forward(NamedTuple):
    """What a forward pass leaves beside the logits: losses and observations by name, and how each layer read tables."""

    logits: Tensor
    losses: dict[str, Tensor]
    records: list[Sequence[Record]]
    observed: dict[str, Tensor]


class Decoder(nn.Module):
    """Next-token logits, and the auxiliary losses of the blocks summed by name.

    Shape: tokens [b, t] int64 -> logits [b, t, c], dict of scalars (empty in eval mode).
    With `checkpoint_layers`, training keeps only the input of each layer and the slots that it chose, and runs it again
    for the backward pass. With `dropout`, training zeroes so much of what mixers and blocks add to the residual stream.
    """

    checkpoint_layers = False
    dropout = 0.0
    # What every reader is put into before tables are read by it: where they are shared out among ranks, one that asks.
    through: Callable[[Reader], Reader] | None = None

    def __init__(self, plan: ModelPlan) -> None:
        super().__init__()
        pools = {pool.path: _build(pool) for pool in plan.pools}
        shared = {path.removeprefix("pool."): m for path, m in pools.items() if path.startswith("pool.")}
        self.embedding = nn.Embedding(plan.vocab_size, plan.dim)
        self.pool = nn.ModuleDict(shared)
        self.layers = nn.ModuleList(Layer(layer, plan, pools) for layer in plan.layers)
        self.norm = nn.RMSNorm(plan.dim, eps=plan.norm_eps)
        self.head = None if plan.tie_embeddings else nn.Linear(plan.dim, plan.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self._forward(tokens, [Reader] * len(self.layers))[:2]

    def forward_taped(self, tokens: Tensor, taps: Sequence[Sequence[Tensor]] | None = None) -> Forward:
        """As forward, and how each layer read tables; given `taps`, outside of autograd.

        A tap for each read of each layer receives the gradient of what it returned: see memforge_kernels.Tape.
        """
        if taps is None:
            return self._forward(tokens, [Recorder] * len(self.layers))
        return self._forward(tokens, [partial(Tape, of_layer) for of_layer in taps])

    def forward_with(self, tokens: Tensor, readers: Sequence[Callable[[], Reader]]) -> Forward:
        """The forward pass with tables read by a new reader for each layer, and what those readers have recorded."""
        return self._forward(tokens, readers)

    def _forward(self, tokens: Tensor, readers: Sequence[Callable[[], Reader]]) -> Forward:
        x = self.embedding(tokens)
        dropout = self.dropout if self.training else 0.0
        totals: dict[str, Tensor] = {}
        records, observed = [], {}
        for idx, (layer, reader) in enumerate(zip(self.layers, readers, strict=True)):
            run = _run_again(layer, dropout) if self.checkpoint_layers and self.training else layer
            x, losses, read, seen = run(x, self.pool, self._through(reader), dropout)
            totals = _summed(totals, losses)
            records.append(read)
            # Here and not in the layer: what says which layer it is would have each compiled for itself.
            observed |= {f"layers.{idx}.{name}": value for name, value in seen.items()}
        weight = self.embedding.weight if self.head is None else self.head.weight
        return Forward(F.linear(self.norm(x), weight), totals, records, observed)

    def _through(self, reader: Callable[[], Reader]) -> Callable[[], Reader]:
        through = self.through
        return reader if through is None else lambda: through(reader())


def next_token_loss(forward: Callable[..., Any], window: Tensor, *rest: Any) -> tuple[Any, ...]:
    """Mean cross-entropy of a window [b, t + 1] and what else the model returns; 0 for a window without sequences.

    The logits do not outlive the call.
    """
    logits, *others = forward(window[:, :-1], *rest)
    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    how = "mean" if len(window) else "sum"
    return F.cross_entropy(logits, window[:, 1:].flatten(), reduction=how), *others


def _run_again(layer: "Layer", dropout: float) -> Callable[..., Any]:
    """The layer as one that keeps its input and the slots it has chosen, and runs again for its backward pass.

    Slots are not searched for twice: the second search would cost as much, and must not find others.
    """
    context = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if layer.readers else {}
    return partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=dropout > 0, **context)


def _policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    chosen = op == torch.ops.memforge.product_key_topk.default
    return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + the sum of the blocks of norm(x). A part's attribute is the name of its kind."""

    def __init__(self, layer: LayerPlan, plan: ModelPlan, pools: dict[str, nn.Module]) -> None:
        super().__init__()
        self.mixer_kind = layer.mixer.kind
        self.block_kinds = tuple(block.kind for block in layer.blocks)
        # The blocks of which training tells how much they add to the residual stream.
        self.readers = frozenset(block.kind for block in layer.blocks if block.pool_path() is not None)
        self.mixer_norm = nn.RMSNorm(plan.dim, eps=plan.norm_eps)
        self.add_module(self.mixer_kind, _build(layer.mixer, plan.norm_eps))
        self.block_norm = nn.RMSNorm(plan.dim, eps=plan.norm_eps)
        for block in layer.blocks:
            self.add_module(block.kind, _build(block, plan.norm_eps, pools.get(f"{block.path}.pool")))

    def forward(
        self, x: Tensor, shared: nn.ModuleDict, new_reader: Callable[[], Reader] = Reader, dropout: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor], Sequence[Record], dict[str, Tensor]]:
        reader = new_reader()
        observed: dict[str, Tensor] = {}
        x = x + F.dropout(getattr(self, self.mixer_kind)(self.mixer_norm(x)), dropout)
        residual, normed, totals = x, self.block_norm(x), {}
        for kind in self.block_kinds:
            pools = Pools(shared, reader)
            y, losses = getattr(self, kind)(normed, pools)
            if self.training and kind in self.readers:
                pools.observed["read_norm"] = _norm_ratio(y.detach(), residual.detach())
            observed |= {f"{kind}.{name}": value for name, value in pools.observed.items()}
            x, totals = x + F.dropout(y, dropout), _summed(totals, losses)
        return x, totals, reader.records, observed


def _build(plan: KindPlan, *args: object) -> nn.Module:
    return load_module(registry()[plan.kind])(plan, *args)


def _norm_ratio(y: Tensor, x: Tensor) -> Tensor:
    """The norm of y over that of x, both over all tokens; a scalar in fp32."""
    return (y.float().square().mean() / x.float().square().mean()).sqrt()


def _summed(totals: dict[str, Tensor], losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return totals | {name: totals[name] + loss if name in totals else loss for name, loss in losses.items()}
