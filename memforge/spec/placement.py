"""Which layers a [[place]] rule means."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from memforge.blocks.base import SpecModel

MAX_LAYERS = 1024

LayerIdx = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]


class Centered(SpecModel):
    """`centered` layers, `stride` apart, around layer num_layers // 2."""

    centered: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    stride: Annotated[int, Field(ge=1, le=MAX_LAYERS)]


class Every(SpecModel):
    """Every `every`-th layer, starting at layer `from`."""

    every: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    first: Annotated[int, Field(ge=0, lt=MAX_LAYERS, alias="from")] = 0


def _form(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "<list>"
    if isinstance(value, Every) or (isinstance(value, dict) and ("every" in value or "from" in value)):
        return "<every>"
    if isinstance(value, Centered | dict):
        return "<centered>"
    return "<word>"


LayerSelector = Annotated[
    Annotated[Literal["all", "middle"], Tag("<word>")]
    | Annotated[Annotated[list[LayerIdx], Field(min_length=1, max_length=MAX_LAYERS)], Tag("<list>")]
    | Annotated[Centered, Tag("<centered>")]
    | Annotated[Every, Tag("<every>")],
    Discriminator(_form),
]


def select_layers(selector: Any, num_layers: int) -> tuple[int, ...]:
    """Layer indices, ascending. Raises ValueError when one is outside 0..num_layers-1 or not an integer."""
    if selector == "all":
        return tuple(range(num_layers))
    if selector == "middle":
        return (num_layers // 2,)
    if isinstance(selector, Centered):
        return _centered(selector, num_layers)
    if isinstance(selector, Every):
        chosen = tuple(range(selector.first, num_layers, selector.every))
        if not chosen:
            raise ValueError(f"from = {selector.first} is outside a model of {num_layers} layers")
        return chosen
    for idx in selector:
        if idx >= num_layers:
            raise ValueError(f"layer {idx} is outside a model of {num_layers} layers (0 to {num_layers - 1})")
    if len(set(selector)) != len(selector):
        raise ValueError("a layer is listed twice")
    return tuple(sorted(selector))


def _centered(selector: Centered, num_layers: int) -> tuple[int, ...]:
    # Twice the first index, so that half layers stay integers.
    first = 2 * (num_layers // 2) - (selector.centered - 1) * selector.stride
    if first % 2:
        raise ValueError(
            f"{selector.centered} layers with stride {selector.stride} do not centre on a layer; "
            "an even number needs an even stride"
        )
    start, last = first // 2, first // 2 + (selector.centered - 1) * selector.stride
    if start < 0 or last >= num_layers:
        raise ValueError(f"layers {start} to {last} do not lie inside a model of {num_layers} layers")
    return tuple(range(start, last + 1, selector.stride))
