"""The config's dotted keys, the one that a wrong one was probably meant to be, and what the schema found wrong, in words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError

from ..errors import InputError, hint, nearest
from .doors import INITS, METHODS, OPTIMIZERS, SECTION_LISTS, TASKS, TRANSFORMS
from .renamed import ELSEWHERE_CALLED, current_name
from .schema import Config
from .yaml import Path

# Members share one name, one run directory, one mesh and one sweep, so these cannot differ between them.
_NOT_SWEPT = ("name", "tracking", "mesh", "sweep")


def config_schema() -> dict[str, Any]:
    """The config's JSON schema, for editors and for other programs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **copy.deepcopy(_schema()), "title": "lora-jax config"}


def valid_keys() -> list[str]:
    """Every key that holds a value, dotted, in the order of the schema: `name`, `model.source`, ..."""
    return list(_tree().leaves)


def section_keys() -> list[str]:
    """The keys that hold other keys: `model`, `task`, ..."""
    return list(_tree().sections)


def leaf_schema(dotted: str) -> dict[str, Any] | None:
    """What the key may hold, as JSON schema; None for a section or an unknown key."""
    return _tree().leaves.get(dotted)


def split_key(dotted: str, *, allow_section: bool = False) -> tuple[str, ...]:
    """The path of a dotted key. Below a key that holds a mapping the rest is one name, dots and all.

    >>> split_key("adapter.rank"), split_key("adapter.rank_pattern.layers.0.q_proj")
    (('adapter', 'rank'), ('adapter', 'rank_pattern', 'layers.0.q_proj'))

    Raises:
        InputError: there is no such key; the message names the nearest.
    """
    dotted = current_name(dotted)
    if dotted in _tree().leaves or (allow_section and dotted in section_keys()):
        return tuple(dotted.split("."))
    if dotted in section_keys():
        example = next(key for key in valid_keys() if key.startswith(dotted + "."))
        raise InputError(f"'{dotted}' is a section; name a key in it, such as '{example}'.")
    for leaf, schema in _tree().leaves.items():
        if dotted.startswith(leaf + ".") and len(dotted) > len(leaf) + 1:
            if schema.get("type") != "object":
                raise InputError(f"no config key '{dotted}': '{leaf}' holds a value, not further keys.")
            return (*leaf.split("."), dotted[len(leaf) + 1 :])
    raise InputError(unknown_key(dotted))


def unknown_key(dotted: str) -> str:
    """The sentence for a key that does not exist."""
    near = near_keys(dotted)
    if near:
        return f"no config key '{dotted}'. Did you mean " + " or ".join(f"'{key}'" for key in near) + "?"
    section = dotted.rpartition(".")[0]
    siblings = _children(section) if section in section_keys() else _children("")
    return f"no config key '{dotted}'. Valid keys here: {', '.join(siblings)}."


def near_keys(dotted: str) -> list[str]:
    """Up to three existing keys that `dotted` was probably meant to be, best first; none where nothing is near."""
    section, _, last = dotted.rpartition(".")
    if len(last) < 2 and last not in ELSEWHERE_CALLED:
        return []  # one letter is near to everything
    if last.lower() in ELSEWHERE_CALLED:
        return [ELSEWHERE_CALLED[last.lower()]]
    everywhere = [*valid_keys(), *section_keys()]
    # The right name in the wrong place comes before a similar name in the right place.
    same = [key for key in everywhere if key.rpartition(".")[2] == last.lower()]
    if same:
        by_likeness = nearest(dotted, same)
        return (by_likeness + [key for key in same if key not in by_likeness])[:3]
    # Then the most similar name; of two equal names the one in the section that was meant.
    by_name = {key.rpartition(".")[2]: key for key in everywhere}
    by_name |= {name: f"{section}.{name}" if section else name for name in _children(section)}
    near = nearest(last, by_name, count=1)
    if near:
        return [by_name[near[0]]]
    return [] if not section or section in section_keys() else nearest(dotted, everywhere, count=1)


def why_not_swept(dotted: str) -> str | None:
    """Why a sweep may not vary this (existing) key; None where it may."""
    top = dotted.split(".")[0]
    if top not in _NOT_SWEPT:
        return None
    swept = sorted({key.split(".")[0] for key in valid_keys()} - set(_NOT_SWEPT))
    return f"'{dotted}' cannot be swept, because all members share it. Sections that can be swept: {', '.join(swept)}."


def _children(section: str) -> list[str]:
    """The names directly below a section ('' for the top)."""
    prefix = section + "." if section else ""
    names = [key[len(prefix) :].split(".")[0] for key in valid_keys() if key.startswith(prefix)]
    return list(dict.fromkeys(names))


@cache
def _schema() -> dict[str, Any]:
    return Config.model_json_schema()


@dataclass(frozen=True)
class _Tree:
    """The keys of a config.

    Attributes:
        leaves: key -> what it may hold, as JSON schema; of a key that several kinds of a section have, what the first says.
        sections: keys that hold other keys.
        kinds: section that comes in kinds (`adapter`) -> kind -> its keys.
        own: (section, kind, key) -> what the key may hold in that kind.
    """

    leaves: dict[str, dict[str, Any]]
    sections: tuple[str, ...]
    kinds: dict[str, dict[str, tuple[str, ...]]]
    own: dict[tuple[str, str, str], dict[str, Any]]


@cache
def _tree() -> _Tree:
    """Read from the JSON schema, so that it is the one source of truth."""
    leaves: dict[str, dict[str, Any]] = {}
    sections: list[str] = []
    kinds: dict[str, dict[str, tuple[str, ...]]] = {}
    own: dict[tuple[str, str, str], dict[str, Any]] = {}

    def walk(schema: dict[str, Any], prefix: str) -> None:
        for name, child in schema["properties"].items():
            # A section stands as {"$ref"}, as anyOf [{"$ref"}, null] where it may be left out, as oneOf where it comes in kinds.
            forms = [child, *child.get("anyOf", []), *child.get("oneOf", [])]
            found = [_schema()["$defs"][form["$ref"].rpartition("/")[2]] for form in forms if "$ref" in form]
            if found:
                sections.append(prefix + name)
            for section in found:
                walk(section, f"{prefix}{name}.")
                if "oneOf" in child:
                    tag = next(key for key, value in section["properties"].items() if "const" in value)
                    kind = section["properties"][tag]["const"]
                    kinds.setdefault(prefix + name, {})[kind] = (tag, *(key for key in section["properties"] if key != tag))
                    own.update({(prefix + name, kind, key): value for key, value in section["properties"].items()})
                    known = list(kinds[prefix + name])
                    told = (f"{k}: {own[prefix + name, k, tag].get('description', '')}" for k in known)
                    leaves[f"{prefix}{name}.{tag}"] = {"enum": known, "description": " ".join(told)}
            if not found:
                leaves.setdefault(prefix + name, child)

    walk(_schema(), "")
    return _Tree(leaves, tuple(dict.fromkeys(sections)), kinds, own)


for _door in (METHODS, INITS, OPTIMIZERS, TASKS, TRANSFORMS):
    _door.on_change(_schema.cache_clear)
    _door.on_change(_tree.cache_clear)


def without_kinds(loc: tuple[str | int, ...]) -> Path:
    """Where pydantic found something, without the kind that it names of a section that comes in kinds.

    >>> without_kinds(("adapter", "lora", "rank"))
    ('adapter', 'rank')
    """
    out: list[str | int] = []
    for part in loc:
        if part not in _tree().kinds.get(".".join(map(str, out)), {}):
            out.append(part)
    return tuple(out)


def kinds_of_sections() -> dict[str, dict[str, tuple[str, ...]]]:
    """Section that comes in kinds -> kind -> its keys, the one that names the kind first."""
    return _tree().kinds


def default_of(section: str, kind: str, key: str) -> Any:
    """What a key of one kind of a section holds by default; None where there is none.

    >>> default_of("adapter", "lora", "rslora")
    False
    """
    return _tree().own.get((section, kind, key), {}).get("default")


def belongs_to(dotted: str) -> list[str]:
    """The kinds that have a key of a section that comes in kinds; none where there is no such key.

    >>> belongs_to("adapter.rslora")
    ['lora']
    """
    section, _, name = dotted.rpartition(".")
    return [kind for kind, names in _tree().kinds.get(section, {}).items() if name in names]


_MOST_TOLD = 6
_NO_SUCH_KIND = ("union_tag_invalid", "union_tag_not_found")
_UNKNOWN = ("extra_forbidden", "invalid_key")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `path` says where it is, `text` is the sentence."""

    path: Path
    text: str


def problems(error: ValidationError, data: Any) -> list[Problem]:
    """What is wrong with `data`, a problem a key, unknown keys first: they explain what seems to be missing."""
    unknown: list[Problem] = []
    others: dict[Path, Problem] = {}
    misnamed: set[str] = set()
    for item in error.errors(include_url=False):
        loc = without_kinds(item["loc"])
        path = _known_part(loc)
        if path in SECTION_LISTS and len(loc) > len(path):
            at, (number, *below) = loc[: len(path) + 1], loc[len(path) :]
            others.setdefault(at, Problem(at, f"{'.'.join(map(str, path))}.{number}: {SECTION_LISTS[path].wrong(item, below)}"))
        elif item["type"] in _UNKNOWN:
            dotted = ".".join(str(part) for part in loc)
            kinds = belongs_to(dotted)
            text = f"'{dotted}' belongs to {' or '.join(kinds)}." if kinds else unknown_key(dotted)
            unknown.append(Problem(tuple(str(part) for part in loc), text))
            misnamed.update([] if kinds else near_keys(dotted)[:1])
        elif item["type"] in _NO_SUCH_KIND and isinstance(item["input"], Mapping):
            section = ".".join(map(str, loc))
            at = (*loc, next(iter(_tree().kinds[section].values()))[0])
            others[at] = Problem(at, _sentence(at, item | {"type": "missing" if at[-1] not in item["input"] else "enum"}, data))
        elif path not in others:
            # A key with several admitted forms gives an error a form: one sentence tells them all.
            others[path] = Problem(path, _sentence(path, item, data))
    missing_by_mistake = {tuple(key.split(".")) for key in misnamed}
    return unknown + [p for p in others.values() if not (p.path in missing_by_mistake and ": missing" in p.text)]


def report(found: list[Problem], file: str, origins: Mapping[Path, str]) -> str:
    """The problems as a message of a few lines.

    Args:
        found: at least one problem.
        file: what was read, for the first words; '' where it was no file.
        origins: for (some) paths, where their value came from: 'line 12', or "override 'adapter.rank=0'".
    """
    if len(found) == 1:
        # An override is not in the file, so the file is not named then.
        origin = _origin(found[0].path, origins)
        places = [origin] if origin.startswith("override") else [file, origin]
        return ": ".join(part for part in (", ".join(p for p in places if p), found[0].text) if part)
    lines = [f"{file or 'config'}: {len(found)} problems"]
    for problem in found[:_MOST_TOLD]:
        origin = _origin(problem.path, origins)
        lines.append(f"  {origin}: {problem.text}" if origin else f"  {problem.text}")
    if len(found) > _MOST_TOLD:
        lines.append(f"  ... and {len(found) - _MOST_TOLD} more")
    return "\n".join(lines)


def show(value: Any) -> str:
    """A value as it would stand in the YAML, cut short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def expected(schema: Mapping[str, Any]) -> str:
    """What a key may hold, in words.

    >>> expected({"type": "integer", "exclusiveMinimum": 0})
    'a whole number above 0'
    """
    if "const" in schema:
        return show(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(str(choice) for choice in schema["enum"])
    if "anyOf" in schema:
        forms = [expected(form) for form in schema["anyOf"] if form.get("type") != "null"]
        forms += ["nothing (null)"] if len(forms) < len(schema["anyOf"]) else []
        return " or ".join(forms) if len(forms) < 3 else ", ".join(forms[:-1]) + " or " + forms[-1]
    kind = schema.get("type")
    if kind == "array":
        return "a list of " + _several(schema.get("items", {}))
    if kind == "object":
        values = schema.get("additionalProperties", {})
        return "a mapping of names to " + _several(values if isinstance(values, dict) else {})  # `true`: whatever one likes
    single = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    return single.get(str(kind), "a value") + _range(schema)


def _several(schema: Mapping[str, Any]) -> str:
    if schema.get("type") == "array":
        return "lists of " + _several(schema.get("items", {}))
    many = {"integer": "whole numbers", "number": "numbers", "string": "texts", "boolean": "true or false"}
    return many.get(str(schema.get("type")), "values") + _range(schema)


def _range(schema: Mapping[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    start = f"above {above:g}" if above is not None else f"from {low:g}" if low is not None else ""
    end = f"below {below:g}" if below is not None else f"{'to' if low is not None else 'at most'} {high:g}" if high is not None else ""
    if start and end:
        return f" {start} {'to ' if below is not None else ''}{end}"
    return f" {start or end}" + (" up" if low is not None else "") if start or end else ""


def _sentence(path: Path, item: Mapping[str, Any], data: Any) -> str:
    key = ".".join(str(part) for part in path)
    prefix = f"{key}: " if key else ""
    # Of a key that several kinds of a section have, what its own kind says.
    own = _tree().own.get(tuple(item["loc"])) if len(item["loc"]) == 3 else None
    schema = leaf_schema(key) if own is None or len(path) != 2 else own
    if item["type"] == "missing":
        if key in section_keys():
            return f"{prefix}missing; a config needs this section."
        return " ".join(part for part in (f"{prefix}missing.", (schema or {}).get("description", ""), _choices(schema)) if part)
    if item["type"] == "value_error":
        # Written by hand in the schema, and already a sentence.
        return f"{prefix}{item['ctx']['error']}."
    value = _value_at(data, path)
    if key in section_keys() or schema is None:
        return f"{prefix}must be a section (keys with values, indented below it), got {show(value)}."
    if item["type"] == "string_pattern_mismatch":
        return f"{prefix}must start with a letter or digit and contain only letters, digits, '.', '_' and '-', got {show(value)}."
    if item["type"] == "finite_number":
        return f"{prefix}must be a finite number, got {show(value)}."
    return f"{prefix}must be {expected(schema)}, got {show(value)}.{_advice(schema, value)}"


def _choices(schema: Mapping[str, Any] | None) -> str:
    return f"Must be {expected(schema)}." if schema and "enum" in schema else ""


def _advice(schema: Mapping[str, Any], value: Any) -> str:
    """A second sentence where the mistake can be guessed."""
    if "enum" in schema:
        near = nearest(str(value), [str(choice) for choice in schema["enum"]], count=1)
        return " " + hint(str(value), near) if near else ""
    kinds = {form.get("type") for form in [schema, *schema.get("anyOf", [])]}
    if isinstance(value, str) and kinds & {"integer", "number"}:
        try:
            float(value)
        except ValueError:
            return ""
        return " Write it without quotes."
    forms = [schema, *schema.get("anyOf", [])]
    texts_wanted = any("string" in (form.get("type"), form.get("items", {}).get("type")) for form in forms)
    items = value if isinstance(value, list) else [value]
    if texts_wanted and not kinds & {"integer", "number"} and None not in items:
        return " Put text that looks like something else in quotes."
    return ""


def _known_part(loc: tuple[str | int, ...]) -> Path:
    """The path up to the key that exists: pydantic adds list indices and the names of admitted forms below it."""
    for end in range(1, len(loc) + 1):
        if leaf_schema(".".join(str(part) for part in loc[:end])) is not None:
            return tuple(loc[:end])
    return tuple(loc)


def _value_at(data: Any, path: Path) -> Any:
    for part in path:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def _origin(path: Path, origins: Mapping[Path, str]) -> str:
    """Where the innermost known part of `path` came from, and which overrides changed something below it."""
    own = next((origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origins), "")
    below = [origin for at, origin in origins.items() if len(at) > len(path) and at[: len(path)] == path and origin.startswith("override")]
    return ", with ".join([own, *below] if own else below)
