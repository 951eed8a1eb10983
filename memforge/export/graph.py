"""The model as a graph: exported on meta, and written out to be read."""

import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from memforge.build import build_model
from memforge.plan import ModelPlan

SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64", torch.bool: "bool"}


def dynamic_shapes(plan: ModelPlan) -> dict[int, Any]:
    """Batch and sequence length of the tokens; a model of two tokens at most has no length to vary."""
    shapes: dict[int, Any] = {0: Dim("batch")}
    if plan.max_seq_len > 2:
        shapes[1] = Dim("seq_len", max=plan.max_seq_len)
    return shapes


def exported(plan: ModelPlan, model: nn.Module) -> ExportedProgram:
    """A model in eval mode, exported where it is, with dynamic batch and length; memforge ops stay visible."""
    device = next(model.parameters()).device
    tokens = torch.zeros(2, min(2, plan.max_seq_len), dtype=torch.int64, device=device)
    return torch.export.export(model.eval(), (tokens,), dynamic_shapes=(dynamic_shapes(plan),))


def export_graph(plan: ModelPlan) -> ExportedProgram:
    """The graph of a plan, on meta: no weights."""
    return exported(plan, build_model(plan, device="meta"))


def pt2_bytes(program: ExportedProgram) -> memoryview:
    """The .pt2 file of a graph, made in memory: on a full disk torch's own writer ends the process."""
    for node in program.graph.nodes:  # source positions of this machine
        node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getbuffer()


def readable(program: ExportedProgram, name: str) -> str:
    """The graph as Python: one op a line with the shape it gives, under the path of the block it belongs to.

    Sizes are in b (batch) and t (tokens in a sequence). What nobody uses, such as assertions, is left out. Given the
    parameters and tokens, it runs on a CPU.
    """
    nodes = [node for node in program.graph.nodes if node.users or node.op == "output"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    symbols = _symbols(inputs[-1])
    parameters = program.graph_signature.inputs_to_parameters
    head = f'"""{name} in eval mode, as torch.export has it. {len(nodes) - len(inputs)} ops."""'
    lines = [head, "", "import operator", "", "import torch", "", "", "def forward("]
    for node in inputs:
        where = f"  {parameters[node.name]}" if node.name in parameters else ""
        lines.append(f"    {node.name},  # {_shape(node, symbols)}{where}")
    lines += ["):", *_body(nodes, symbols)]
    return "\n".join(lines) + "\n"


def _body(nodes: list[Node], symbols: dict[str, str]) -> Iterator[str]:
    here = None
    for node in nodes:
        if node.op == "placeholder":
            continue
        path = _block_path(node)
        if path and path != here:
            yield f"    # {path}"
            here = path
        if node.op == "output":
            yield f"    return {_text(node.args[0])}"
            continue
        shape = _shape(node, symbols)
        target = f"torch.ops.{node.target}" if isinstance(node.target, torch._ops.OpOverload) else _function(node)
        given = {key: value for key, value in node.kwargs.items() if key not in ("device", "pin_memory")}
        arguments = [_text(a) for a in node.args] + [f"{key}={_text(a)}" for key, a in given.items()]
        yield f"    {node.name} = {target}({', '.join(arguments)})" + (f"  # {shape}" if shape else "")


def _function(node: Node) -> str:
    """A Python function of the graph: operator.getitem, or arithmetic on sizes."""
    return f"{node.target.__module__.removeprefix('_')}.{node.target.__name__}"  # type: ignore[union-attr]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        inside = ", ".join(_text(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_text(item)}" for key, item in value.items()) + "}"
    return str(value) if isinstance(value, Node) else repr(value)


def _symbols(tokens: Node) -> dict[str, str]:
    """The names that torch gave to the two sizes of the tokens, and ours."""
    sizes = tokens.meta["val"].shape
    return {str(size): letter for size, letter in zip(sizes, "bt", strict=True) if not isinstance(size, int)}


def _shape(node: Node, symbols: dict[str, str]) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = ", ".join(_named(size, symbols) for size in value.shape)
    return f"{SHORT.get(value.dtype, str(value.dtype))}[{sizes}]"


def _named(size: Any, symbols: dict[str, str]) -> str:
    """A size in b and t; a product with the batch first."""
    text = str(size)
    factors = sorted((symbols.get(factor, factor) for factor in text.split("*")), key=lambda f: (f not in "bt", f))
    return "*".join(factors) if set(text.split("*")) & set(symbols) else text


def _block_path(node: Node) -> str:
    """layers.3.memory for a node of layers.3.memory.query; the whole path outside the layers."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(list(stack.values())) if path), "")
    if path.startswith("_"):  # torch's own marker of nodes that belong to no module
        return ""
    if stack and not path:
        return "the model itself: sums and head"
    parts = path.split(".")
    return ".".join(parts[:3]) if parts[0] == "layers" else path
