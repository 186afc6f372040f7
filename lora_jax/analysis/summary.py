"""`summary.csv`: a row a setting, with means and 95 % intervals over its seeds, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tracking.results import MemberResult, cell, union, write_table
from .compare import Estimate, best_rates, mark_best, rows_of
from .metrics import find_metric, primary_metric


def write_summary_csv(path: Path | str, results: Sequence[MemberResult], reference: Mapping[str, Any] | None = None) -> Path:
    """Writes a row for each setting of everything but the seed, in the order of `results`.

    Its columns: every swept key; `parameters`; `seeds`, of which so many `finished`; for each final metric `M` its mean over them,
    `M_low` and `M_high` (the ends of the mean's 95 % interval by Student's t), `M_difference` to the reference (paired by seed, with
    `M_difference_low` and `M_difference_high`) and `difference_seeds`, how many could be paired; `best`, `reference`, and
    `best_learning_rate`: whether it is the best of all, what others are compared with, and the best of those that differ from it in the
    learning rate alone. What is not known is an empty cell: so are the intervals of a single seed.

    Args:
        path: The file.
        results: The members of one run.
        reference: As in `mark_best`; the best setting by default.
    """
    metric = primary_metric(results)
    rows = mark_best(rows_of(results, metric), metric, reference)
    tuned = {id(row.members) for row in best_rates(rows, metric)}
    names = union(r.final for r in results)
    if not reference:  # all metrics are compared with one row: the best in the primary one
        reference = next((row.settings for row in rows if row.is_best), None)
    metrics = {name: find_metric(name, results) for name in names}
    each = {name: mark_best(rows_of(results, m), m, reference) for name, m in metrics.items()}
    keys = union(row.settings for row in rows)
    table: list[dict[str, Any]] = []
    for i, row in enumerate(rows):
        out: dict[str, Any] = {key: row.settings.get(key) for key in keys}
        out |= {"parameters": row.parameters, "seeds": len(row.members), "finished": sum(m.status == "finished" for m in row.members)}
        for name in names:
            own = each[name][i]
            out |= _ends(name, own.final) | _ends(f"{name}_difference", own.difference)
        out["difference_seeds"] = row.difference.count if row.difference else None
        out |= {"best": row.is_best, "reference": row.is_reference, "best_learning_rate": id(row.members) in tuned}
        table.append({key: cell(value) for key, value in out.items()})
    return write_table(path, table, empty="parameters")


def _ends(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    mean = None if estimate is None or math.isnan(estimate.mean) else estimate.mean
    half = None if estimate is None else estimate.half_width
    ends = {f"{name}_{end}": None if mean is None or half is None else mean + sign * half for end, sign in (("low", -1), ("high", 1))}
    return {name: mean, **ends}
