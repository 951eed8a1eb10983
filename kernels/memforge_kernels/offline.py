"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, occupancy, width of loads."""

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memforge_kernels import machine_code, tuning
from memforge_kernels.gather_dot import kernel as gather_dot
from memforge_kernels.machine_code import ToolMissing
from memforge_kernels.product_key_topk import kernel as product_key_topk
from memforge_kernels.product_key_topk.pairs import candidate_pairs
from memforge_kernels.row_update import kernel as row_update
from memforge_kernels.tuning import Config, Key
from memforge_kernels.weighted_gather import kernel as weighted_gather

__all__ = ["NotCompiled", "ToolMissing", "best", "compile_kernel", "ranked_targets", "record", "report", "targets"]


class NotCompiled(RuntimeError):  # noqa: N818 - as ToolMissing
    """Triton's compiler gave up on a config."""


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor holds."""

    warps: int
    blocks: int
    registers: int  # of 32 bits for one lane of a warp, all resident warps together
    register_unit: int  # registers of a lane are given in multiples of this
    shared_bytes: int
    shared_unit: int
    shared_reserved: int  # per block, by the driver


# CUDA: "CUDA C++ Programming Guide", technical specifications per compute capability; 65,536 registers are 2,048 for
# each lane of a warp. AMD: "CDNA3 Instruction Set Architecture", chapter 3 (4 SIMDs of 512 registers a lane, at most 8
# waves each, 64 KiB of LDS); gfx950 the same with 160 KiB of LDS (ROCm "GPU hardware specifications").
_LIMITS = {
    "sm_80": Limits(64, 32, 2048, 8, 164 << 10, 128, 1 << 10),
    "sm_86": Limits(48, 16, 2048, 8, 100 << 10, 128, 1 << 10),
    "sm_89": Limits(48, 24, 2048, 8, 100 << 10, 128, 1 << 10),
    "sm_90": Limits(64, 32, 2048, 8, 228 << 10, 128, 1 << 10),
    "sm_100": Limits(64, 32, 2048, 8, 228 << 10, 128, 1 << 10),
    "sm_120": Limits(48, 24, 2048, 8, 100 << 10, 128, 1 << 10),
    "gfx942": Limits(32, 32, 2048, 8, 64 << 10, 512, 0),
    "gfx950": Limits(32, 32, 2048, 8, 160 << 10, 1280, 0),
}


def targets() -> tuple[str, ...]:
    """The targets whose limits are known, which triton compiles for."""
    return tuple(_LIMITS)


@dataclass(frozen=True)
class Speed:
    """Of a whole device's memory, and of the instructions of one multiprocessor, all lanes counted."""

    bytes_per_second: float
    seconds: float  # from a load to its data
    multiprocessors: int
    instructions_per_second: float

    @property
    def bytes_in_flight(self) -> float:
        """What keeps the memory busy by Little's law, bandwidth * latency, per multiprocessor."""
        return self.bytes_per_second * self.seconds / self.multiprocessors

    def issue_to_memory(self, instructions: float, num_bytes: float) -> float:
        """Time to issue so many instructions over the time to move so many bytes."""
        return instructions / self.instructions_per_second * self.bytes_per_second / self.multiprocessors / num_bytes


# Bandwidth, multiprocessors and clocks (1.41, 1.755, 1.85, 2.1 GHz; 128 lanes a clock, AMD 64): data sheets of the
# A100 80GB SXM, H100 SXM, B200 and MI300X. Latency: about 0.3 us for a pointer chase on A100 and H100 (arXiv
# 2402.13499), taken twice, since rows of a table of many GB miss the TLB and a busy memory is slower than an idle one.
# For B200 and MI300X it is an assumption.
_SPEED = {
    "sm_80": Speed(2.04e12, 0.6e-6, 108, 128 * 1.41e9),
    "sm_90": Speed(3.35e12, 0.6e-6, 132, 128 * 1.755e9),
    "sm_100": Speed(8.0e12, 0.7e-6, 148, 128 * 1.85e9),
    "gfx942": Speed(5.3e12, 0.8e-6, 304, 64 * 2.1e9),
}


def ranked_targets() -> tuple[str, ...]:
    """The targets whose memory is known as well, so that configs can be ranked for them."""
    return tuple(_SPEED)


@dataclass(frozen=True)
class _Launch:
    """One kernel: types of the arguments passed, values of those compiled in, and the tables it reads in bulk."""

    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    tables: tuple[str, ...]
    bytes_per_element: int  # of a tile, over all tables that a program has in flight together


def _gather_launch(key: Key) -> _Launch:
    types = {"values_ptr": _pointer(key.dtype), "slots_ptr": "*i64", "weights_ptr": "*fp32", "out_ptr": "*fp32"}
    constants = {"gate_ptr": None, "v": key.width}
    return _Launch(
        weighted_gather._weighted_gather_fwd_kernel,
        {**types, "k": "i32"},
        constants,
        ("values_ptr",),
        key.dtype.itemsize,
    )


def _dot_launch(key: Key) -> _Launch:
    types = {"x_ptr": "*fp32", "values_ptr": _pointer(key.dtype), "slots_ptr": "*i64", "out_ptr": "*fp32", "k": "i32"}
    return _Launch(gather_dot._gather_dot_fwd_kernel, types, {"v": key.width}, ("values_ptr",), key.dtype.itemsize)


def _halves_launch(key: Key) -> _Launch:
    pointer = _pointer(key.dtype)
    types = {"query_ptr": pointer, "sub_keys_ptr": pointer, "keys_ptr": "*i64", "n": "i32", "s": "i32", "k": "i32"}
    # 128 wide halves, as of the 256 wide keys of Lample et al. 2019.
    constants = {"d": 128, "K_POW2": triton.next_power_of_2(key.k)}
    return _Launch(product_key_topk._best_of_halves_kernel, types, constants, ("sub_keys_ptr",), key.dtype.itemsize)


def _pairs_launch(key: Key) -> _Launch:
    types = {"keys_ptr": "*i64", "ranks_ptr": "*i32", "scores_ptr": "*fp32", "slots_ptr": "*i64"}
    types |= dict.fromkeys("nskc", "i32")
    num_pairs = len(candidate_pairs(key.k)[0])
    constants = {"K_POW2": triton.next_power_of_2(key.k), "C_POW2": triton.next_power_of_2(num_pairs)}
    return _Launch(product_key_topk._best_of_pairs_kernel, types, constants, (), 16)


# With pieces, the larger of the two variants and the one that runs where any slot is popular.
_SEGMENTS = row_update.Segments("*i64", "*i64", "*i64", "*fp32", "*fp32", "*i64", "*fp32")  # type: ignore[arg-type]


def _sums_launch(kernel: Any, key: Key) -> _Launch:
    types = {"segments": _SEGMENTS, "out_ptr": "*fp32", "u": "i32"}
    return _Launch(kernel, types, {"v": key.width}, ("rows_ptr",), 4)


def _adamw_launch(key: Key) -> _Launch:
    types = {"values_ptr": _pointer(key.dtype), "exp_avg_ptr": "*fp32", "exp_avg_sq_ptr": "*fp32"}
    types |= {"touched_ptr": "*i64", "segments": _SEGMENTS, "steps": row_update.RowSteps(*["*fp32"] * 6)}
    types |= dict.fromkeys(("beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "scale"), "fp32")
    tables = ("rows_ptr", "values_ptr", "exp_avg_ptr", "exp_avg_sq_ptr")
    constants = {"master_ptr": None, "v": key.width}
    return _Launch(
        row_update._adamw_kernel, {**types, "seed": "i64", "u": "i32"}, constants, tables, key.dtype.itemsize + 12
    )


def _sgd_launch(key: Key) -> _Launch:
    types = {"values_ptr": _pointer(key.dtype), "touched_ptr": "*i64", "segments": _SEGMENTS}
    types |= {"shrink": "fp32", "step": "fp32", "seed": "i64", "u": "i32"}
    constants = {"master_ptr": None, "v": key.width}
    return _Launch(row_update._sgd_kernel, types, constants, ("rows_ptr", "values_ptr"), key.dtype.itemsize + 4)


_LAUNCHES = {
    "weighted_gather": _gather_launch,
    "gather_dot": _dot_launch,
    "product_key_topk.halves": _halves_launch,
    "product_key_topk.pairs": _pairs_launch,
    "row_update.segment_sum": lambda key: _sums_launch(row_update._segment_sum_kernel, key),
    "row_update.squared_norm": lambda key: _sums_launch(row_update._squared_norm_kernel, key),
    "row_update.adamw": _adamw_launch,
    "row_update.sgd": _sgd_launch,
}


def _pointer(dtype: torch.dtype) -> str:
    return {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]


def compiled_in(op: str, key: Key) -> str:
    """What of a key the compiled code depends on, apart from the config."""
    launch = _LAUNCHES[op](key)
    return f"{launch.types} {launch.constants}"


def compile_launch(launch: _Launch, config: Config, target: str) -> Any:
    """The compiled kernel, as on tensors that start on 16 bytes and sizes that are not special."""
    constants = {**launch.constants, **dict(config.blocks)}
    names = launch.kernel.arg_names
    signature = {name: launch.types.get(name, "constexpr") for name in names}
    aligned = [["tt.divisibility", 16]]
    attributes = {}
    for i, kind in enumerate(signature.values()):
        if isinstance(kind, tuple):
            attributes.update({(i, j): aligned for j in range(len(kind))})
        elif kind.startswith("*"):
            attributes[(i,)] = aligned
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    try:
        return triton.compile(source, target=_gpu_target(target), options=options)
    except RuntimeError as error:
        raise NotCompiled(f"{launch.kernel.__name__} does not compile for {target} with {config.as_dict()}") from error


def _gpu_target(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target[3:]), 32)
    return GPUTarget("hip", target, 64)


def compile_kernel(op: str, config: Config, dtype: torch.dtype, target: str, *, width: int = 1024, k: int = 32) -> dict:
    """What one config of one kernel compiles to, in plain values for JSON.

    `wide_share` is the share of the bytes of bulk loads, as written in the code, that are loaded 128 bits at a time;
    `occupancy` the share of a multiprocessor's warps that are resident; `bytes_in_flight` what the tiles of the
    resident blocks ask for together; `instructions` counts the machine's instructions by kind, loads and stores of
    shared memory included, instructions_per_element those of all lanes for an element of a tile, each loop once, and
    `issue_to_memory` is the time to issue them over the time to read that element (None for a device of unknown speed).
    Raises: ToolMissing where a CUDA target's machine code cannot be read.
    """
    return _record(op, Key(4096, width, k, dtype), config, target)


def report(target: str) -> list[dict]:
    """A record of each kernel with the config that the target's table or the default gives it, at usual shapes.

    Cost: about 40 kernels are compiled, in a minute or less.
    """
    machine_code.check_tools(target)
    keys = [(op, key) for op in tuning.OPS for key in tuning.buckets(op)]
    usual = [(op, key) for op, key in keys if key.n == tuning.BUCKET_N[-1] and key.k == tuning.buckets(op)[-1].k]
    return [record(op, key, target) for op, key in usual]


def record(op: str, key: Key, target: str) -> dict:
    """What the config that a shape runs with on a target compiles to. Raises: ToolMissing, NotCompiled."""
    return _record(op, key, tuning.lookup(op, key, target), target)


def best(op: str, key: Key, target: str) -> Config:
    """Of the candidates without spills and with 128-bit loads, the one that should keep the memory busiest.

    First, enough bytes in flight and enough warps to issue from; second, instructions that take less than half the
    time of the bytes, as each loop counts once; third, occupancy. The default if there is no such candidate.
    """
    machine_code.check_tools(target)
    records = {}
    for config in tuning.candidates(op, key, target):
        with suppress(NotCompiled):  # some tiles meet faults of the compiler
            records[config] = _record(op, key, config, target)
    right = {c: r for c, r in records.items() if not r["spill_bytes"] and r["wide_share"] in (None, 1)}
    return min(right, key=lambda config: _rank(right[config]), default=tuning.default(op, key, target))


# Four schedulers, each with four warps to hide the four cycles of an arithmetic instruction ("CUDA C++ Programming
# Guide", multiprocessor level).
BUSY_WARPS = 16


def _rank(record: dict) -> tuple[float, float, float]:
    # Steps of a tenth, so that a hair more of one does not outweigh twice the other.
    speed = _SPEED[record["target"]]
    starved = 1 - min(1, record["bytes_in_flight"] / speed.bytes_in_flight, record["warps_resident"] / BUSY_WARPS)
    issuing = max(0.0, record["issue_to_memory"] - 0.5)
    return round(starved, 1), round(issuing, 1), -record["occupancy"]


def _record(op: str, key: Key, config: Config, target: str) -> dict:
    launch, gpu = _LAUNCHES[op](key), _gpu_target(target)
    compiled = compile_launch(launch, config, target)
    code = machine_code.read(compiled)
    warps = _resident_warps(target, config.num_warps, code.registers, compiled.metadata.shared)
    in_flight, elements = _tile(op, key, config)
    instructions = len(code.opcodes) * config.num_warps * gpu.warp_size / elements
    speed = _SPEED.get(target)
    mix = Counter(map(machine_code.kind_of, code.opcodes))
    return {
        "op": op,
        "kernel": launch.kernel.__name__,
        "target": target,
        "dtype": str(key.dtype).removeprefix("torch."),
        "width": key.width,
        "k": key.k,
        "config": config.as_dict(),
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "shared_bytes": compiled.metadata.shared,
        "warps_resident": warps,
        "warps_max": _LIMITS[target].warps,
        "occupancy": warps / _LIMITS[target].warps,
        "bytes_in_flight": warps // config.num_warps * in_flight * launch.bytes_per_element,
        "wide_share": machine_code.wide_share(compiled, launch.kernel, launch.tables),
        "instructions_per_element": round(instructions, 1),
        "issue_to_memory": speed and round(speed.issue_to_memory(instructions, launch.bytes_per_element), 2),
        "instructions": {kind: mix[kind] for kind in ("load", "store", "fma", "mma", "atomic", "other")},
    }


def _tile(op: str, key: Key, config: Config) -> tuple[int, int]:
    """Elements that a block asks for at a time, and elements (scores, for product keys) that it works on at a time.

    A block wider than the rows counts only what lies inside them.
    """
    if op == "product_key_topk.halves":
        in_flight = config["BLOCK_S"] * config["BLOCK_D"] * (config.num_stages - 1)
        return in_flight, config["BLOCK_N"] * config["BLOCK_S"]
    if op == "product_key_topk.pairs":
        pairs = config["BLOCK_N"] * len(candidate_pairs(key.k)[0])
        return pairs, pairs
    (_, rows), (_, columns) = config.blocks
    inside = rows * key.width // triton.cdiv(key.width, columns)
    return inside, inside


def _resident_warps(target: str, num_warps: int, registers: int, shared_bytes: int) -> int:
    """Warps of the blocks that fit one multiprocessor by warps, registers and shared memory."""
    limits = _LIMITS[target]
    per_lane = _round_up(max(registers, 1), limits.register_unit)
    shared = _round_up(shared_bytes + limits.shared_reserved, limits.shared_unit)
    # Registers belong to one of four schedulers, each of which holds whole warps.
    by_registers = 4 * (limits.registers // 4 // per_lane)
    blocks = min(limits.blocks, limits.warps // num_warps, by_registers // num_warps)
    return num_warps * (min(blocks, limits.shared_bytes // shared) if shared else blocks)


def _round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit
