"""From a YAML file and `key=value` overrides to a checked `Config`, and back to text.

Any mistake in the input raises an `InputError` that names the file or override, the key, what is wrong and the nearest valid choice.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, get_args

from pydantic import ValidationError

from ..errors import InputError, nearest, warn
from .doors import SECTION_LISTS, OneOf
from .messages import (
    Problem,
    belongs_to,
    default_of,
    kinds_of_sections,
    leaf_schema,
    problems,
    report,
    section_keys,
    show,
    split_key,
    why_not_swept,
)
from .renamed import renamed
from .schema import SOURCE, Config
from .types import Section
from .where import Where
from .yaml import Path, dump, parse

_HALF = re.compile("[\ud800-\udfff]")


def load_config(path: str | os.PathLike[str], overrides: list[str] | tuple[str, ...] = (), *, of_run: bool = False) -> Config:
    """The config in a YAML file, with `key=value` overrides applied.

    Relative paths in the file are looked up in the file's folder first, then in the working directory; for paths in overrides it is the
    other way round. Paths that exist become absolute, so that a run finds them from anywhere.

    Args:
        path: the YAML file.
        overrides: dotted keys and YAML values, such as `adapter.rank=4`; later ones win.
        of_run: it is a run directory's own: older versions wrote there the keys of every kind of a section.

    Raises:
        InputError: the file, an override or a value is wrong.
    """
    file = os.fspath(path)
    data, lines = parse(_read(FilePath(path)), file)
    if data is None:
        raise InputError(f"{file}: is empty; a config has at least the sections {', '.join(_needed_sections())}.")
    if not isinstance(data, dict):
        raise InputError(f"{file}: must be a mapping (name:, model:, task:, ...), got a {type(data).__name__}.")
    origins = {at: f"line {line}" for at, line in lines.items()}
    data = renamed(data, file, origins)
    data = apply_overrides(data, overrides, origins)
    data = _located(data, FilePath(file).parent, origins)
    config = _validated(data, file, origins)
    if not of_run:
        _say_without_effect(data, file, origins)
    _check_not_swept(config, _keys_set(overrides), file)
    found = _sweep_problems(config)
    if found:
        raise InputError(report(found, file, origins))
    return config


def _say_without_effect(data: Mapping[str, Any], file: str, origins: Mapping[Path, str]) -> None:
    """A warning of keys that only another kind of a section has, which have passed because they hold its default."""
    found = []
    for section, field in Config.model_fields.items():
        for of in (one for one in field.metadata if isinstance(one, OneOf)):
            for key in of.defaults_of_others(data.get(section)):
                whose, kind = " and ".join(belongs_to(f"{section}.{key}")), data[section].get(of.key, of.default)
                text = f"{section}.{key} has no effect: it is a key of {section}.{of.key} {whose}, and this one is {kind}."
                found.append(Problem((section, key), text))
    if found:
        warn(report(found, file, origins))


def apply_overrides(
    data: Mapping[str, Any], overrides: list[str] | tuple[str, ...], origins: dict[Path, str] | None = None
) -> dict[str, Any]:
    """A copy of `data` (a config as plain values) with each `key=value` set.

    The value is YAML. For a key that holds text it is taken literally: `task.template={text} Answer:` needs no quotes beyond the
    shell's. If `origins` is given, it records which keys came from which override, for later messages.

    >>> apply_overrides({"adapter": {"rank": 8}}, ["adapter.rank=4", "optimizer.learning_rate=1e-3"])
    {'adapter': {'rank': 4}, 'optimizer': {'learning_rate': 0.001}}
    """
    result = copy.deepcopy(dict(data))
    for override in overrides:
        where = f"override '{override}'"
        if _HALF.search(override):
            raise InputError(f"override {override!a}: is not text (UTF-8).")
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals:
            raise InputError(f"{where}: is not key=value, such as 'adapter.rank=4'.")
        try:
            path = split_key(key, allow_section=True)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        _set(result, path, _override_value(key, text, where), where)
        if origins is not None:
            for old in [old for old in origins if old[: len(path)] == path]:
                del origins[old]
            origins[path] = where
    return result


_LOOKED: dict[str, tuple[str, ...]] = {}


def looked_for(source: str) -> tuple[str, ...]:
    """The absolute paths at which a relative path was looked for: next to the config that names it, and in the working directory."""
    return _LOOKED.get(source, (os.path.abspath(os.path.expanduser(source)),))


def _located(data: dict[str, Any], folder: FilePath, origins: Mapping[Path, str]) -> dict[str, Any]:
    """The config with absolute paths, in each key marked as a `SOURCE` and in its swept values."""
    places = [folder, FilePath()]

    def absolute(value: Any, path: Path) -> Any:
        if isinstance(value, list):
            return [absolute(item, path) for item in value]
        if isinstance(value, dict):  # one of a list of sections
            return {key: absolute(inner, path) if key == "source" else inner for key, inner in value.items()}
        if not isinstance(value, str) or "://" in value or not value or "\0" in value:
            return value
        own = next((origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in origins), "")
        order = reversed(places) if own.startswith("override") else places
        paths = tuple(dict.fromkeys(os.path.abspath(place / os.path.expanduser(value)) for place in order))
        found = next((path for path in paths if os.path.exists(path)), None)
        if found is None:
            _LOOKED[value] = paths
        return value if found is None else found

    def in_section(node: Any, path: Path, section: Any) -> Any:
        """The same inside a section that stands in a list, by the fields of its class."""
        if not isinstance(node, dict):
            return node
        made = dict(node)
        for name, field in section.model_fields.items() if section is not None else ():
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("format") == SOURCE["format"] and name in made:
                made[name] = absolute(made[name], (*path, name))
            kinds = (field.annotation, *get_args(field.annotation))
            inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)
            if inner is not None and name in made:
                made[name] = in_section(made[name], (*path, name), inner)
        return made

    def in_list(node: Any, path: Path, of: OneOf) -> Any:
        if isinstance(node, list):  # in a sweep there are several lists
            return [in_list(item, (*path, number), of) for number, item in enumerate(node)]
        return in_section(node, path, of.sections().get(str(node.get(of.key))) if isinstance(node, dict) else None)

    def walk(node: Any, path: Path, key: str) -> Any:
        if (of := SECTION_LISTS.get(tuple(key.split(".")))) is not None:
            return in_list(node, path, of)
        if (leaf_schema(key) or {}).get("format") == SOURCE["format"]:
            return absolute(node, path)
        if isinstance(node, dict):
            # In a sweep the keys are whole: `sweep.grid` holds `task.source`.
            inside = "" if path[:1] == ("sweep",) else f"{key}."
            return {k: walk(v, (*path, k), f"{inside}{k}") if isinstance(k, str) else v for k, v in node.items()}
        if path == ("sweep", "members") and isinstance(node, list):
            return [walk(item, (*path, number), "") for number, item in enumerate(node)]
        return node

    return {k: walk(v, (k,), k) if isinstance(k, str) else v for k, v in data.items()}


def with_values(
    config: Config, values: Mapping[str, Any], *, where: str = "sweep.grid", sections: Mapping[str, Any] | None = None
) -> Config:
    """A copy of `config` with the values set, checked as a whole again.

    Args:
        config: a valid config.
        values: dotted key -> value.
        where: where the values come from, for messages.
        sections: whole sections that replace the config's. If given, the values are overrides by a user, which may not set swept keys.

    Raises:
        InputError: a key does not exist, the config with these values is not valid, or a value sets a key that is swept.
    """
    data = config.model_dump() | dict(sections or {})
    for key, value in values.items():
        try:
            path = split_key(key)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        _set(data, path, value, where)
    changed = _validated(_of_its_kind(data, config, [".".join(split_key(key)) for key in values]), where, {})
    if sections is not None:
        _check_not_swept(changed, list(values), where)
        if sections and (found := _sweep_problems(changed)):
            raise InputError(report(found, where, {}))
    return changed


def _keys_set(overrides: list[str] | tuple[str, ...]) -> list[str]:
    """The dotted keys that overrides set, including those inside sections."""
    found: list[str] = []
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            value = parse(text, "")[0]
        except InputError:
            value = text
        found += [key.strip(), *(f"{key.strip()}.{inner}" for inner in value)] if isinstance(value, dict) else [key.strip()]
    return found


def _check_not_swept(config: Config, keys: Sequence[str], where: str) -> None:
    """Refuses values for keys that the sweep sets for every member, because they would have no effect."""
    sweep = config.sweep
    if sweep is None:
        return
    combined = {*sweep.grid, *sweep.zip, *(sweep.random.keys if sweep.random else ())}
    spaces = ([combined] if combined or not sweep.members else []) + [set(member) for member in sweep.members]
    fixed = set.intersection(*spaces) | ({"training.seed"} if isinstance(sweep.seeds, list) else set())
    if (ignored := next((key for key in keys if key in fixed), None)) is None:
        return
    place = next((f"sweep.{part}" for part in ("grid", "zip") if ignored in getattr(sweep, part)), "sweep.seeds")
    place = place if ignored in combined or ignored == "training.seed" else "sweep.members"
    place = "sweep.random.keys" if sweep.random is not None and ignored in sweep.random.keys else place
    instead = "training.seed=... with sweep.seeds=2" if place == "sweep.seeds" else f"{place}.{ignored}=[...]"
    advice = f"Set {'' if place == 'sweep.members' else instead + ', or '}sweep=null for a single adapter."
    raise InputError(f"{where}: '{ignored}' is set, and {place} gives each member its own: the value would have no effect. {advice}")


def _of_its_kind(data: dict[str, Any], before: Config, given: list[str]) -> dict[str, Any]:
    """Drops a section's keys of its former kind: a member with another method does not keep the first method's keys.

    Keys that both kinds have are kept. Those that not every kind has are kept where they do not hold the former kind's default:
    a decay of moments that suits one optimizer is no default of another's.
    """
    old = before.model_dump()
    for section, kinds in kinds_of_sections().items():
        tag, here = next(iter(kinds.values()))[0], data.get(section)
        if not isinstance(here, dict) or not isinstance(old.get(section), dict):
            continue
        if here.get(tag) != old[section].get(tag) and here.get(tag) in kinds:
            own, former = kinds[str(here[tag])], str(old[section].get(tag))
            everywhere = set.intersection(*map(set, kinds.values()))
            usual = {key for key in here if key not in everywhere and here[key] == default_of(section, former, key)}
            data[section] = {k: v for k, v in here.items() if (k in own and k not in usual) or f"{section}.{k}" in given}
    return data


def config_of(values: Mapping[str, Any], where: str) -> Config:
    """The config of plain values, as `dump_config` writes them, in this version or an earlier one.

    Args:
        values: nested mappings.
        where: where they come from, for messages.

    Raises:
        InputError: they are not a valid config.
    """
    return _validated(renamed(values, where, {}), where, {})


def dump_config(config: Config) -> str:
    """The whole config as YAML, including defaults; `load_config` reads the same config back."""
    return dump(config.model_dump())


def _read(path: FilePath) -> str:
    if path.is_dir():
        inside = path / "config.yaml"
        raise InputError(f"{path}: is a folder, not a YAML file." + (f" Did you mean '{inside}'?" if inside.is_file() else ""))
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"no config file '{path}'.{_near_files(path)}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text (UTF-8), so not a YAML file.") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


def _near_files(path: FilePath) -> str:
    if not path.parent.is_dir():
        return f" There is no folder '{path.parent}' either."
    files = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    near = nearest(path.name, files)
    if near:
        return " Did you mean " + " or ".join(f"'{path.parent / name}'" for name in near) + "?"
    return f" '{path.parent}' holds: {', '.join(files[:10])}." if files else ""


def _validated(data: dict[str, Any], file: str, origins: Mapping[Path, str]) -> Config:
    if halves := _halves_of_characters(data):
        raise InputError(report(halves, file, origins))
    try:
        # Strict: '8' is not 8, and true is not 1.
        return Config.model_validate(data, strict=True)
    except ValidationError as error:
        raise InputError(report(problems(error, data), file, origins)) from None


def _halves_of_characters(node: Any, path: Path = ()) -> list[Problem]:
    """Where a text, or a key, holds what no file can: half of a character that is written as two (YAML's `"\\ud800"`)."""
    if isinstance(node, str):
        where = ".".join(map(str, path)) + ": " if path else ""
        return [Problem(path, f"{where}{node[:60]!a} is not text (UTF-8).")] if _HALF.search(node) else []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in items for found in (_halves_of_characters(key, path) or _halves_of_characters(value, (*path, key)))]


def _sweep_problems(config: Config) -> list[Problem]:
    """Mistakes in a sweep that the schema cannot detect: unknown keys, keys that all members share, repeated values, a bad `where`."""
    sweep = config.sweep
    if sweep is None:
        return []
    found: list[Problem] = []
    places: list[tuple[Path, str]] = [(("sweep", part, key), key) for part in ("grid", "zip") for key in getattr(sweep, part)]
    places += [(("sweep", "random", "keys", key), key) for key in (sweep.random.keys if sweep.random else ())]
    places += [(("sweep", "members", number, key), key) for number, member in enumerate(sweep.members) for key in member]
    for at, key in places:
        part = "sweep.random.keys" if at[1] == "random" else f"sweep.{at[1]}"
        try:
            split_key(key)
        except InputError as error:
            found.append(Problem(at, f"{part}: {error}"))
            continue
        why = why_not_swept(key)
        if why:
            found.append(Problem(at, f"{part}: {why}"))
        values = sweep.grid[key] if at[1] == "grid" else []
        twice = [value for index, value in enumerate(values) if value in values[:index]]
        if twice:
            found.append(Problem(at, f"{part}: '{key}' lists {show(twice[0])} twice; members must differ."))
    if sweep.where is not None:
        try:
            Where(sweep.where)
        except InputError as error:
            found.append(Problem(("sweep", "where"), str(error)))
    return found


def _override_value(key: str, text: str, where: str) -> Any:
    schema = leaf_schema(key) or {}
    kinds = {form.get("type") for form in [schema, *schema.get("anyOf", [])]} - {None}
    if kinds and kinds <= {"string", "null"} and "enum" not in schema:
        try:
            value, _ = parse(text, where)
        except InputError:
            return text
        return value if isinstance(value, str) or (value is None and "null" in kinds) else text
    return parse(text, where)[0]


def _set(data: dict[str, Any], path: tuple[str, ...], value: Any, where: str) -> None:
    for depth, part in enumerate(path[:-1]):
        if data.get(part) is None:
            data[part] = {}
        if not isinstance(data[part], dict):
            raise InputError(f"{where}: '{'.'.join(path[: depth + 1])}' holds {show(data[part])}, so no key can be set in it.")
        data = data[part]
    data[path[-1]] = value


def _needed_sections() -> list[str]:
    return [name for name, field in Config.model_fields.items() if field.is_required() and name in section_keys()]
