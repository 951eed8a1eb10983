"""The straight line: each stage imports only earlier ones, and the kernels know nothing of specs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPO

# Earlier stages first. A module may import its own stage and those before it.
STAGES = (
    ("memforge.errors", "memforge.storage", "memforge.machine", "memforge.pieces", "memforge.mesh"),
    ("memforge.blocks",),
    ("memforge.spec",),
    ("memforge.plan",),
    ("memforge.cost",),
    ("memforge.parity",),
    ("memforge.surface", "memforge.match", "memforge.explain", "memforge.diff", "memforge.doctor"),
    ("memforge.report",),
    ("memforge.nn",),
    ("memforge.build",),
    ("memforge.training",),
    ("memforge.profile",),
    ("memforge.export",),
    ("memforge.launch",),
    ("memforge.cli", "memforge.__main__"),
)
FILES = sorted((REPO / "memforge").rglob("*.py"))


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def stage_of(module: str) -> int | None:
    """The latest stage whose prefix the module has; None for the package itself."""
    found = [i for i, names in enumerate(STAGES) for n in names if module == n or module.startswith(n + ".")]
    return found[-1] if found else None


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_point_backwards(file: Path) -> None:
    here = stage_of(module_name(file))
    for name in imports(file):
        there = stage_of(name)
        if here is not None and there is not None:
            assert there <= here, f"{module_name(file)} imports {name}, a later stage"


def test_every_module_belongs_to_a_stage() -> None:
    homeless = [module_name(f) for f in FILES if stage_of(module_name(f)) is None]
    assert homeless == ["memforge"]


@pytest.mark.parametrize("file", sorted((REPO / "kernels").rglob("*.py")), ids=lambda p: p.stem)
def test_kernels_stand_alone(file: Path) -> None:
    assert not [name for name in imports(file) if name.partition(".")[0] == "memforge"]


def test_kernels_is_a_source_root_and_not_a_package() -> None:
    assert not (REPO / "kernels" / "__init__.py").exists()


def test_only_reports_and_the_command_line_print() -> None:
    talkers = {
        module_name(f)
        for f in FILES
        for node in ast.walk(ast.parse(f.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert all(name.startswith(("memforge.report", "memforge.cli")) for name in talkers)
