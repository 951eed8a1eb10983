"""Tile sizes of the Triton kernels: shipped tables first, a function of the shape where there is no entry.

tuned/<device>/<op>.json holds the winners of one device, with where they come from: `static` ones are ranked from
compiled code, `measured` ones were timed. Nothing is timed while a model runs, and every rank of a job reads one table.
"""

import hashlib
import json
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

FORMAT = 1
TUNED = Path(__file__).parent / "tuned"
# With this many bags every device is full many times over, and more of them change nothing.
BUCKET_N = (2048, 4096)


@dataclass(frozen=True)
class Config:
    """Tile sizes by their names in the kernel, and the launch options."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 1

    def __getitem__(self, block: str) -> int:
        return dict(self.blocks)[block]

    def as_dict(self) -> dict[str, int]:
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def launch(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch. Fused multiply-add is asked for: its default differs between versions."""
        return {**self.as_dict(), "enable_fp_fusion": True}

    @classmethod
    def from_dict(cls, fields: dict[str, int]) -> "Config":
        blocks = tuple((name, size) for name, size in fields.items() if name.startswith("BLOCK_"))
        config = cls(blocks, fields["num_warps"], fields["num_stages"])
        if config.as_dict() != fields or any(type(f) is not int or f < 1 or f & (f - 1) for f in config._powers()):
            raise ValueError(f"not a config: {fields}")
        return config

    def _powers(self) -> list[int]:
        return [size for _, size in self.blocks] + [self.num_warps]


class Key(NamedTuple):
    """What a config depends on: n bags or rows, their width (sub-keys per half for product keys), k entries each."""

    n: int
    width: int
    k: int
    dtype: torch.dtype

    @property
    def bucket(self) -> "Key":
        """Powers of two, not below this key; fp16 has the tiles of bf16."""
        dtype = torch.bfloat16 if self.dtype == torch.float16 else self.dtype
        return Key(min(_power(self.n), BUCKET_N[-1]), _power(self.width), _power(self.k), dtype)

    def __str__(self) -> str:
        return f"n={self.n},width={self.width},k={self.k},dtype={str(self.dtype).removeprefix('torch.')}"


def _power(x: int) -> int:
    """The smallest power of two that is at least x."""
    return 1 << max(0, x - 1).bit_length()


def _clamp(x: int, low: int, high: int) -> int:
    return max(low, min(x, high))


def _warps(num_bytes: int) -> int:
    """Warps of 32 lanes that cover so many bytes with one load of 16 bytes each."""
    return _clamp(_power(num_bytes) // (32 * 16), 1, 8)


def _gather(key: Key, *, columns: int = 512, tile_bytes: int = 2**13) -> Config:
    """Warps lie along the columns, so that a lane sums its own columns over the rows and no warp waits for another."""
    block_v = min(columns, _power(key.width))
    row_bytes = block_v * key.dtype.itemsize
    block_k = min(_clamp(tile_bytes // row_bytes, 2, 32), _power(key.k))
    return Config((("BLOCK_K", block_k), ("BLOCK_V", block_v)), _warps(row_bytes))


def _dot(key: Key, *, tile_bytes: int = 2**13, num_warps: int = 0) -> Config:
    """A whole row at a time, 64 bytes of it to a thread unless num_warps says otherwise."""
    block_v = _power(key.width)
    block_k = min(_clamp(tile_bytes // (block_v * key.dtype.itemsize), 2, 32), _power(key.k))
    num_warps = num_warps or _clamp(block_k * block_v * key.dtype.itemsize // (32 * 64), 1, 16)
    return Config((("BLOCK_K", block_k), ("BLOCK_V", block_v)), num_warps)


def _row_update(key: Key, *, columns: int = 256, tile_bytes: int = 2**11, num_warps: int = 4) -> Config:
    """16 bytes of the table to a thread: twice as much, with as many in fp32 of each moment, spills registers."""
    block_v = min(columns, _power(key.width))
    # No more than 8: at 16 rows of 32 or 64 columns triton 3.7.1 gives up, on a mask that lost its layout.
    block_u = _clamp(tile_bytes // (block_v * key.dtype.itemsize), 1, min(8, _power(key.n)))
    num_warps = _clamp(block_u * block_v * key.dtype.itemsize // (32 * 16), 1, num_warps)
    return Config((("BLOCK_U", block_u), ("BLOCK_V", block_v)), num_warps)


def _halves(key: Key, *, sub_keys: int = 64, block_n: int = 32, depth_bytes: int = 64) -> Config:
    """A tile of sub-keys is at least k wide, or it could not fill the list of the best k; 8 of its keys to a thread."""
    block_s = max(sub_keys, _power(key.k))
    block_n = _clamp(2**12 // block_s, 16, block_n)
    depth = depth_bytes // key.dtype.itemsize
    num_warps = _clamp(block_n * block_s // (32 * 8), 4, 8)
    return Config((("BLOCK_N", block_n), ("BLOCK_S", block_s), ("BLOCK_D", depth)), num_warps, num_stages=2)


def _pairs(key: Key, *, elements: int = 2**10, num_warps: int = 4) -> Config:
    """k * ln(k) pairs or so can win: the sum of k // i."""
    candidates = _power(sum(key.k // (i + 1) for i in range(key.k)))
    return Config((("BLOCK_N", _clamp(elements // candidates, 1, 64)),), num_warps)


_DEFAULTS: dict[str, Callable[..., Config]] = {
    "weighted_gather": _gather,
    "gather_dot": _dot,
    "product_key_topk.halves": _halves,
    "product_key_topk.pairs": _pairs,
    "row_update.segment_sum": _row_update,
    "row_update.squared_norm": _row_update,
    "row_update.adamw": _row_update,
    "row_update.sgd": _row_update,
}
_ROW_VARIATIONS = [
    {"columns": c, "tile_bytes": b, "num_warps": w} for c in (256, 512) for b, w in ((2**10, 2), (2**11, 4), (2**12, 4))
]
_VARIATIONS: dict[str, list[dict[str, int]]] = {
    "weighted_gather": [{"columns": c, "tile_bytes": b} for c in (256, 512, 1024) for b in (2**12, 2**13, 2**14)],
    "gather_dot": [{"tile_bytes": b, "num_warps": w} for b in (2**12, 2**13, 2**14) for w in (1, 2, 4, 8)],
    "product_key_topk.halves": [
        {"sub_keys": s, "block_n": n, "depth_bytes": d} for s in (64, 128) for n in (16, 32) for d in (64, 128)
    ],
    "product_key_topk.pairs": [{"elements": e, "num_warps": w} for e in (512, 1024, 2048) for w in (2, 4)],
    **dict.fromkeys([op for op in _DEFAULTS if op.startswith("row_update.")], _ROW_VARIATIONS),
}
OPS = tuple(_DEFAULTS)


# Rows of 256 to 1,024 values and 32 or 128 of them a bag; segments of 1 or 2 entries; 512 to 2,048 sub-keys per half.
_BUCKETS = {
    "weighted_gather": ((256, 512, 1024), (32, 128)),
    "gather_dot": ((256, 512, 1024), (32, 128)),
    "product_key_topk": ((512, 1024, 2048), (16, 32)),
    "row_update": ((256, 512, 1024), (1, 2)),
}


def buckets(op: str) -> tuple[Key, ...]:
    """The keys that tables are made for."""
    widths, counts = _BUCKETS[_folder(op)]
    # The factors of a gradient are fp32, and so are their sums.
    summed = op in ("row_update.segment_sum", "row_update.squared_norm")
    dtypes = (torch.float32,) if summed else (torch.bfloat16, torch.float32)
    return tuple(Key(n, w, k, dtype) for n in BUCKET_N for w in widths for k in counts for dtype in dtypes)


def default(op: str, key: Key, target: str | None = None) -> Config:
    """The config of a shape that no table knows: a function of the shape, the dtype and the width of a warp."""
    return _fit(_DEFAULTS[op](key), target)


def candidates(op: str, key: Key, target: str | None = None) -> tuple[Config, ...]:
    """The default and its variations, at most 13, without repetition."""
    configs = [_DEFAULTS[op](key, **changes) for changes in ({}, *_VARIATIONS[op])]
    return tuple(dict.fromkeys(_fit(config, target) for config in configs))


def _fit(config: Config, target: str | None) -> Config:
    """As many threads on AMD's data centre GPUs, whose warps have 64 lanes and not 32."""
    wide = target is not None and target.startswith("gfx9")
    return replace(config, num_warps=max(1, config.num_warps // 2)) if wide else config


def config(op: str, key: Key, device: torch.device) -> Config:
    """The entry of the device's table for this key, else for its bucket, else the default. Never times anything."""
    return lookup(op, key, _target(device))


def lookup(op: str, key: Key, target: str | None) -> Config:
    """config() for a device by its target's name; the default for 32 lanes where that is None."""
    return _found(op, key, target)[0]


def _found(op: str, key: Key, target: str | None) -> tuple[Config, Literal["exact", "bucket", "default"]]:
    entries = _table(_file(TUNED, op, target), target).get(op, {}) if target else {}
    if found := entries.get(str(key)):
        return found, "exact"
    if found := entries.get(str(key.bucket)):
        return found, "bucket"
    return default(op, key, target), "default"


def shipped() -> tuple[str, ...]:
    """The targets that there are tables for."""
    return tuple(sorted(folder.name for folder in TUNED.iterdir() if folder.is_dir()))


def explained(op: str, key: Key, target: str) -> dict[str, Any]:
    """The config of a shape on a target, where it was found, and how its table was made; plain values for JSON."""
    config, found = _found(op, key, target)
    provenance = None
    if found != "default":
        provenance = json.loads(_file(TUNED, op, target).read_text(encoding="utf-8"))["provenance"]
    shape = {"n": key.n, "width": key.width, "k": key.k, "dtype": str(key.dtype).removeprefix("torch.")}
    entry = {"op": op, "target": target, **shape, "config": config.as_dict()}
    return entry | {"found": found, "provenance": provenance or "default"}


@cache
def _target(device: torch.device) -> str | None:
    """sm_90 and the like; None off a GPU, as in the interpreter."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def kernel_sha256(op: str) -> str:
    """Of the file that the op's kernels are in: any change there makes its tables stale."""
    return hashlib.sha256((TUNED.parent / _folder(op) / "kernel.py").read_bytes()).hexdigest()


def read_table(file: Path, target: str) -> dict[str, dict[str, Config]]:
    """Entries by op and key; none, and a warning, if the table is damaged, of another kernel or of another device."""
    if not file.exists():
        return {}
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        for field, expected in (("format", FORMAT), ("target", target), ("kernel_sha256", kernel_sha256(file.stem))):
            if table[field] != expected:
                raise ValueError(f"its {field} is {table[field]!r} and not {expected!r}")
        return {op: {key: _entry(op, e["config"]) for key, e in of.items()} for op, of in table["entries"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{file} is ignored and default configs are used: {error!r}", RuntimeWarning, stacklevel=2)
        return {}


# One read and at most one warning per table, however many shapes ask for it.
_table = cache(read_table)


def _entry(op: str, fields: dict[str, int]) -> Config:
    config = Config.from_dict(fields)
    known = default(op, Key(1, 1, 1, torch.float32))
    if [name for name, _ in config.blocks] != [name for name, _ in known.blocks]:
        raise ValueError(f"{op} has no config {fields}")
    return config


def _folder(op: str) -> str:
    return op.partition(".")[0]


def _file(root: Path, op: str, target: str | None) -> Path:
    return root / str(target) / f"{_folder(op)}.json"


@dataclass(frozen=True)
class Choice:
    """A config and, where it was timed, its time and that of the default."""

    config: Config
    ms: float | None = None
    default_ms: float | None = None


Table = dict[str, Any]


def tune_static(target: str) -> list[Table]:
    """Tables of a target by its compiled code: of the candidates without spills, the best by offline.best.

    Cost: compiles every candidate of every bucket, about 400 kernels, in some minutes.
    """
    from memforge_kernels import offline  # it imports the kernels, which import this module

    choices: dict[tuple[str, Key], Choice] = {}
    found: dict[object, Config] = {}
    for op, key in [(name, key) for name in OPS for key in buckets(name)]:
        # Most of a key is not compiled in: n never is, k and s are arguments.
        code = (op, candidates(op, key, target), offline.compiled_in(op, key))
        if code not in found:
            found[code] = offline.best(op, key, target)
        choices[op, key] = Choice(found[code])
    return _tables(choices, target, "static", device=None)


def tune_measured(device: torch.device, *, deadline: float | None = None) -> list[Table]:
    """Tables of a device by the clock; a candidate is timed only after its results agree with float64.

    What is not reached by `deadline` (of time.monotonic) has no entry. It needs the device and has not been run on one.
    """
    import triton.testing

    from memforge_kernels.trials import trial  # it imports the kernels, which import this module

    target, choices = str(_target(device)), {}
    # Bucket by bucket, so that a deadline leaves every op with some.
    numbered = [(i, name, key) for name in OPS for i, key in enumerate(buckets(name))]
    for _, op, key in sorted(numbered, key=itemgetter(0)):
        if deadline is not None and time.monotonic() > deadline:
            break
        tried = trial(op, key, device)
        right = [config for config in candidates(op, key, target) if tried.agrees(config)]
        times = {config: triton.testing.do_bench(partial(tried.run, config)) for config in right}
        if times:
            best = min(times, key=times.__getitem__)
            choices[op, key] = Choice(best, times[best], times.get(default(op, key, target)))
    name = torch.cuda.get_device_name(device)
    return _tables(choices, target, "measured", device=name)


def _tables(choices: dict[tuple[str, Key], Choice], target: str, provenance: str, *, device: str | None) -> list[Table]:
    """One table per folder of kernels, as JSON has it."""
    versions = {"triton": version("triton"), "torch": version("torch")}
    tables = []
    for folder in dict.fromkeys(map(_folder, OPS)):
        entries: dict[str, dict[str, Any]] = {}
        for (op, key), choice in choices.items():
            if _folder(op) == folder:
                entry = {"config": choice.config.as_dict(), "ms": choice.ms, "default_ms": choice.default_ms}
                entries.setdefault(op, {})[str(key)] = entry
        head = {"format": FORMAT, "op": folder, "target": target, "provenance": provenance, "device": device}
        tables.append({**head, **versions, "kernel_sha256": kernel_sha256(folder), "entries": entries})
    return tables


def write_tables(tables: list[Table], root: Path = TUNED) -> list[Path]:
    """tuned/<target>/<op>.json of each table, one entry to a line."""
    files = []
    for table in tables:
        file = _file(root, table["op"], table["target"])
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = re.sub(r"\{\s+\"config\".*?\}.*?\}", _on_one_line, json.dumps(table, indent=1), flags=re.DOTALL)
        file.write_text(lines + "\n", encoding="utf-8")
        files.append(file)
    return files


def _on_one_line(entry: re.Match[str]) -> str:
    return json.dumps(json.loads(entry[0]))
