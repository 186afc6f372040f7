"""A grid to members: one config a combination, with a name that says what is its own."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

from ..config.errors import InputError
from ..config.load import with_values
from ..config.schema import Config


@dataclasses.dataclass(frozen=True)
class Member:
    """One point of a sweep.

    Attributes:
        name: its swept values, short: `rank=8,targets=attention`; names its folder.
        settings: dotted key -> value, of the swept keys.
        config: the whole config with these values.
    """

    name: str
    settings: dict[str, Any]
    config: Config


def members_of(config: Config) -> list[Member]:
    """All combinations of `sweep.grid`, in its order; a config without a sweep is one member, `main`.

    Raises:
        InputError: a value is not valid for its key, or two combinations are the same.
    """
    if config.sweep is None:
        return [Member("main", {}, config)]
    keys = list(config.sweep.grid)
    short = _short_keys(keys)
    members: dict[str, Member] = {}
    for values in itertools.product(*config.sweep.grid.values()):
        settings = dict(zip(keys, values, strict=True))
        name = ",".join(f"{short[k]}={_short_value(v)}" for k, v in settings.items())
        if name in members:
            raise InputError(f"sweep.grid: '{name}' appears twice.")
        members[name] = Member(name, settings, with_values(config, settings))
    return list(members.values())


def _short_keys(keys: list[str]) -> dict[str, str]:
    ends = [k.rsplit(".", 1)[-1] for k in keys]
    return {k: e if ends.count(e) == 1 else k for k, e in zip(keys, ends, strict=True)}


def _short_value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)
