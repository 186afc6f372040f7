"""The house proves itself: imports run one way, files are short, and what grows stands in one file each (docs/architecture.md)."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
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


# What grows by a file each: a method, an init, a family, a base transform, a task, an optimizer, an exporter.
GROWS = ("adapters/methods", "adapters/inits", "models/families", "models/transforms", "tasks", "training/optimizers", "interop")


def test_the_house_has_few_files_beside_what_grows() -> None:
    assert len([path for path in FILES if not path.relative_to(ROOT).as_posix().startswith(GROWS)]) <= 145


PAGE = ROOT.parent / "docs" / "architecture.md"


def chain_of(page: str) -> list[str]:
    """The modules of the page's numbered list, in reading order."""
    files = re.findall(r"^\d+\. `([\w/]+\.py)`", page, flags=re.MULTILINE)
    return ["lora_jax." + file.removesuffix(".py").replace("/", ".") for file in files]


def test_the_page_names_files_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"`((?:[\w.]+/)*[\w.]+\.py|(?:[\w.]+/)+)`", page)
    assert len(named) > 30
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT.parent / name).exists()]
    assert not missing


def test_the_page_lists_every_folder_in_the_order_of_imports() -> None:
    rows = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows == ORDER


def test_each_file_of_the_reading_order_is_imported_by_one_before_it() -> None:
    chain = chain_of(PAGE.read_text(encoding="utf-8"))
    assert chain[0] == "lora_jax.cli.sweep" and chain[-1] == "lora_jax.training.step" and len(chain) <= 12
    for number, module in enumerate(chain[1:], 1):
        assert any(module in IMPORTS[before] for before in chain[:number]), f"no file before {module} imports it"


def test_the_examples_of_the_page_register_one_thing_at_each_door() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == len(DOORS)
    code = "\n".join(
        [
            *blocks,
            "import json",
            "from lora_jax.config import doors",
            "print(json.dumps({n: list(getattr(doors, n).all()) for n in DOORS}))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", f"DOORS = {DOORS}\n{code}"], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    more = {door: set(names) - registered()[door].keys() for door, names in json.loads(done.stdout).items()}
    assert all(len(names) == 1 for names in more.values()), more


# Registered names that also mean something else (a package, a tokenizer of GGUF, a plain word): as a string they prove nothing.
# Words that mean something else too: of these, transformers calls its heads by the names of tasks (`models/layers.HeadShape`).
HEADS = {"classification", "token_classification", "question_answering", "image_classification", "object_detection"}
COMMON = HEADS | {"full", "head", "default", "gaussian", "hf", "peft", "distillation", "bert", "llama", "gpt2", "qwen2", "gemma", "mistral"}
COMMON |= {"generation", "translation", "gguf"}
DOORS = ("METHODS", "INITS", "OPTIMIZERS", "TASKS", "FAMILIES", "TRANSFORMS", "EXPORTERS")
# Attributes and keys that hold a registered name, and the doors it may belong to.
TAGS = {
    "method": ("METHODS",),
    "init": ("INITS",),
    "kind": ("OPTIMIZERS", "TASKS"),
    "model_type": ("FAMILIES",),
    "form": ("EXPORTERS",),
}
# Runs in a fresh process, where no door is open yet, and notes which file registers each name.
RECORD = """
import json, sys
from lora_jax.config import doors
found = {name: {} for name in DOORS}
def watch(name, door):
    def note():
        frame = sys._getframe(1)
        while frame.f_globals["__name__"] in ("lora_jax", "lora_jax.config.doors"):
            frame = frame.f_back
        for new in door.all().keys() - found[name].keys():
            found[name][new] = frame.f_globals["__name__"]
    door.on_change(note)
for name in DOORS:
    watch(name, getattr(doors, name))
for name in DOORS:
    getattr(doors, name).all()
print(json.dumps(found))
"""


@functools.cache
def registered() -> dict[str, dict[str, str]]:
    """Door -> registered name -> the module that registers it."""
    done = subprocess.run([sys.executable, "-c", f"DOORS = {DOORS}\n{RECORD}"], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def foreign_names(here: str, source: str) -> list[str]:
    """Where a module names a method, task, optimizer, family, transform or exporter that another file registers."""
    owners = {name: module for things in registered().values() for name, module in things.items()}
    tree, found = ast.parse(source), []
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}

    def texts(node: ast.AST) -> set[str]:
        return {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}

    def tags(node: ast.AST) -> set[str]:
        if isinstance(node, ast.Attribute):
            return {node.attr} & TAGS.keys()
        return texts(node.slice) & TAGS.keys() if isinstance(node, ast.Subscript) else set()

    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for tag in set().union(*map(tags, sides)):
                for name in sorted(set().union(*map(texts, sides)) & {n for door in TAGS[tag] for n in registered()[door]}):
                    if owners[name] != here:
                        found.append(f"{here}, line {node.lineno}: compares {tag} with '{name}'")
        if isinstance(node, ast.Constant) and node.value in owners.keys() - COMMON and id(node) not in docstrings:
            # The config's defaults are names.
            if owners[node.value] == here or here.startswith("lora_jax.config."):
                continue
            found.append(f"{here}, line {node.lineno}: names '{node.value}'")
    return found


def test_every_door_is_used() -> None:
    assert [name for name, things in registered().items() if not things] in ([], ["TRANSFORMS"])


def test_no_file_names_what_another_registers() -> None:
    found = [place for name, path in MODULES.items() for place in foreign_names(name, path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "if config.adapter.method == 'full': pass",
        "if config['adapter']['method'] != 'head': pass",
        "chosen = config.adapter.method in ('lora', 'other')",
        "if config.optimizer.kind == 'adamw': pass",
        "scales = {'lora': 1}",
    ],
)
def test_the_check_of_names_sees_a_planted_line(line: str) -> None:
    assert foreign_names("lora_jax.training.planted", line)
    assert not foreign_names(registered()["METHODS"]["lora"], "if config.adapter.method == 'lora': pass")
