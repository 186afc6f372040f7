"""Which metric members are compared by, and how settings are written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from ..errors import InputError, hint
from ..tasks.evaluators import EVALUATORS, Evaluator
from ..tracking.results import MemberResult, union

T = TypeVar("T")

SEED = "training.seed"
LEARNING_RATE = "optimizer.learning_rate"
# Runs of older versions do not say what their task is compared by: the first of these that all members have.
_OLDER = ("f1", "accuracy", "perplexity", "loss")


def find_metric(name: str, results: Sequence[MemberResult]) -> Evaluator:
    """The evaluator of a metric.

    Raises:
        InputError: no result has it, or no evaluator of this name is known.
    """
    names = union(r.final for r in results)
    if name not in names:
        raise InputError(f"no member has a metric '{name}'. {hint(name, names)}")
    return EVALUATORS.get(name, "metric")


def primary_metric(results: Sequence[MemberResult]) -> Evaluator:
    """What the members' task is compared by; of runs that do not say so, or of several tasks, F1, accuracy, perplexity or loss.

    Only one that all finished members have.

    Raises:
        InputError: There is none.
    """
    ended = [r for r in results if r.status == "finished"] or list(results)
    own = {r.metric for r in ended}
    for name in (*own, *_OLDER) if len(own) == 1 else _OLDER:
        if name and ended and all(name in r.final for r in ended):
            return EVALUATORS.get(name, "metric")
    raise InputError(f"the members have none of these metrics in common: {', '.join(_OLDER)}")


def best_of(things: Iterable[T], value: Callable[[T], float], metric: Evaluator) -> T | None:
    """The thing with the best value, of equals the first; None where every value is NaN."""
    best: tuple[float, T] | None = None
    for one in ((value(thing), thing) for thing in things):
        if not math.isnan(one[0]) and (best is None or metric.better(one[0], best[0])):
            best = one
    return None if best is None else best[1]


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> its last word, or as many words from the end as tell it from the others.

    >>> short_names(["adapter.rank", "training.seed", "training.data.seed"])
    {'adapter.rank': 'rank', 'training.seed': 'training.seed', 'training.data.seed': 'data.seed'}
    """
    keys = list(keys)
    short = {}
    for key in keys:
        words = key.split(".")
        tails = (".".join(words[-count:]) for count in range(1, len(words) + 1))
        short[key] = next((t for t in tails if not any(k != key and f".{k}".endswith(f".{t}") for k in keys)), key)
    return short


def short_value(value: Any, limit: int = 28) -> str:
    """A setting as a short label.

    >>> short_value(["q_proj", "v_proj"]), short_value(0.0001), short_value(None)
    ('q+v', '1e-4', 'none')
    >>> short_value("{text}\\nAnswer:")
    '{text}\\\\nAnswer:'
    """
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        if value == 0 or abs(value) >= 0.01 or math.isnan(value):
            return f"{value:g}"
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if isinstance(value, (list, tuple)):
        names = [str(v) for v in value]
        if all(isinstance(v, str) for v in value) and all(n.endswith("_proj") for n in names):
            names = [n.removesuffix("_proj") for n in names]
        text = "+".join(names)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    # One line of what a terminal shows: a line break would end the cell, and an escape code colour what follows.
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) <= limit:
        return text
    return "…" + text[1 - limit :] if text.startswith("/") else text[: limit - 1] + "…"  # of a path the end tells more


def identity(value: Any) -> str:
    """A setting's value as something hashable; 1 and 1.0 are the same value, 1 and True are not."""
    return json.dumps(float(value) if isinstance(value, int) and not isinstance(value, bool) else value, sort_keys=True)


def ordered_values(key: str, results: Sequence[MemberResult]) -> list[Any]:
    """The distinct values of a swept key: numbers by size, others by how many parameters they train (targets: few to many)."""
    values = {identity(r.settings[key]): r.settings[key] for r in results if key in r.settings}

    def order(name: str) -> tuple[int, float, str]:
        if isinstance(values[name], (int, float)):
            return (0, float(values[name]), "")
        sizes = [r.parameters for r in results if key in r.settings and identity(r.settings[key]) == name]
        return (1, sum(sizes) / len(sizes), name)

    return [values[name] for name in sorted(values, key=order)]
