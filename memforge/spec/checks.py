"""Combinations that no single key rules out: placement, pools and their readers, training against the model."""

from collections.abc import Iterator
from dataclasses import replace

from memforge.blocks.base import KindSpec, Site
from memforge.errors import KeyPath, Problem
from memforge.mesh import PoolReads
from memforge.spec.placement import select_layers
from memforge.spec.schema import PlaceRule, Spec, TrainSpec, parts_at

# Public attributes of torch.nn.ModuleDict; a pool becomes an attribute of one. A test compares this with torch.
RESERVED_POOL_NAMES = frozenset(
    """T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda double dump_patches
    eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu load_state_dict
    modules mtia named_buffers named_children named_modules named_parameters parameters register_backward_hook
    register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook
    register_module register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_
    set_extra_state set_submodule share_memory state_dict to to_empty train training type xpu zero_grad
    clear items keys pop update values""".split()
)

# A byte-level BPE has one token for each byte and one that separates documents.
MIN_BPE_VOCAB = 257


def site_of(spec: Spec) -> Site:
    return Site(spec.model.dim, spec.model.num_layers, spec.model.max_seq_len, spec.pool)


def check(spec: Spec) -> Iterator[Problem]:
    """Every impossible combination in a spec whose keys are valid one by one."""
    site = site_of(spec)
    yield from _under(("attention",), spec.attention, site)
    if spec.ffn is not None:
        yield from _under(("ffn",), spec.ffn, site)
    for name, pool in spec.pool.items():
        if name in RESERVED_POOL_NAMES or "." in name:
            yield Problem(("pool", name), f"a pool cannot be named `{name}`", "choose another name", at_key=True)
        yield from _under(("pool", name), pool, site)
    selected, problems = selections(spec)
    yield from problems
    for i, rule in enumerate(spec.place):
        yield from _check_rule(i, rule, site)
    yield from _check_layers(spec, selected, placed=not problems)
    yield from _check_added(spec, selected)
    yield from _check_training(spec)
    yield from _check_parallel(spec, site)


def check_baseline(spec: Spec, baseline: Spec) -> Iterator[Problem]:
    """A claim is judged at the length of training, which the baseline must be able to take."""
    if spec.train is None:
        return
    length = spec.train.seq_len or spec.model.max_seq_len
    if baseline.model.max_seq_len < length:
        yield Problem(
            ("parity", "against"),
            f"{baseline.model.name} takes at most {baseline.model.max_seq_len} tokens, training takes {length}",
            "the claim is judged at the length of training: the baseline needs a larger model.max_seq_len",
            related=(
                (("train", "seq_len"), "seq_len is set here"),
                (("model", "max_seq_len"), "max_seq_len is set here"),
            ),
        )


def selections(spec: Spec) -> tuple[list[frozenset[int]], list[Problem]]:
    """The layers of each rule, and a problem for each rule that selects none that exist."""
    selected: list[frozenset[int]] = []
    problems = []
    for i, rule in enumerate(spec.place):
        try:
            selected.append(frozenset(select_layers(rule.layers, spec.model.num_layers)))
        except ValueError as error:
            selected.append(frozenset())
            key: KeyPath = ("place", i, "layers")
            if isinstance(rule.layers, list):
                outside = [j for j, idx in enumerate(rule.layers) if idx >= spec.model.num_layers]
                key = (*key, outside[0]) if outside else key
            related: tuple[tuple[KeyPath, str], ...] = ((("model", "num_layers"), "num_layers is set here"),)
            problems.append(Problem(key, str(error), related=related if "outside" in str(error) else ()))
    return selected, problems


def _under(prefix: KeyPath, block: KindSpec, site: Site) -> Iterator[Problem]:
    for p in block.check(site):
        paths = [name.split(".") for name in p.siblings]
        beside = tuple(((*prefix, *path), f"{path[-1]} is set here") for path in paths)
        yield replace(p, key=(*prefix, *p.key), siblings=(), related=p.related + beside)


def _check_rule(i: int, rule: PlaceRule, site: Site) -> Iterator[Problem]:
    if rule.block is None and rule.mixer is None:
        parts = (("place", i, "block"), ("place", i, "mixer"))
        yield Problem(("place", i), "a [[place]] rule sets `block`, `mixer`, or both", at_key=True, depends=parts)
    if rule.mode == "add" and rule.block is None:
        block: KeyPath = ("place", i, "block")
        yield Problem(("place", i, "mode"), 'mode = "add" needs a `block` to add', depends=(block,))
    if rule.block is not None:
        yield from _under(("place", i, "block"), rule.block, site)
    if rule.mixer is not None:
        yield from _under(("place", i, "mixer"), rule.mixer, site)


def _check_layers(spec: Spec, selected: list[frozenset[int]], *, placed: bool) -> Iterator[Problem]:
    """Layers without a block or with two of a kind, and pools that no layer reads.

    Unless every rule is `placed` in the model, only pools that no rule names are reported.
    """
    bare, doubled = [], set()
    read = set() if placed else {rule.block.reads() for rule in spec.place if rule.block is not None}
    for idx in range(spec.model.num_layers if placed else 0):
        block, added, _ = parts_at(spec, idx, selected)
        if block is None:
            bare.append(idx)
        elif added is not None and added.kind == block.kind:
            doubled.add(block.kind)
        read |= {part.reads() for part in (block, added) if part is not None}
    # Of two blocks added to one layer the error says that; it does not also leave the pool of the first unread.
    read |= {rule.block.reads() for rule in spec.place if rule.mode == "add" and rule.block is not None}
    if bare:
        listed = f"layer {bare[0]}" if len(bare) == 1 else f"{len(bare)} layers, the first of them layer {bare[0]}"
        yield Problem(
            ("ffn",),
            f"no block for {listed}",
            "write an [ffn] table or a [[place]] rule for them",
            depends=(("place",), ("model", "num_layers")),
        )
    for kind in sorted(doubled):
        rule = next(i for i, r in enumerate(spec.place) if r.mode == "add" and r.block and r.block.kind == kind)
        yield Problem(
            ("place", rule, "block", "kind"), f"adds a second `{kind}` to a layer that has one", depends=(("place",),)
        )
    # A reader that names no pool that exists may have meant this one; its own error says so.
    misnamed = {name for name in read if name is not None} - set(spec.pool)
    for name in spec.pool:
        if name not in read and not misnamed:
            message = f"no block reads the pool `{name}`"
            hint = "remove it or name it in a block"
            yield Problem(("pool", name), message, hint, at_key=True, depends=(("place",),))


def _check_added(spec: Spec, selected: list[frozenset[int]]) -> Iterator[Problem]:
    """At most one block may be added to a layer."""
    adding = [i for i, rule in enumerate(spec.place) if rule.mode == "add"]
    for n, second in enumerate(adding):
        for first in adding[:n]:
            if both := selected[first] & selected[second]:
                message = f"layer {min(both)} has an added block already; at most one can be added"
                there = ((("place", first, "mode"), "the first is added here"),)
                yield Problem(("place", second, "mode"), message, related=there, depends=(("place",),))
                break


def _check_training(spec: Spec) -> Iterator[Problem]:
    trained_here = spec.data is not None and spec.data.tokenizer is None
    if trained_here and spec.model.vocab_size < MIN_BPE_VOCAB:
        yield Problem(
            ("model", "vocab_size"),
            f"vocab_size = {spec.model.vocab_size} is less than the {MIN_BPE_VOCAB} of a byte-level tokenizer",
        )
    if spec.train is None:
        return
    if spec.train.seq_len is not None and spec.train.seq_len > spec.model.max_seq_len:
        yield Problem(
            ("train", "seq_len"),
            f"seq_len = {spec.train.seq_len} is more than model.max_seq_len = {spec.model.max_seq_len}",
            related=((("model", "max_seq_len"), "max_seq_len is set here"),),
        )
    yield from _check_steps(spec.train)
    yield from _check_value_update(spec, spec.train)


def _check_steps(train: TrainSpec) -> Iterator[Problem]:
    """Numbers of one step or of all that exceed what they are part of."""
    if train.micro_batch_size is not None and train.micro_batch_size > train.batch_size:
        yield Problem(
            ("train", "micro_batch_size"),
            f"micro_batch_size = {train.micro_batch_size} is more than batch_size = {train.batch_size}",
            related=((("train", "batch_size"), "batch_size is set here"),),
        )
    falling = [key for key in ("schedule", "value_schedule") if getattr(train, key) == "exponential"]
    if falling and train.final_rate == 0:
        there = tuple((("train", key), f"{key} is set here") for key in falling)
        yield Problem(("train", "final_rate"), "the schedule exponential never comes to 0", "use 0.01", there)
    if train.decay_steps is None:
        return
    where: KeyPath = ("train", "decay_steps")
    if "wsd" not in (train.schedule, train.value_schedule):
        there = ((("train", "schedule"), "schedule is set here"),)
        yield Problem(where, "decay_steps belongs to the schedule wsd", 'use schedule = "wsd"', there)
    elif train.decay_steps > train.steps:
        there = ((("train", "steps"), "steps is set here"),)
        yield Problem(where, f"decay_steps = {train.decay_steps} is more than steps = {train.steps}", related=there)


def _check_value_update(spec: Spec, train: TrainSpec) -> Iterator[Problem]:
    """Updates of pools that do not exist, or would lose what is smaller than a rounding."""
    update: KeyPath = ("train", "value_update")
    if train.value_optimizer == "sgd" and train.value_update != "lazy":
        there = ((("train", "value_optimizer"), "value_optimizer is set here"),)
        yield Problem(update, 'value_optimizer = "sgd" updates lazily, and in no other way', 'use "lazy"', there)
    beta1, beta2 = train.betas
    if train.value_update == "catch_up" and beta1 >= beta2**0.5:
        there = ((("train", "betas"), "betas is set here"),)
        why = f"moments must fade for rows to catch up: {beta1} is not less than sqrt({beta2}) = {beta2**0.5:.4g}"
        yield Problem(update, why, 'use "lazy"', there)
    for key, dtype in _low_precision(spec):
        here = ((key, f"{dtype} is set here"),)
        if train.value_update == "dense":
            yield Problem(update, f"dense updates of a {dtype} pool would lose small ones", 'use "lazy"', here)
        elif train.value_rounding == "stochastic" and dtype != "bfloat16":
            rounding = ("train", "value_rounding")
            yield Problem(rounding, f"a {dtype} pool is not rounded stochastically", 'use "master"', here)


def _check_parallel(spec: Spec, site: Site) -> Iterator[Problem]:
    """Meshes that do not fit the model."""
    ranks, choice, where = spec.parallel.memory, spec.parallel.pools, ("parallel", "memory")
    if ranks == 1:
        return
    given = ((("parallel", "pools"), "pools is set here"),) if choice != "auto" else ()
    pools = list(_pools(spec))
    if not pools:
        yield Problem(where, f"memory = {ranks}, and no block reads a pool", "leave it out", depends=(("place",),))
    for key, pool in pools:
        path = f"pool.{key[1]}" if key[0] == "pool" else "pool"
        shapes = [row.shape for row in pool.plan(site, path).params()]
        if not shapes:
            continue
        reads = PoolReads(min(shape[0] for shape in shapes), tuple(shape[-1] for shape in shapes), ())
        possible = reads.possible(ranks)
        if possible if choice == "auto" else choice in possible:
            continue
        parts = {"columns": f"{min(reads.widths)} columns", "rows": f"{reads.slots} rows"}
        few = " and the ".join(parts.values()) if choice == "auto" else parts[choice]
        yield Problem(
            where,
            f"memory = {ranks} is more than the {few} of a pool",
            f'pools = "{possible[0]}" would do' if possible else None,
            related=((key, "the pool is set here"), *given),
            depends=(("parallel", "pools"),),
        )


def _pools(spec: Spec) -> Iterator[tuple[KeyPath, KindSpec]]:
    """All pools, and where they are set."""
    yield from ((("pool", name), pool) for name, pool in spec.pool.items())
    for i, rule in enumerate(spec.place):
        if rule.block is not None and (own := rule.block.own_pool()) is not None:
            yield ("place", i, "block"), own


def _low_precision(spec: Spec) -> Iterator[tuple[KeyPath, str]]:
    """Pools stored in 16 bits: where that is said, and the type."""
    for key, pool in _pools(spec):
        dtype = getattr(pool, "dtype", "float32")
        if dtype != "float32":
            yield (*key, "dtype"), dtype
