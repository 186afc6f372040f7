"""Which figure members are compared by, and how figures and settings are written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, hint
from ..tracking.results import MemberResult, union

SEED = "training.seed"
LEARNING_RATE = "optimizer.learning_rate"


@dataclass(frozen=True)
class Metric:
    """A figure to compare by.

    Attributes:
        name: Its key in `MemberResult.final`.
        higher_is_better: The direction of the comparison.
    """

    name: str
    higher_is_better: bool

    def better(self, a: float, b: float) -> bool:
        """Whether `a` beats `b`; NaN beats nothing, and everything beats NaN."""
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return a > b if self.higher_is_better else a < b

    @property
    def heading(self) -> str:
        """Its name with its unit, for a column heading: figures are written without the unit."""
        return f"{self.name} (%)" if self.name in _SHARES else self.name

    def format(self, value: float, *, signed: bool = False) -> str:
        """The figure as text, with as many decimals for a small difference as for the values it is between.

        >>> Metric("accuracy", True).format(0.8731), Metric("perplexity", False).format(-0.3, signed=True)
        ('87.3', '-0.30')
        """
        if math.isnan(value):
            return "n/a"
        sign = "+" if signed else ""
        if self.name in _SHARES:
            return f"{100 * value:{sign}.1f}"
        decimals = 0 if abs(value) >= 1000 else 2 if self.name == "perplexity" else 4
        return f"{value:{sign},.{decimals}f}"


_SHARES = {"accuracy", "f1", "exact_match", "precision", "recall"}  # kept as 0 to 1, shown in percent
_KNOWN = {  # the first is preferred
    m.name: m for m in (Metric("f1", True), Metric("accuracy", True), Metric("perplexity", False), Metric("loss", False))
}


def find_metric(name: str, results: Sequence[MemberResult]) -> Metric:
    """The metric called `name`; one not known by name is taken as lower-is-better only if it is a loss.

    Raises:
        InputError: No result has it.
    """
    names = union(r.final for r in results)
    if name not in names:
        raise InputError(f"no member has a metric '{name}'. {hint(name, names)}")
    return _KNOWN.get(name, Metric(name, not any(word in name for word in ("loss", "perplexity", "error"))))


def primary_metric(results: Sequence[MemberResult]) -> Metric:
    """F1 if any member has it, else accuracy, perplexity, or loss: only one that all finished members have.

    Raises:
        InputError: There is none.
    """
    ended = [r for r in results if r.status == "finished"] or list(results)
    for metric in _KNOWN.values():
        if ended and all(metric.name in r.final for r in ended):
            return metric
    raise InputError(f"the members have none of these metrics in common: {', '.join(_KNOWN)}")


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
    """
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        if value == 0 or abs(value) >= 0.01:
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
    return text if len(text) <= limit else text[: limit - 1] + "…"


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
