"""From a `sweep` section to points (the swept values of each member, in order), and from points to members.

A member has a config of its own, and a name made of its swept values.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..config.load import with_values
from ..config.messages import leaf_schema, valid_keys
from ..config.schema import Config, Distribution, RandomConfig
from ..config.where import Where
from ..errors import InputError, hint
from ..packing.pack import Member

Settings = dict[str, Any]

# More members than this are more likely a mistake than intended.
MANY = 10_000


def points(config: Config) -> Iterator[Settings]:
    """Dotted key -> value for each member of `config.sweep`.

    These are all combinations of `grid`, the rows of `zip` and the draws of `random`, then `members`; each of them once per seed; and
    of all these, the ones for which `where` holds. A random draw that repeats an earlier point is left out.

    Raises:
        InputError: `where` cannot be evaluated for a member.
    """
    sweep = config.sweep
    assert sweep is not None
    holds = _condition(config)
    seeds: list[int | None] = [None]
    if sweep.seeds is not None:
        first = config.training.seed
        seeds = list(range(first, first + sweep.seeds)) if isinstance(sweep.seeds, int) else list(sweep.seeds)
    axes: list[list[Settings]] = [[{key: value} for value in values] for key, values in sweep.grid.items()]
    if sweep.zip:
        axes.append([dict(zip(sweep.zip, row, strict=True)) for row in zip(*sweep.zip.values(), strict=True)])
    if sweep.random is not None:
        axes.append(_draws(sweep.random))
    combined = (dict(itertools.chain.from_iterable(p.items() for p in parts)) for parts in itertools.product(*axes)) if axes else iter(())
    alone = [{}] if not axes and not sweep.members else []  # `seeds` by themselves
    for point in itertools.chain(combined, sweep.members, alone):
        for seed in seeds:
            settings = point if seed is None else {**point, "training.seed": seed}
            if holds(settings):
                yield settings


def _condition(config: Config) -> Any:
    assert config.sweep is not None
    if config.sweep.where is None:
        return lambda settings: True
    where = Where(config.sweep.where)
    plain = config.model_dump()
    base: Settings = {}
    for key in valid_keys():
        value: Any = plain
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        base[key] = value
    return lambda settings: where({**base, **settings})


def _draws(random: RandomConfig) -> list[Settings]:
    # One generator per key: another key, or more draws, do not change the earlier draws.
    columns = {
        key: _column(key, distribution, np.random.default_rng([random.seed, zlib.crc32(key.encode())]), random.count)
        for key, distribution in random.keys.items()
    }
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return list({json.dumps(row, sort_keys=True, default=str): row for row in rows}.values())


def _column(key: str, distribution: Distribution, rng: np.random.Generator, count: int) -> list[Any]:
    if distribution.choice is not None:
        return [distribution.choice[int(i)] for i in rng.integers(0, len(distribution.choice), count)]
    schema = leaf_schema(key) or {}
    kinds = {form.get("type") for form in [schema, *schema.get("anyOf", [])]}
    whole = "integer" in kinds and "number" not in kinds
    if "integer" not in kinds and "number" not in kinds:
        raise InputError(f"sweep.random.keys: '{key}' is not a number; draw it with 'choice'.")
    bounds = distribution.uniform or distribution.log_uniform
    assert bounds is not None
    shares = rng.uniform(size=count)
    if distribution.uniform is not None:
        low, high = (bounds[0], bounds[1] + 1) if whole else bounds
        values = low + (high - low) * shares
    else:
        low, high = math.log(bounds[0]), math.log(bounds[1] + 1 if whole else bounds[1])
        values = np.exp(low + (high - low) * shares)
    # Four digits: short enough for names and tables, and no result depends on the fifth.
    return [min(int(v), int(bounds[1])) if whole else float(f"{v:.4g}") for v in values]


def members_of(config: Config, *, many: bool = False) -> list[Member]:
    """The members of `config.sweep`, in its order; a config without a sweep is one member, `main`.

    Args:
        config: with or without a sweep.
        many: allow more than 10,000 members.

    Raises:
        InputError: a value is not valid for its key, two members are the same, `where` leaves none, or there are too many.
    """
    if config.sweep is None:
        return [Member("main", {}, config)]
    some = list(itertools.islice(points(config), None if many else MANY + 1))
    if not some:
        raise InputError(f"sweep.where: '{config.sweep.where}' holds for no member.")
    if len(some) > MANY and not many:
        raise InputError(f"sweep: has more than {MANY:,} members. If that is intended, add --yes.")
    short = _short_keys(list(dict.fromkeys(key for settings in some for key in settings)))
    paths = _short_paths(some)
    shown = lambda key, value: paths.get(key, {}).get(str(value)) or _short_value(value)
    members: dict[str, Member] = {}
    for settings in some:
        name = ",".join(f"{short[k]}={shown(k, v)}" for k, v in settings.items()) or "main"
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
        raise InputError("sweep.reference: 'training.seed' cannot be the reference, because seeds are paired.")
    return list(members.values())


def full_name(settings: Settings) -> str:
    """A member's name with whole keys, for when the short one is taken.

    >>> full_name({"adapter.rank": 2, "task.source": "a"})
    'adapter.rank=2,task.source=a'
    """
    return ",".join(f"{key}={_short_value(value)}" for key, value in settings.items())


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _short_keys(keys: list[str]) -> dict[str, str]:
    ends = [k.rsplit(".", 1)[-1] for k in keys]
    return {k: e if ends.count(e) == 1 else k for k, e in zip(keys, ends, strict=True)}


def _short_paths(some: Sequence[Settings]) -> dict[str, dict[str, str]]:
    """Swept key -> absolute path -> its last part, if these differ for all of the key's values, so that names contain no folders."""
    found: dict[str, dict[str, str]] = {}
    for key in {key for settings in some for key, value in settings.items() if isinstance(value, str) and os.path.isabs(value)}:
        values = {str(settings[key]) for settings in some if key in settings}
        words = {value: os.path.basename(value) if os.path.isabs(value) else value for value in values}
        if len(set(words.values())) == len(words) and all(words.values()):
            found[key] = words
    return found


def _short_value(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return json.dumps(value) if isinstance(value, dict) else str(value)
