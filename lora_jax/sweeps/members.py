"""A sweep to members: one config a point, with a name that says what is its own."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

from ..config.errors import InputError, hint
from ..config.load import with_values
from ..config.schema import Config
from .space import MANY, points


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


def members_of(config: Config, *, many: bool = False) -> list[Member]:
    """The members of `config.sweep`, in its order; a config without a sweep is one member, `main`.

    Args:
        config: with or without a sweep.
        many: whether more than 10,000 are meant.

    Raises:
        InputError: a value is not valid for its key, two members are the same, none is left, or they are too many.
    """
    if config.sweep is None:
        return [Member("main", {}, config)]
    some = list(itertools.islice(points(config), None if many else MANY + 1))
    if not some:
        raise InputError(f"sweep.where: no member is left by '{config.sweep.where}'.")
    if len(some) > MANY and not many:
        raise InputError(f"sweep: has more than {MANY:,} members. If they are meant, say --yes.")
    short = _short_keys(list(dict.fromkeys(key for settings in some for key in settings)))
    members: dict[str, Member] = {}
    for settings in some:
        name = ",".join(f"{short[k]}={_short_value(v)}" for k, v in settings.items()) or "main"
        if name in members:
            raise InputError(f"sweep: '{name}' appears twice.")
        members[name] = Member(name, settings, with_values(config, settings, where="sweep"))
    reference = config.sweep.reference
    if reference and not any(all(k in s and _same(s[k], v) for k, v in reference.items()) for s in some):
        unknown = next((key for key in reference if all(key not in s for s in some)), None)
        if unknown is not None:
            raise InputError(f"sweep.reference: '{unknown}' is not swept. {hint(unknown, short)}")
        raise InputError(f"sweep.reference: no member has {', '.join(f'{short[k]}={_short_value(v)}' for k, v in reference.items())}.")
    if "training.seed" in reference:
        raise InputError("sweep.reference: 'training.seed' cannot be compared with; seeds are paired.")
    return list(members.values())


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _short_keys(keys: list[str]) -> dict[str, str]:
    ends = [k.rsplit(".", 1)[-1] for k in keys]
    return {k: e if ends.count(e) == 1 else k for k, e in zip(keys, ends, strict=True)}


def _short_value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)
