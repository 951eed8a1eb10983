"""One training step: gradients, their norm, the update; dense parameters by AdamW, value tables by their rows."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memforge.nn.decoder import Decoder, next_token_loss
from memforge.plan import ModelPlan, ParamRow, TrainPlan
from memforge.training.ranks import Ranks
from memforge.training.tables import ReadSite, RowTables, Sites, read_sites
from memforge_kernels import Record, Recorder, RowAdamW, RowOptimizer, RowSGD, Tape


class Gradients(NamedTuple):
    """What a backward pass over a step's windows found, before the update.

    `loss` is the mean cross-entropy per token, `norm` that of all gradients before clipping, `observed` figures of the
    blocks as means over tokens.
    """

    loss: Tensor
    norm: Tensor
    observed: dict[str, Tensor]


class Stepper:
    """Makes the steps of a training run on one model.

    `forward` is the model's forward_taped; it may be replaced by a compiled one. `on_read`, if given, sees every read
    of a table in every pass. Among several `ranks` each makes the steps on its part of the windows, all of them the
    same update.
    """

    def __init__(
        self,
        model: Decoder,
        plan: ModelPlan,
        train: TrainPlan,
        *,
        precision: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.plan, self.train = model, plan, train
        self.precision, self.ranks = precision, ranks or Ranks()
        self.forward: Callable[..., Any] = model.forward_taped if self.ranks.size == 1 else model.forward_with
        self.on_read: Callable[[ReadSite, Record], None] | None = None
        self._sites: dict[int, Sites] = {}
        self._paths = {parameter: path for path, parameter in model.named_parameters()}
        model.checkpoint_layers, model.dropout = train.activation_checkpointing, train.dropout
        self.tables = self._row_tables()
        by_rows = self.tables.tables.keys() if self.tables else ()
        rows = [row for row in plan.params if row.path not in by_rows]
        first, second = train.betas
        self.dense = torch.optim.AdamW(
            _groups(model, rows, train), lr=train.learning_rate, betas=(first, second), eps=train.eps, fused=True
        )

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.dense] if self.tables is None else [self.dense, self.tables.optimizer]

    def learning_rates(self) -> dict[str, float]:
        """The rates of the last update by group of parameters."""
        return {group["name"]: float(group["lr"]) for o in self.optimizers for group in o.param_groups}

    def sites(self, batch: int) -> Sites:
        """How the model reads tables in a pass over so many sequences."""
        if batch not in self._sites:
            self._sites[batch] = read_sites(self.plan, batch, self.train.seq_len)
        return self._sites[batch]

    def backward(self, window: Tensor, *, step: int = 0) -> Gradients:
        """Gradients of a window [b, t + 1], pass by pass, each weighted by its share of the tokens.

        Of several ranks each gives its part of a batch; the figures observed are then its part of the mean.
        """
        ranks, size = self.ranks, len(window) if self.ranks.size == 1 else self.train.batch_size
        split = ranks.split(size, self.train.micro_batch_size)
        loss, observed = torch.zeros((), device=window.device), dict[str, Tensor]()
        for idx, part in enumerate(window.split(split[ranks.rank])):
            # All that is drawn at random in a pass follows from this alone, so that a run can start anywhere.
            torch.manual_seed(derived_seed(self.train.seed, step, ranks.rank * len(split[0]) + idx))
            share = len(part) / size
            part_loss, seen = self._pass(part, share, [of_rank[idx] for of_rank in split])
            loss = loss + share * part_loss
            for name, value in seen.items():
                observed[name] = share * value + observed.get(name, 0.0)
        return Gradients(*self._of_all_ranks(loss), observed)

    def _pass(self, window: Tensor, share: float, batches: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the gradients of `share` times the loss of a window; `batches` are the sequences of all ranks."""
        sites = self.sites(max(batches))
        tokens = [batch * self.train.seq_len for batch in batches]
        with self.ranks.tokens(tokens):
            with torch.autocast(window.device.type, dtype=self.precision, enabled=self.precision is not None):
                loss, extra, records, observed = next_token_loss(self.forward, window, self._readers(sites))
            if not len(window):  # it takes part for the others' sake; means over no tokens are no numbers
                extra, observed = {}, {name: torch.zeros_like(value) for name, value in observed.items()}
            ((loss + sum(extra.values())) * share).backward()
        if self.tables is not None:
            self.tables.add(sites, records, partial(self.ranks.of_all_copies, tokens=tokens))
        if len(window):
            self._tell(sites, records)
        return loss.detach(), {name: value.detach() for name, value in observed.items()}

    def _readers(self, sites: Sites) -> Any:
        """What the forward pass is given to read tables by: taps where it is one graph, else what makes its own."""
        if self.ranks.size > 1:
            return [Recorder if self.tables is None else Tape] * len(sites)
        return self.tables.new_taps(sites) if self.tables else None

    def _tell(self, sites: Sites, records: Sequence[Sequence[Record]]) -> None:
        if self.on_read is None:
            return
        for of_layer, made in zip(sites, records, strict=True):
            for site, record in zip(of_layer, made, strict=True):
                self.on_read(site, record)

    def _of_all_ranks(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the norm of the gradients, of which this rank has a part: one norm, and one decision by it."""
        mesh, local = self.ranks.mesh, self.ranks.local
        of_pools = [self.model.get_parameter(row.path) for row in self.plan.params if row.group == "values"]
        shared = set(of_pools) if mesh.ranks > 1 else set()
        if self.tables is None:
            self._sum_copies(of_pools)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None and p not in shared]
        norm = nn.utils.get_total_norm([local(grad) for grad in grads])
        dense = norm.double().square() / mesh.dp_replicate
        pools = sum(
            (p.grad.double().square().sum() for p in shared if p.grad is not None), start=torch.zeros_like(dense)
        )
        if self.tables is not None:
            pools = pools + self.tables.optimizer.squared_norm().to(dense.device)
        sums = self.ranks.total(torch.stack((loss.double(), dense, pools / mesh.copies)))
        return sums[0].to(loss.dtype), sums[1:].sum().sqrt().to(norm.dtype)

    def _sum_copies(self, pools: list[nn.Parameter]) -> None:
        """Pools that are updated as a whole have gradients of their own size, of the tokens of one memory group."""
        for pool in pools:
            if pool.grad is not None:
                pool.grad = self.ranks.total_of_copies(pool.grad)

    def update(self, norm: Tensor | float, shares: Mapping[str, float]) -> None:
        """The update, at these shares of the peak rates, with gradients of this norm clipped."""
        limit = self.train.clip_norm
        scale = 1.0 if limit == "none" else min(1.0, limit / (float(norm) + 1e-6))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * shares[group["name"]]
        if scale < 1:
            grads = [self.ranks.local(p.grad) for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, scale)
        self.dense.step()
        # Now, not before the next backward pass: gradients need not live beside the activations of a forward pass.
        self.dense.zero_grad(set_to_none=True)
        if self.tables is not None:
            self.tables.optimizer.step(scale=scale)

    def skip(self) -> None:
        """Forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors and numbers that the optimizers keep, by `path.name`."""
        tensors, numbers = dict[str, Tensor](), dict[str, float]()
        for path, kept in self._kept():
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    tensors[f"{path}.{name}"] = value
                else:
                    numbers[f"{path}.{name}"] = value
        return tensors, numbers

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Take over what `state` gave."""
        by_path: dict[str, dict[str, Any]] = {}
        for key, value in (*tensors.items(), *numbers.items()):
            path, _, name = key.rpartition(".")
            if isinstance(value, Tensor):
                value = self.ranks.as_part_of(self.model.get_parameter(path), value)
            by_path.setdefault(path, {})[name] = value
        for optimizer in self.optimizers:
            given = optimizer.state_dict()
            members = [self._paths[p] for group in optimizer.param_groups for p in group["params"]]
            given["state"] = {idx: by_path[path] for idx, path in enumerate(members) if path in by_path}
            optimizer.load_state_dict(given)

    def _kept(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for optimizer in self.optimizers:
            yield from ((self._paths[parameter], kept) for parameter, kept in optimizer.state.items())

    def _row_tables(self) -> RowTables | None:
        """None where no value table is updated by rows."""
        if self.train.value_update == "dense":
            return None
        values = {row.path: row for row in self.plan.params if row.group == "values"}
        read = dict.fromkeys(site.table for layer in self.sites(self.train.micro_batch_size) for site in layer)
        if not read:
            return None
        rows = [values[path] for path in read]
        return RowTables(self.model, list(read), _row_optimizer(_groups(self.model, rows, self.train), self.train))


def derived_seed(*parts: int | str) -> int:
    """63 bits that depend on all the parts."""
    text = ":".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def _row_optimizer(groups: list[dict[str, Any]], train: TrainPlan) -> RowOptimizer:
    lr, rounding, seed = train.value_learning_rate, train.value_rounding, train.seed
    if train.value_optimizer == "sgd":
        return RowSGD(groups, lr=lr, rounding=rounding, seed=seed)
    assert train.value_update != "dense"
    first, second = train.betas
    rule = train.value_update
    return RowAdamW(groups, lr=lr, betas=(first, second), eps=train.eps, rule=rule, rounding=rounding, seed=seed)


def _groups(model: nn.Module, rows: list[ParamRow], train: TrainPlan) -> list[dict[str, Any]]:
    """One group for each (group, decay) of the rows; `peak` is the rate that the schedule scales."""
    peaks = {"dense": train.learning_rate, "values": train.value_learning_rate}
    members: dict[tuple[str, float], list[nn.Parameter]] = {}
    for row in rows:
        decay = train.value_weight_decay if row.group == "values" else train.weight_decay if row.decay else 0.0
        members.setdefault((row.group, decay), []).append(model.get_parameter(row.path))
    return [
        {"name": group, "params": params, "peak": peaks[group], "weight_decay": decay}
        for (group, decay), params in members.items()
    ]
