"""Which metric members are compared by, how sure a difference is, and how settings are written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from scipy.special import stdtr, stdtrit

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


@dataclass(frozen=True)
class Paired:
    """A difference between two settings that were trained with the same seeds and scored on the same rows.

    Attributes:
        mean: over seeds and rows.
        of_seeds, of_rows: half widths of its 95 % intervals, where only the seeds, or only the rows, were other ones; None where there
            was one seed, or one batch of rows.
        half_width: of its 95 % interval, where both were.
        p: two-sided, of no difference, where both were; 1 where nothing differs.
    """

    mean: float
    of_seeds: float | None
    of_rows: float | None
    half_width: float
    p: float

    @classmethod
    def of(cls, differences: np.ndarray, sizes: np.ndarray) -> Paired:
        """From sums over batches of rows.

        The variance over seeds (paired t) and that over rows (batches of them, as clusters) are added, and their degrees of freedom
        combined by Satterthwaite's rule. What varies from seed to seed in each row is then counted twice: the intervals are a little wide.

        Args:
            differences: (seeds, batches), one setting's sum over a batch (of right predictions) minus the other's.
            sizes: (batches,), how many rows, or targets, each batch has.

        Raises:
            ValueError: there is one seed and one batch.
        """
        seeds, batches = differences.shape
        if seeds * batches < 2:
            raise ValueError("one seed and one batch of rows: no variance is known")
        total = sizes.sum()
        mean = differences.sum() / (seeds * total)
        parts: list[tuple[float, int]] = []  # variance of the mean, degrees of freedom
        if seeds > 1:
            parts.append((float(np.var(differences.sum(axis=1) / total, ddof=1)) / seeds, seeds - 1))
        if batches > 1:
            left = differences.mean(axis=0) - mean * sizes
            parts.append((float((left**2).sum()) * batches / (batches - 1) / total**2, batches - 1))
        halves = [float(stdtrit(freedom, 0.975)) * math.sqrt(variance) for variance, freedom in parts]
        of_seeds, of_rows = (halves.pop(0) if known else None for known in (seeds > 1, batches > 1))
        variance = sum(own for own, _ in parts)
        if variance == 0:
            return cls(float(mean), of_seeds, of_rows, 0.0, 1.0 if mean == 0 else 0.0)
        freedom = variance**2 / sum(own**2 / degrees for own, degrees in parts)
        error = math.sqrt(variance)
        half = float(stdtrit(freedom, 0.975)) * error
        return cls(float(mean), of_seeds, of_rows, half, float(2 * stdtr(freedom, -abs(mean) / error)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values of several comparisons, adjusted (Holm, 1979): those below 0.05 hold together, with at most 5 % chance of any error.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


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
