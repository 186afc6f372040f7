"""Members brought into comparable rows: seeds averaged, intervals and paired differences worked out, the best one marked.

Tables for the terminal and for the report are two views of these rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from lora_jax.analysis.metrics import LEARNING_RATE, SEED, Metric, identity
from lora_jax.tracking.results import MemberResult, union


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds, with the half width of its 95 % interval (Student's t); None for a single seed."""

    mean: float
    half_width: float | None = None
    count: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value a seed; NaN where there is none.

        >>> Estimate.of([1.0, 2.0, 3.0]).mean
        2.0
        """
        if not values:
            return cls(math.nan, None, 0)
        count = len(values)
        if count < 2:
            return cls(float(values[0]), None, 1)
        half = stdtrit(count - 1, 0.975) * np.std(values, ddof=1) / math.sqrt(count)
        return cls(float(np.mean(values)), float(half), count)


@dataclass(frozen=True)
class Row:
    """One setting of everything but the seed.

    Attributes:
        settings: Swept dotted key -> value, without the seed.
        members: Its members, one a seed.
        final: The metric at the end, over those members that finished.
        best: The metric at its best step, over the same.
        difference: `final` minus the best row's, paired by seed; None for the best row itself and without common seeds.
        is_best: Whether it is the best of all rows in `final`.
        run: The run it comes from, when several are compared.
    """

    settings: dict[str, Any]
    members: tuple[MemberResult, ...]
    final: Estimate
    best: Estimate
    difference: Estimate | None = None
    is_best: bool = False
    run: str = ""

    @property
    def parameters(self) -> int:
        return self.members[0].parameters

    @property
    def unfinished(self) -> str:
        """`''` where every seed finished, else what happened: `diverged`, `1 of 3 diverged`, `stopped` (by halving)."""
        parts = []
        for status in ("diverged", "failed", "stopped"):
            count = sum(m.status == status for m in self.members)
            if count:
                parts.append(status if count == len(self.members) == 1 else f"{count} of {len(self.members)} {status}")
        return ", ".join(parts)


def rows_of(results: Sequence[MemberResult], metric: Metric, *, run: str = "") -> list[Row]:
    """One row for every setting but the seed, in the order of `results`; none is marked best yet."""
    groups: dict[str, list[MemberResult]] = {}
    for r in results:
        groups.setdefault(identity({k: identity(v) for k, v in r.settings.items() if k != SEED}), []).append(r)
    rows = []
    for members in groups.values():
        settings = {k: v for k, v in members[0].settings.items() if k != SEED}
        final, best = (Estimate.of(list(_by_seed(members, metric, which).values())) for which in ("final", "best"))
        rows.append(Row(settings, tuple(members), final, best, run=run))
    return rows


def mark_best(rows: Sequence[Row], metric: Metric) -> list[Row]:
    """Marks the best row, and gives the others their difference to it.

    A row of which some seed did not finish cannot be best: the mean over the seeds that survived flatters it.
    """
    able = [row for row in rows if not row.unfinished and not math.isnan(row.final.mean)]
    if not able:
        return list(rows)
    best = able[0]
    for row in able[1:]:
        if metric.better(row.final.mean, best.final.mean):
            best = row
    return [replace(row, is_best=True) if row is best else replace(row, difference=_difference(row, best, metric)) for row in rows]


def _by_seed(members: Sequence[MemberResult], metric: Metric, which: str = "final") -> dict[str, float]:
    """Seed -> value, of those that finished with a value. Without evaluations in between, the best is the final one."""
    found = {}
    for m in members:
        value = (getattr(m, which) or m.final).get(metric.name, math.nan)
        if m.status == "finished" and not math.isnan(value):
            found[identity(m.settings.get(SEED, 0))] = value
    return found


def _difference(row: Row, best: Row, metric: Metric) -> Estimate | None:
    # Members of one seed see the same data in the same order, so most of the noise cancels in their difference.
    mine, others = _by_seed(row.members, metric), _by_seed(best.members, metric)
    common = [seed for seed in mine if seed in others]
    return Estimate.of([mine[seed] - others[seed] for seed in common]) if common else None


def footnotes(results: Sequence[MemberResult], rows: Sequence[Row]) -> list[str]:
    """What a reader has to know before believing the comparison."""
    notes = []
    keys = union(r.settings for r in results)
    rates = {identity(r.settings[LEARNING_RATE]) for r in results if LEARNING_RATE in r.settings}
    if len(rows) > 1 and len(rates) < 2:
        notes.append("Compared at a single learning rate: other settings may be better at another one, so sweep it before concluding.")
    if any(row.final.half_width is not None for row in rows):
        notes.append(
            "± is the 95 % interval of the mean over seeds (Student's t). It does not hold the chance in which rows were held out. "
            "Differences are paired by seed."
        )
    elif len(rows) > 1:
        more = f"{SEED} was swept, but no setting finished with two seeds" if SEED in keys else f"One seed: sweep {SEED}"
        notes.append(f"{more} to see which differences are more than chance.")
    if any(row.unfinished for row in rows):
        notes.append(
            "Settings of which a seed diverged, failed or was stopped by halving cannot be best; figures are over the other seeds."
        )
    return notes
