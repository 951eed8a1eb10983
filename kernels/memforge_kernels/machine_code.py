"""Compiled kernels, read: registers, spills, opcodes and the width of loads.

CUDA machine code is read with the tools of the triton wheel, AMD kernels from their assembly text.
"""

import ast
import inspect
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton


class ToolMissing(RuntimeError):  # noqa: N818 - it names a state of the machine, as FileNotFoundError does
    """A program that reads compiled code is not there."""

    def __init__(self, tool: str) -> None:
        super().__init__(f"{tool} is not in the installed triton package and not on the PATH")
        self.tool = tool


@dataclass(frozen=True)
class MachineCode:
    """What a kernel needs of the machine, and its instructions."""

    registers: int
    spill_bytes: int
    opcodes: list[str]


def read(compiled: Any) -> MachineCode:
    """Of a kernel as triton.compile returns it."""
    return _read_cuda(compiled) if "cubin" in compiled.asm else _read_amd(compiled)


def _read_cuda(compiled: Any) -> MachineCode:
    """Bytes of stack and local memory are spills, as these kernels have no arrays."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run_tool("cuobjdump", "-res-usage", cubin)
        code = _run_tool("nvdisasm", "-c", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)
    opcodes = [opcode for opcode in opcodes if opcode != "NOP"]
    return MachineCode(int(found[1]), int(found[2]) + int(found[3]), opcodes)


def _read_amd(compiled: Any) -> MachineCode:
    """Vector registers include those for accumulation; scratch memory is spills, as these kernels have no arrays."""
    text = compiled.asm["amdgcn"]
    fields = {name: int(value) for name, value in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    spill_bytes = max(fields["private_segment_fixed_size"], 4 * fields["vgpr_spill_count"])
    return MachineCode(fields["vgpr_count"], spill_bytes, re.findall(r"^\t([a-z]+_\w+)", text, re.MULTILINE))


_KINDS = (
    ("atomic", r"(ATOM|ATOMG|ATOMS|RED)(\.|$)|\w+_atomic_"),
    ("mma", r"([HIDQB]G?MMA|UTC\w*MMA)(\.|$)|v_mfma"),
    ("fma", r"([FHD]FMA\w*)(\.|$)|v_(pk_)?(fma|fmac|mad)_"),
    ("load", r"(LD|LDG|LDGSTS|LDS|LDSM|LDL)(\.|$)|(global|buffer|flat|scratch)_load|ds_(read|load)"),
    ("store", r"(ST|STG|STS|STSM|STL)(\.|$)|(global|buffer|flat|scratch)_store|ds_(write|store)"),
)


def kind_of(opcode: str) -> str:
    return next((kind for kind, pattern in _KINDS if re.match(pattern, opcode)), "other")


# One load of one lane: PTX, PTX into shared memory, AMD assembly.
_LOAD = re.compile(
    r"ld\.global\S*?(?:\.v(?P<count>\d))?\.b(?P<bits>\d+)\s"
    r"|cp\.async\.c[ag]\.shared\.global.*, 0x(?P<hex>[0-9a-f]+)"
    r"|(?:global|buffer)_load_(?P<name>dwordx\d|dword|\w*short\w*|\w*byte\w*)"
)
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def _load_bytes(line: str) -> int:
    found = _LOAD.search(line)
    if not found:
        return 0
    if found["bits"]:
        return int(found["count"] or 1) * int(found["bits"]) // 8
    if found["hex"]:
        return int(found["hex"], 16)
    return _AMD_BYTES.get(found["name"], 1 if "byte" in found["name"] else 2)


def wide_share(compiled: Any, kernel: Any, tables: tuple[str, ...]) -> float | None:
    """Share of the bytes loaded through the pointers named `tables` that are loaded 128 bits at a time.

    Counted once per instruction, not per execution; the assembly names the line of the kernel that each comes from.
    """
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    file, lines = _load_lines(kernel, tables)
    files = re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]+)"', text)
    numbers = {number for number, name in files if file.endswith(name)}
    total, wide, inside = 0, 0, False
    for line in text.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            inside = place[1] in numbers and int(place[2]) in lines
        elif inside and (size := _load_bytes(line)):
            total, wide = total + size, wide + size * (size >= 16)
    return wide / total if total else None


def _load_lines(kernel: Any, tables: tuple[str, ...]) -> tuple[str, set[int]]:
    """The kernel's file, and the lines there of loads from the pointers named."""
    file = inspect.getsourcefile(kernel.fn)
    assert file
    calls = [node for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "tl.load"]
    named = [call for call in loads if ast.unparse(call.args[0]).startswith(tables)]
    return file, {line for call in named for line in range(call.lineno, (call.end_lineno or call.lineno) + 1)}


def check_tools(target: str) -> None:
    """Raises: ToolMissing unless the target's machine code can be made and read."""
    if target.startswith("sm_"):
        for tool in ("ptxas-blackwell" if int(target[3:]) >= 100 else "ptxas", "cuobjdump", "nvdisasm"):
            _tool(tool)


def _tool(name: str) -> str:
    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(shipped) if os.access(shipped, os.X_OK) else shutil.which(name)
    if not found:
        raise ToolMissing(name)
    return found


def _run_tool(name: str, *arguments: object) -> str:
    done = subprocess.run([_tool(name), *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout
