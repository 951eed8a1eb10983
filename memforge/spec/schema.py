"""The grammar of a spec, table by table. The JSON schema and every error message are derived from it."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from memforge.blocks import union_of
from memforge.blocks.attention.spec import AttentionSpec
from memforge.blocks.base import Count, KindSpec, SpecModel
from memforge.blocks.ffn.spec import FfnSpec
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


class FactsSpec(SpecModel):
    """Facts in several phrasings: each is trained in some of them and tested in the others."""

    kind: Literal["facts"]
    source: Literal["airports"] = Field("airports", description="airport -> city, about 12,000 facts")
    num_facts: Annotated[int, Field(ge=2, le=10_000_000)] = Field(description="facts drawn from the source")
    num_held_out: Annotated[int, Field(ge=1, le=7)] = Field(2, description="of the 8 phrasings, held out per fact")


class TextSpec(SpecModel):
    """The user's own text."""

    kind: Literal["text"]
    path: str = Field(min_length=1, max_length=4096, description="a .txt or .jsonl file, or a folder of them")
    field: str = Field("text", description="the key of the text in each line of a .jsonl file")
    held_out: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.02, description="share of the windows kept for evaluation; at least one"
    )


Data = Annotated[FactsSpec | TextSpec, Field(discriminator="kind")]
Rate = Annotated[float, Field(ge=0, le=10)]


class TrainSpec(SpecModel):
    """How the model is trained."""

    steps: Annotated[int, Field(ge=1, le=10**9)] = Field(description="optimizer steps")
    batch_size: Count = Field(description="sequences per step")
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
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="AdamW moment decay"
    )
    eps: Annotated[float, Field(gt=0, le=1)] = Field(1e-8, description="AdamW epsilon")
    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] = Field(0, description="linear warm-up from zero")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="shape after the warm-up")
    final_rate: Annotated[float, Field(ge=0, le=1)] = Field(0.01, description="last rate as a share of the peak")
    clip_norm: Literal["none"] | Annotated[float, Field(gt=0, le=1e6)] = Field(
        1.0, description='largest gradient norm; "none" leaves gradients as they are'
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="of initialisation and data order")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile; auto: where there is a C++ compiler and the run is long enough"
    )
    activation_checkpointing: bool = Field(
        False, description="keep only the input of each layer and run the layer again in the backward pass"
    )
    log_every: Count = Field(10, description="steps between rows of metrics.jsonl")


class EvalSpec(SpecModel):
    """What is measured on held-out data."""

    every_steps: Annotated[int, Field(ge=1, le=10**9)] | None = Field(
        None, description="evaluate during training; only at the end when absent"
    )
    max_prompts: Annotated[int, Field(ge=1, le=10**8)] = Field(4096, description="held-out prompts or windows")


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
