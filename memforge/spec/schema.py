"""The grammar of a spec, table by table. The JSON schema and every error message are derived from it."""

import re
from typing import Annotated, Any, Literal, NoReturn

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from memforge.blocks import union_of
from memforge.blocks.attention.spec import AttentionSpec
from memforge.blocks.base import Count, KindSpec, SpecModel
from memforge.blocks.ffn.spec import FfnSpec
from memforge.mesh import MAX_RANKS, SplitChoice
from memforge.spec.placement import MAX_LAYERS, LayerSelector

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


Block: Any = union_of("block", "spec")
Mixer: Any = union_of("mixer", "spec", default="attention")
Pool: Any = union_of("pool", "spec", default="values")


class ModelSpec(SpecModel):
    """The frame that every layer shares."""

    name: Annotated[str, Field(pattern=NAME)] = Field(description="names directories and report columns")
    dim: Annotated[int, Field(ge=1, le=2**17)] = Field(description="model width")
    num_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = Field(description="decoder layers")
    vocab_size: Annotated[int, Field(ge=2, le=2**22)] = Field(description="rows of the embedding")
    max_seq_len: Annotated[int, Field(ge=1, le=2**24)] = Field(description="longest sequence, in tokens")
    tie_embeddings: bool = Field(False, description="the output head is the embedding")
    norm_eps: Annotated[float, Field(gt=0, le=1)] = Field(1e-5, description="added to mean squares in RMSNorm")


class PlaceRule(SpecModel):
    """Puts a block, a mixer, or both into the selected layers; the last rule that sets each wins."""

    layers: LayerSelector = Field(
        description='"all", "middle", [4, 12], { centered = 3, stride = 8 } or { every = 4, from = 2 }'
    )
    block: Block | None = Field(None, description="what takes the place of the feed-forward network")
    mixer: Mixer | None = Field(None, description="what mixes the tokens")
    mode: Literal["replace", "add"] = Field("replace", description="add: beside the block in force, not instead")


MAX_TOLERANCE = 100
Tolerance = Annotated[float, Field(ge=0, le=MAX_TOLERANCE)]


class ToleranceSpec(SpecModel):
    """Largest |ratio - 1| on each axis, of which at least one is named; the others are shown, not judged."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    params: Tolerance | None = None
    active_params: Tolerance | None = None
    flops: Tolerance | None = None
    bytes: Tolerance | None = None

    @model_validator(mode="after")
    def _judges_something(self) -> "ToleranceSpec":
        """A claim without an axis would hold for any two models."""
        axes = type(self).model_fields
        if all(getattr(self, axis) is None for axis in axes):
            raise ValueError(f"name at least one axis: {', '.join(axes)}")
        return self


DEFAULT_TOLERANCE = ToleranceSpec(flops=0.05)


class ParitySpec(SpecModel):
    """The claim that this model matches another one."""

    against: str = Field(min_length=1, max_length=4096, description="a spec, relative to this file")
    tolerance: ToleranceSpec = Field(DEFAULT_TOLERANCE, description="e.g. { flops = 0.05 }")


TokenizerPath = Annotated[str, Field(min_length=1, max_length=4096)] | None
TOKENIZER_MEANING = "a `tokenizers` JSON file to use; trained on the data when absent"


class FactsSpec(SpecModel):
    """Facts in several phrasings: each is trained in some of them and tested in the others."""

    kind: Literal["facts"]
    source: Literal["airports", "taxa"] = Field(
        "airports",
        description="airports: airport -> city, about 13,000 facts; taxa: genus -> family, about 57,000 (`make data`)",
    )
    num_facts: Annotated[int, Field(ge=2, le=10_000_000)] = Field(description="facts drawn from the source")
    num_held_out: Annotated[int, Field(ge=1, le=7)] = Field(2, description="of the 8 phrasings, held out per fact")
    rare_share: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.0, description="of the facts, trained in 2 more phrasings; the others are tested in them, as recall.rare"
    )
    num_unseen: Annotated[int, Field(ge=0, le=10_000_000)] = Field(
        0, description="more facts, never trained, each tested in one phrasing, as recall.unseen: what names give away"
    )
    tokenizer: TokenizerPath = Field(None, description=TOKENIZER_MEANING)


class TextSpec(SpecModel):
    """The user's own text."""

    kind: Literal["text"]
    path: str = Field(
        min_length=1,
        max_length=4096,
        description="a .txt, .jsonl or .parquet file, a Hugging Face dataset on disk, or a folder of them",
    )
    field: str = Field("text", description="the key of the text in .jsonl files, the column in .parquet and datasets")
    held_out: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.02, description="share of the windows kept for evaluation; at least one"
    )
    tokenizer: TokenizerPath = Field(None, description=TOKENIZER_MEANING)


DataPart = Annotated[FactsSpec | TextSpec, Field(discriminator="kind")]
MAX_PARTS = 64
# A cycle of so many windows holds each part of a mixture in its share.
MIXTURE_CYCLE = 4096


class MixtureSpec(SpecModel):
    """Several sources read side by side, each in its share of the windows."""

    kind: Literal["mixture"]
    parts: dict[str, DataPart] = Field(
        min_length=1, max_length=MAX_PARTS, description="[data.parts.NAME]: tables of kind facts or text"
    )
    weights: dict[str, Annotated[float, Field(gt=0, le=1e9)]] = Field(
        description="of each part, e.g. { code = 0.7, facts = 0.3 }; its share of the windows is its share of the sum"
    )
    tokenizer: TokenizerPath = Field(None, description=TOKENIZER_MEANING)

    @field_validator("parts")
    @classmethod
    def _parts_are_named_and_share_a_tokenizer(cls, parts: dict[str, Any]) -> dict[str, Any]:
        for name, part in parts.items():
            if not re.fullmatch(NAME, name):
                pattern = {"pattern": NAME}
                item: Any = {"type": "string_pattern_mismatch", "loc": (name, "[key]"), "input": name, "ctx": pattern}
                raise ValidationError.from_exception_data("parts", [item])
            if part.tokenizer is not None:
                _refuse((name, "tokenizer"), part.tokenizer, "the parts share one tokenizer: set data.tokenizer")
        return parts

    @field_validator("weights")
    @classmethod
    def _every_part_has_a_share(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        parts = info.data.get("parts")
        if parts is None:  # refused itself
            return weights
        for name, weight in weights.items():
            if name not in parts:
                _refuse((name,), weight, f"no table [data.parts.{name}]; the parts are {', '.join(parts)}")
        if missing := [name for name in parts if name not in weights]:
            _refuse((), weights, f"no weight for the part {', '.join(missing)}")
        for name, weight in weights.items():
            if weight * MIXTURE_CYCLE < sum(weights.values()):
                _refuse((name,), weight, f"gives less than one window in {MIXTURE_CYCLE:,} to the part {name}")
        return weights


def _refuse(at: tuple[str, ...], value: Any, message: str) -> NoReturn:
    """Raise an error that points at a key inside the value that is validated, not at the whole of it."""
    item: Any = {"type": "value_error", "loc": at, "input": value, "ctx": {"error": ValueError(message)}}
    raise ValidationError.from_exception_data("data", [item])


Data = Annotated[FactsSpec | TextSpec | MixtureSpec, Field(discriminator="kind")]
Rate = Annotated[float, Field(ge=0, le=10)]
ScheduleName = Literal["linear", "cosine", "exponential", "constant", "wsd"]
Steps = Annotated[int, Field(ge=1, le=10**9)]


class TrainSpec(SpecModel):
    """How the model is trained."""

    steps: Annotated[int, Field(ge=1, le=10**9)] = Field(description="optimizer steps")
    batch_size: Count = Field(description="sequences per step")
    micro_batch_size: Count | None = Field(
        None, description="sequences per pass; gradients of all passes of a step are added up; batch_size if absent"
    )
    seq_len: Annotated[int, Field(ge=1, le=2**24)] | None = Field(
        None, description="tokens per sequence; model.max_seq_len when absent"
    )
    learning_rate: Rate = Field(description="peak rate")
    value_learning_rate: Rate | None = Field(None, description="peak rate of value pools; learning_rate if absent")
    value_optimizer: Literal["adamw", "sgd"] = Field("adamw", description="of value pools")
    value_update: Literal["lazy", "lazy_row_step", "catch_up", "dense"] = Field(
        "lazy",
        description="what becomes of rows that no token read: they rest, with bias correction by the step or by the "
        "row's own count, or catch up when they are read again; dense: every row moves in every step",
    )
    value_rounding: Literal["master", "stochastic"] = Field(
        "master", description="how updates of pools in 16 bits are kept: in an fp32 copy, or by chance (bfloat16)"
    )
    weight_decay: Rate = Field(0.1, description="AdamW decay of matrices; never of norms, biases and values")
    value_weight_decay: Rate = Field(0.0, description="decay of value pools, of the rows that are updated")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="AdamW moment decay"
    )
    eps: Annotated[float, Field(gt=0, le=1)] = Field(1e-8, description="AdamW epsilon")
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = Field(0, description="linear warm-up from zero")
    schedule: ScheduleName = Field(
        "linear",
        description="shape after the warm-up; exponential: less by the same factor in each step; wsd: at the peak, "
        "then linear over the last decay_steps",
    )
    value_schedule: ScheduleName | None = Field(None, description="of value pools; schedule if absent")
    decay_steps: Steps | None = Field(None, description="of wsd; a fifth of the steps when absent")
    final_rate: Annotated[float, Field(ge=0, le=1)] = Field(0.01, description="last rate as a share of the peak")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="chance of zeroing an element of what a mixer or block adds"
    )
    clip_norm: Literal["none"] | Annotated[float, Field(gt=0, le=1e6)] = Field(
        1.0, description='largest gradient norm; "none" leaves gradients as they are'
    )
    max_skipped: Annotated[int, Field(ge=0, le=10**9)] = Field(
        0, description="steps that may be left out for a NaN or infinite gradient before training stops"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of initialisation, data order and dropout")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of activations and matrix products; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile; auto: where there is a C++ compiler and the run is long enough"
    )
    activation_checkpointing: bool = Field(
        False, description="keep only the input of each layer and run the layer again in the backward pass"
    )
    revive_every: Steps | None = Field(
        None, description="steps after which sub-keys that chose no slot since restart beside a busy one; absent: never"
    )
    log_every: Count = Field(10, description="steps between rows of metrics.jsonl")
    checkpoint_every: Steps | None = Field(None, description="steps between checkpoints, beside checkpoint_minutes")
    checkpoint_minutes: Annotated[float, Field(gt=0, le=10**6)] = Field(15.0, description="minutes between checkpoints")
    keep_checkpoints: Annotated[int, Field(ge=1, le=10**6)] = Field(3, description="how many of the newest are kept")
    async_checkpoints: bool = Field(
        False, description="write checkpoints beside the training, from a copy of all state in main memory"
    )
    data_workers: Annotated[int, Field(ge=0, le=64)] = Field(1, description="threads that read batches ahead")
    tensorboard: bool = Field(False, description="also write the metrics as TensorBoard scalars")
    wandb: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="also send the metrics to this Weights & Biases project"
    )


class EvalSpec(SpecModel):
    """What is measured on held-out data."""

    every_steps: Annotated[int, Field(ge=1, le=10**9)] | None = Field(
        None, description="evaluate during training; only at the end when absent"
    )
    max_prompts: Annotated[int, Field(ge=1, le=10**8)] = Field(4096, description="held-out prompts or windows")
    samples: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(max_length=64)] = Field(
        [], description="texts to continue whenever the model is scored; one from the held-out data when empty"
    )
    sample_tokens: Annotated[int, Field(ge=0, le=100_000)] = Field(48, description="tokens of each; 0: no samples")
    sample_temperature: Annotated[float, Field(ge=0, le=100)] = Field(0.0, description="0 takes the most likely token")


Ranks = Annotated[int, Field(ge=1, le=MAX_RANKS)]


class ParallelSpec(SpecModel):
    """How a run is shared out among ranks. All of them read tokens of their own; train.batch_size is that of all."""

    dp_replicate: Ranks = Field(1, description="copies of the dense parameters; their gradients are summed")
    dp_shard: Literal["auto"] | Ranks = Field(
        "auto", description="ranks that dense parameters are sharded over, times memory; auto: all that there are"
    )
    memory: Ranks = Field(1, description="ranks that value pools are shared out to")
    pools: SplitChoice = Field(
        "auto", description="how: by columns, by rows, or each pool in the way that moves fewer bytes (auto)"
    )
    timeout_minutes: Annotated[float, Field(gt=0, le=10**5)] = Field(
        10.0, description="how long ranks wait for one another before the run ends"
    )


class Spec(SpecModel):
    """A whole spec file."""

    model: ModelSpec
    attention: AttentionSpec
    ffn: FfnSpec | None = None
    pool: Annotated[dict[Annotated[str, Field(pattern=NAME)], Pool], Field(max_length=256)] = {}
    place: Annotated[list[PlaceRule], Field(max_length=256)] = []
    parity: ParitySpec | None = None
    data: Data | None = None
    train: TrainSpec | None = None
    parallel: ParallelSpec = ParallelSpec()
    eval: EvalSpec = EvalSpec()

    _baseline: "Spec | None" = None
    _baseline_path: str | None = None
    _document: Any = None

    @property
    def baseline(self) -> "Spec | None":
        """The spec that [parity] names, loaded with this one."""
        return self._baseline

    @property
    def baseline_path(self) -> str | None:
        """Where that spec is, as seen from where this one was named."""
        return self._baseline_path


def parts_at(
    spec: Spec, layer_idx: int, selected: list[frozenset[int]]
) -> tuple[KindSpec | None, KindSpec | None, KindSpec]:
    """Block, added block and mixer of a layer after all rules; `selected[i]` are the layers of rule i."""
    block: KindSpec | None = spec.ffn
    added: KindSpec | None = None
    mixer: KindSpec = spec.attention
    for rule, layers in zip(spec.place, selected, strict=True):
        if layer_idx not in layers:
            continue
        mixer = rule.mixer or mixer
        if rule.block is not None and rule.mode == "add":
            added = rule.block
        elif rule.block is not None:
            block = rule.block
    return block, added, mixer
