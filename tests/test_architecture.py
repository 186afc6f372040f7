"""The house proves itself: imports run one way, files are short, and what grows stands in one file each (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lora_jax"
# A folder imports from itself and from those before it.
ORDER = [
    "errors",
    "config",
    "parallel",
    "weights",
    "models",
    "adapters",
    "data",
    "tasks",
    "tracking",
    "generation",
    "training",
    "packing",
    "sweeps",
    "analysis",
    "interop",
    "launch",
    "cli",
]
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    """`lora_jax.models.load` of its file; a package's own file has the package's name."""
    parts = ("lora_jax", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """The modules of the library that a file imports, wherever in it."""
    here, found = module_of(path), set()
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = ".".join(parts[: len(parts) - node.level + 1]) + "." if node.level else ""
            module = (start + (node.module or "")).rstrip(".")
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or ({module} & MODULES.keys())
    return found - {here}


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def floor_of(module: str) -> int:
    return ORDER.index(module.split(".")[1])


def test_no_file_imports_from_a_later_folder() -> None:
    back = [f"{a} imports {b}" for a, found in IMPORTS.items() if a != "lora_jax" for b in found if floor_of(b) > floor_of(a)]
    assert not back, "\n".join(sorted(back))


def test_no_files_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            pytest.fail(" -> ".join((*path[path.index(module) :], module)))
        if module not in done:
            for other in sorted(IMPORTS[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(IMPORTS):
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_holds_one_idea_in_at_most_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_the_library_has_at_most_125_files() -> None:
    assert len(FILES) <= 125
