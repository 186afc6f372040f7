"""Says in a person's words what the schema found wrong with a config: which key, what it must be, what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from .errors import hint, nearest
from .keys import leaf_schema, near_keys, section_keys, unknown_key
from .yaml_text import Path

_MOST_TOLD = 6
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
        path = _known_part(item["loc"])
        if item["type"] in _UNKNOWN:
            dotted = ".".join(str(part) for part in item["loc"])
            unknown.append(Problem(tuple(str(part) for part in item["loc"]), unknown_key(dotted)))
            misnamed.update(near_keys(dotted)[:1])
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
        return "a mapping of names to " + _several(schema.get("additionalProperties", {}))
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
    schema = leaf_schema(key)
    if item["type"] == "missing":
        if key in section_keys():
            return f"{prefix}missing; a config needs this section."
        return f"{prefix}missing. {(schema or {}).get('description', '')}{_choices(schema)}".rstrip()
    if item["type"] == "value_error":
        # Written by hand in the schema, and already a sentence.
        return f"{prefix}{item['ctx']['error']}."
    value = _value_at(data, path)
    if key in section_keys() or schema is None:
        return f"{prefix}must be a section (keys with values, indented below it), got {show(value)}."
    if item["type"] == "string_pattern_mismatch":
        return f"{prefix}may hold letters, digits, '.', '_' and '-' and begins with a letter or digit, got {show(value)}."
    if item["type"] == "finite_number":
        return f"{prefix}must be a finite number, got {show(value)}."
    return f"{prefix}must be {expected(schema)}, got {show(value)}.{_advice(schema, value)}"


def _choices(schema: Mapping[str, Any] | None) -> str:
    return f" Must be {expected(schema)}." if schema and "enum" in schema else ""


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
