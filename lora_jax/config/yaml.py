"""YAML text to plain values and back, without YAML 1.1's surprises.

Values are read by the YAML 1.2 core rules: `1e-3` is a number, `no` and `on` are text (a class may well be called `no`), dates
stay text. Beyond what the safe loader refuses (no tag builds a Python object), a key that stands twice and an alias that
unfolds into something huge are errors. `${...}` is text like any other: nothing is looked up in the environment.

On PyYAML, not ruamel.yaml: that one's YAML 1.2 still reads dates, takes 1_000 for a number and fails on `=`, so it needs the
same table of rules, and is one dependency more (PyYAML comes with transformers).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import InputError

Path = tuple[str | int, ...]
_MOST_NODES = 100_000
_MOST_CHARACTERS = 4_000_000

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")
_NUMBER_STARTS = list("-+.0123456789")


_TOO_MANY = f"holds more than {_MOST_NODES:,} values (aliases unfolded); a config is smaller."


class _Loader(yaml.SafeLoader):
    """The safe loader with the core rules; PyYAML's own resolvers (YAML 1.1) are dropped."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML's class-level table, replaced and not shared)
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        # Here, and not when all is built: a long list takes a hundred times its size.
        self.nodes += 1
        if self.nodes > _MOST_NODES:
            raise InputError(_TOO_MANY)
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        # 010 is ten, as in YAML 1.2; int(text, 0) would refuse it.
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that either version of YAML would read as something else."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Line breaks as \n on one line: the other styles spread a short template over several.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INT, _NUMBER_STARTS)
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, _NUMBER_STARTS)
    _class.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])


def parse(text: str, where: str) -> tuple[Any, dict[Path, int]]:
    """The value that `text` holds, and on which line each key stands.

    Args:
        text: one YAML document.
        where: the file or override, for messages.

    Raises:
        InputError: the text is not YAML, or holds what a config may not.

    >>> parse("adapter:\\n  rank: 8", "x.yaml")
    ({'adapter': {'rank': 8}}, {('adapter',): 1, ('adapter', 'rank'): 2})
    """
    if len(text) > _MOST_CHARACTERS:
        raise InputError(f"{where}: holds {len(text):,} characters; a config has at most {_MOST_CHARACTERS:,}.")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, {}
            lines: dict[Path, int] = {}
            _inspect(node, (), lines, where)
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise InputError(_broken(error, where)) from None
    except yaml.reader.ReaderError as error:
        raise InputError(f"{where}: broken YAML: the character #x{error.character:04x} is not allowed.") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise (InputError(f"{where}: {_TOO_MANY}") if str(error) == _TOO_MANY else error) from None
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{where}: broken YAML: {what}.") from None


def dump(value: Any) -> str:
    """Readable YAML in the order given; `parse` gives the same value back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _broken(error: yaml.MarkedYAMLError, where: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
    problem = (error.problem or "cannot be read").strip()
    if "could not determine a constructor for the tag" in problem:
        return f"{place}: tags such as {problem.split(chr(39))[1]} are not allowed in a config."
    if "\\t" in problem:
        return f"{place}: broken YAML: a tab stands where spaces are needed. Indent with spaces."
    context = f" ({error.context.strip()})" if error.context else ""
    return f"{place}: broken YAML: {problem}{context}."


def _inspect(root: yaml.Node, path: Path, lines: dict[Path, int], where: str) -> None:
    """Note where keys stand; refuse a key given twice, and aliases that unfold beyond reason or into themselves."""
    count = 0
    open_nodes: set[int] = set()

    def walk(node: yaml.Node, path: Path) -> None:
        nonlocal count
        count += 1
        if count > _MOST_NODES:
            raise InputError(f"{where}: {_TOO_MANY}")
        if id(node) in open_nodes:
            raise InputError(f"{where}, line {node.start_mark.line + 1}: an alias refers to a node that contains it.")
        open_nodes.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                walk(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                name = key.value if isinstance(key, yaml.ScalarNode) else "?"
                if name in first and name != "<<":
                    dotted = ".".join(str(part) for part in (*path, name))
                    raise InputError(f"{where}, line {line}: the key '{dotted}' was already given on line {first[name]}.")
                first[name] = line
                lines[(*path, name)] = line
                walk(value, (*path, name))
        open_nodes.discard(id(node))

    walk(root, path)
