"""By what code, and in what numbers, a model is run in training."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from memforge.nn.decoder import Decoder, Layer
from memforge.plan import TrainPlan

# Compiling the demo models takes about 25 s on two cores; a run this short never earns it back.
MIN_STEPS_TO_COMPILE = 100
# One graph or an error, for one shape; without trying out on the device which code is faster.
COMPILED: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": {"deterministic": True}}


def precision_of(train: TrainPlan, device: str, note: Callable[[str], None]) -> torch.dtype | None:
    """The type of an autocast region for training, or None for fp32 throughout."""
    on_gpu = device.startswith("cuda")
    if train.precision == "float32" or (train.precision == "auto" and not on_gpu):
        return None
    if not on_gpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        note("warning: this CPU has no bfloat16 arithmetic, which makes it several times slower than float32")
    return torch.bfloat16


@contextmanager
def deterministic() -> Iterator[None]:
    """One seed, one result, bit for bit on a CPU, where Inductor otherwise adds embedding gradients by atomics.

    On a GPU it is asked for as well, as far as torch's ops can (a warning names those that cannot); not measured there.
    """
    before = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms is that, and 2 s of loading the compiler
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def compiled(model: Decoder, run: TrainPlan, note: Callable[[str], None], *, ranks: int = 1) -> Callable[..., Any]:
    """The model as it is trained: compiled where asked for and possible, eager otherwise, and never in silence.

    Among several ranks what gathers a layer is not compiled, and layers that read pools are eager as well: what they
    ask of other ranks makes no graph.
    """
    model.train()
    eager = model.forward_taped if ranks == 1 else model.forward_with
    for layer in model.layers:
        layer.__dict__.pop("forward", None)  # what was compiled before and did not work
    if run.compile == "off" or (run.compile == "auto" and run.steps < MIN_STEPS_TO_COMPILE):
        return eager
    # The compiler that Inductor looks for on a CPU.
    if run.compile == "auto" and not shutil.which(os.environ.get("CXX", "g++")):
        note("no C++ compiler: training is eager, without torch.compile")
        return eager
    note("compiling with torch.compile; the first step takes a while")
    if ranks == 1:
        return torch.compile(model.forward_taped, **COMPILED)
    for layer in model.layers:
        if not layer.readers:
            layer.forward = _compiled_in_training(layer)
    return eager


def compiler_error() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it fails; nothing where no code of its was loaded, which takes over a second."""
    loaded = sys.modules.get("torch._dynamo.exc")
    return () if loaded is None else (loaded.TorchDynamoException, loaded.FailOnRecompileLimitHit)


def why_not_compiled(error: Exception) -> str:
    """What torch.compile failed with, in one line."""
    reason = str(error).split("\n")[0]
    # Inductor writes its libraries in place and takes those that are there, whole or not.
    cut_off = reason.endswith((".so: file too short", ".so: invalid ELF header"))
    return f"{reason} (what a compilation that was killed has left: delete that file)" if cut_off else reason


def _compiled_in_training(layer: Layer) -> Callable[..., Any]:
    """The layer's forward pass: compiled for the one shape of training, eager for those of evaluation."""
    eager = layer.forward
    fast = torch.compile(eager, **COMPILED)
    return lambda *given: (fast if layer.training else eager)(*given)
