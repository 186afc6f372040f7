"""Members brought into comparable rows: seeds averaged, intervals and paired differences computed, the best one chosen.

Tables for the terminal, the report and `summary.csv` are views of these rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

from ..errors import InputError
from ..packing.pack import Member
from ..sweeps.restore import named_member, run_members
from ..tasks.evaluators import Evaluator
from ..tracking.results import MemberResult, read_run, union
from .metrics import LEARNING_RATE, SEED, best_of, identity, primary_metric


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
        test: The metric on the test rows, over the same; of no value where there are none.
        train: The metric over the last training steps, of the same; of no value where training does not have it.
        difference: `test`, or where no row has that, `final`, minus that of the row it is compared with, paired by seed; None for that
            row itself, and where nothing can be paired: no common seed, or other data or steps.
        is_best: Whether it is the best of all rows in `selection`.
        is_reference: Whether it is a row that others are compared with.
        run: The run it comes from, when several are compared.
        data: Dotted key -> value of what decides its data and steps (`data_of`), as far as that is known to differ between rows.
    """

    settings: dict[str, Any]
    members: tuple[MemberResult, ...]
    final: Estimate
    best: Estimate
    difference: Estimate | None = None
    is_best: bool = False
    is_reference: bool = False
    run: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    test: Estimate = field(default_factory=lambda: Estimate.of([]))
    train: Estimate = field(default_factory=lambda: Estimate.of([]))

    @property
    def chosen_by(self) -> Literal["final", "best"]:
        """Which validation figure rows are chosen by: that of the adapters that were tested; `final` without a test."""
        return "best" if any(m.tested == "best" for m in self.members) else "final"

    @property
    def selection(self) -> Estimate:
        """The figure that rows are chosen by; never of test rows."""
        return self.best if self.chosen_by == "best" else self.final

    @property
    def parameters(self) -> int:
        return self.members[0].parameters

    @property
    def unfinished(self) -> str:
        """`''` where every seed finished, else what happened: `diverged`, `1 of 3 diverged`, `stopped (rung 2)` (by halving)."""
        return ended_early(self.members)

    @property
    def was_stopped(self) -> bool:
        """Whether halving stopped every seed that did not finish: nothing went wrong."""
        return {m.status for m in self.members} <= {"finished", "stopped"}

    def values(self, metric: Evaluator, which: str = "final") -> dict[str, float]:
        """Seed -> value, of those that finished with a value. Without evaluations in between, the best is the final one."""
        found = {}
        for m in self.members:
            own = getattr(m, which) or (m.final if which == "best" else {})
            value = own.get(metric.name, math.nan)
            if m.status == "finished" and not math.isnan(value):
                found[identity(m.settings.get(SEED, 0))] = value
        return found


def ended_early(members: Sequence[MemberResult]) -> str:
    """How those of some members ended that did not finish; `''` where all did.

    >>> ended_early([MemberResult("a", {}, 1, "stopped", {}, steps=8, rung=2)])
    'stopped (rung 2)'
    """
    counts = Counter(_ending(m) for m in members if m.status != "finished")
    one = len(members) == 1
    return ", ".join(ending if one else f"{counts[ending]} of {len(members)} {ending}" for ending in sorted(counts))


def _ending(member: MemberResult) -> str:
    if member.status != "stopped":
        return member.status
    return f"stopped (rung {member.rung})" if member.rung is not None else f"stopped (step {member.steps})"


_FIGURES = ("final", "best", "test", "train")


def rows_of(results: Sequence[MemberResult], metric: Evaluator, *, run: str = "", config: Mapping[str, Any] | None = None) -> list[Row]:
    """One row for every setting but the seed, in the order of `results`; none is marked best yet.

    Args:
        results: The members of one run.
        metric: What to compare by.
        run: The run's name, where several are compared.
        config: The run's config as dotted keys, where rows of several runs are compared.
    """
    groups: dict[str, list[MemberResult]] = {}
    for r in results:
        groups.setdefault(_key(r.settings), []).append(r)
    rows = []
    for members in groups.values():
        settings = {k: v for k, v in members[0].settings.items() if k != SEED}
        data = data_of({**(config or {}), **settings})
        row = Row(settings, tuple(members), Estimate.of([]), Estimate.of([]), run=run, data=data)
        rows.append(replace(row, **{which: Estimate.of(list(row.values(metric, which).values())) for which in _FIGURES}))
    return rows


def mark_best(rows: Sequence[Row], metric: Evaluator, reference: Mapping[str, Any] | None = None) -> list[Row]:
    """Marks the best row, and gives rows their difference to it, or to the reference: on the test rows, where any row has those.

    The best row is chosen without them.
    A row of which some seed did not finish cannot be best: the mean over the seeds that survived flatters it.

    Args:
        rows: From `rows_of`.
        metric: What to compare by.
        reference: Swept key -> value. A row is compared with the row that has these values and its own for all other keys (of its
            own run, where that has one). Where learning rates were chosen for each (`best_rates`), theirs may differ.
    """
    best = _best(rows, metric)
    if reference:
        others = [_counterpart(row, rows, reference) for row in rows]
    else:
        others = [best] * len(rows)
    which = "test" if tested(rows) else "final"
    marked = []
    for row, other in zip(rows, others, strict=True):
        difference = None if other is None or row is other else _difference(row, other, metric, which)
        marked.append(replace(row, is_best=row is best, is_reference=any(row is o for o in others), difference=difference))
    return marked


def best_rates(rows: Sequence[Row], metric: Evaluator) -> list[Row]:
    """Of the rows that differ in the learning rate alone, the best one: each setting as good as its tuning makes it.

    Those of which no seed finished are left out. In the order of `rows`.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.run, _key(row.settings, LEARNING_RATE)), []).append(row)
    chosen = [_best(group, metric) for group in groups.values()]
    return [row for row in chosen if row is not None]


def tuned_rows(rows: Sequence[Row], metric: Evaluator, reference: Mapping[str, Any] | None = None) -> list[Row]:
    """`best_rates`, the best one marked; empty where that is no choice: no setting has two rates, or there is one setting."""
    chosen = mark_best(best_rates(rows, metric), metric, reference)
    return chosen if len(rates_of(rows)) > 1 and 1 < len(chosen) < len(rows) else []


def rates_of(rows: Sequence[Row]) -> list[float]:
    """The learning rates of the rows, rising; empty where it was not swept."""
    return sorted({float(row.settings[LEARNING_RATE]) for row in rows if LEARNING_RATE in row.settings})


def _best(rows: Sequence[Row], metric: Evaluator, *, partial: bool = False) -> Row | None:
    """The row with the best mean; of equals the one that trains the fewest parameters, whatever order the rows are in."""
    whole = [row for row in rows if partial or not row.unfinished]
    whole.sort(key=lambda row: (row.parameters, row.run, _key(row.settings)))
    return best_of(whole, lambda row: row.selection.mean, metric)


def tested(rows: Sequence[Row]) -> bool:
    """Whether any of the rows has a score on test rows."""
    return any(row.test.count for row in rows)


def _key(settings: Mapping[str, Any], *without: str) -> str:
    return identity({k: identity(v) for k, v in settings.items() if k not in (SEED, *without)})


def _counterpart(row: Row, rows: Sequence[Row], reference: Mapping[str, Any]) -> Row | None:
    wanted = {**row.settings, **reference}
    for ignored in ((), () if LEARNING_RATE in reference else (LEARNING_RATE,)):
        found = [other for other in rows if _key(other.settings, *ignored) == _key(wanted, *ignored)]
        found.sort(key=lambda other: other.run != row.run)
        # With rates left out, the row must be the only one: else it is not known which of them is meant.
        if found and (not ignored or sum(other.run == found[0].run for other in found) == 1):
            return found[0]
    return None


def data_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a member's settings that decide what it trains on, in which order, and how long.

    Members of one seed are paired where these are equal: they saw the same batches, so most of the noise cancels in their difference.

    >>> data_of({"adapter.rank": 4, "training.steps": 100, "training.seed": 1})
    {'training.steps': 100}
    """
    known = {k: v for k, v in settings.items() if k.startswith("task.") or k in ("model.source", *_LENGTH_AND_ORDER)}
    return {k: v for k, v in known.items() if v is not None or k not in _NEWER}


# Runs of before these keys lack them.
_NEWER = ("task.test_source", "task.test_size")
_LENGTH_AND_ORDER = tuple(
    f"training.{key}" for key in ("steps", "epochs", "extend_steps", "batch_size", "accumulate", "batching", "data_seed")
)


def _difference(row: Row, other: Row, metric: Evaluator, which: str) -> Estimate | None:
    if _key(row.data) != _key(other.data):
        return None
    mine, others = row.values(metric, which), other.values(metric, which)
    common = [seed for seed in mine if seed in others]
    return Estimate.of([mine[seed] - others[seed] for seed in common]) if common else None


def footnotes(results: Sequence[MemberResult], rows: Sequence[Row]) -> list[str]:
    """What a reader has to know before believing the comparison."""
    notes = [_test_note(rows)] if tested(rows) else []
    judged = "test" if notes else "held-out"
    keys = union(r.settings for r in results)
    rates = {identity(r.settings[LEARNING_RATE]) for r in results if LEARNING_RATE in r.settings}
    if len(rows) > 1 and len(rates) < 2:
        notes.append("Compared at a single learning rate: other settings may be better at another one, so sweep it before concluding.")
    elif len(rows) > 1 and len({(row.run, _key(row.settings, LEARNING_RATE)) for row in rows}) == len(rows):
        notes.append("Each setting has a learning rate of its own, and no other: some may be better at another one.")
    if any(row.final.half_width is not None for row in rows):
        notes.append(
            "± is the 95 % interval of the mean over seeds (Student's t). It does not include the variance from the choice of "
            f"{judged} rows. Differences are paired by seed."
        )
    elif len(rows) > 1:
        more = f"{SEED} was swept, but no setting finished with two seeds" if SEED in keys else f"One seed: sweep {SEED}"
        notes.append(f"{more} to see which differences are more than chance. With a single seed there is no interval.")
    best = next((row for row in rows if row.is_best), None)
    if best is not None and (equal := sum(row.selection.mean == best.selection.mean and not row.unfinished for row in rows)) > 1:
        notes.append(f"{equal} settings are equally good; the one that trains the fewest parameters is marked as best.")
    if any(row.unfinished for row in rows):
        notes.append(
            "Settings with a seed that diverged, failed or was stopped by halving cannot be best; their figures are over the other seeds."
        )
    if any(row.is_reference for row in rows):
        unlike = {key for row in rows for key in row.data if len({identity(r.data.get(key)) for r in rows}) > 1}
        if unlike:
            notes.append(
                f"No difference is given between members that differ in {', '.join(sorted(unlike))}, because they cannot be paired."
            )
        elif any(row.final.count and not row.is_best and not row.is_reference and row.difference is None for row in rows):
            notes.append("Where no difference is given, the two settings have no seed in common.")
    return notes


def _test_note(rows: Sequence[Row]) -> str:
    """Which part of the data the figures are of."""
    which = {m.tested for row in rows for m in row.members} - {""}
    adapters = "the adapter of its best step" if which == {"best"} else "its last adapter" if which == {"final"} else "the adapter it saved"
    return (
        "Validation figures are of the held-out rows, by which steps, rates and the best setting (*) are chosen. Test figures are of rows "
        f"that nothing was chosen by: each member was scored on them once, with {adapters}. Differences are of test figures."
    )


def rate_notes(chosen: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """What a reader has to know of settings at their best learning rates.

    Args:
        chosen: From `best_rates`.
        rows: All of them.
    """
    notes = ["The rate was chosen by the same held-out rows, which flatters all settings a little."]
    if tested(rows):
        notes = ["The rate was chosen on the validation rows; the test rows had no part in it."]
    rates = rates_of(rows)
    ends = [f"the {word} swept ({end:g})" for word, end in (("smallest", rates[0]), ("largest", rates[-1]))]
    at = [sum(row.settings.get(LEARNING_RATE) == end for row in chosen) for end in (rates[0], rates[-1])]
    if any(at):
        where = " and ".join(f"{count} of {len(chosen)} at {end}" for count, end in zip(at, ends, strict=True) if count)
        notes.append(f"The best rate lies at an end of what was swept, {where}: a rate beyond it may be better yet.")
    return notes


def best_result(results: Sequence[MemberResult]) -> tuple[MemberResult, str]:
    """The best member, and why: of the setting that tables mark as best, the one whose figure is the median of its seeds.

    So the luckiest seed of a worse setting is not taken for better. Where no setting has finished with all its seeds, the best of what did.

    Raises:
        InputError: no member has finished, or they have no metric in common.
    """
    metric = primary_metric(results)
    rows = rows_of(results, metric)
    whole = [row for row in rows if not row.unfinished]
    row = _best(whole or rows, metric, partial=not whole)
    if row is None:
        row = next(row for row in rows if any(m.status == "finished" for m in row.members))
    finished = [m for m in row.members if m.status == "finished"]
    figure = lambda m: (getattr(m, row.chosen_by) or m.final).get(metric.name, math.nan)
    ranked = sorted(finished, key=lambda m: (metric.sign * figure(m), m.name))
    member = ranked[(len(ranked) - 1) // 2]
    equal = sum(other.selection.mean == row.selection.mean for other in (whole or rows))
    tie = f", with the fewest parameters of {equal} equal ones" if equal > 1 else ""
    value, by = metric.format(figure(member)), f"validation {metric.heading}" if tested(rows) else metric.heading
    if len(row.members) == 1:
        return member, f"best of {len(rows)} by {by}: {value}{tie}"
    mean = f"{metric.format(row.selection.mean)} over {len(finished)} seeds"
    return member, f"best setting of {len(rows)} by mean {by}: {mean}{tie}; its median member: {value}"


def choose_member(path: Path, name: str | None) -> tuple[Path, Member, str]:
    """The run directory, the member, and why this one was chosen (empty where there was no choice).

    Args:
        path: a run directory, or a member's folder in it.
        name: the member's; by default the run's best finished one.

    Raises:
        InputError: no such run or member, or none has finished.
    """
    run = path
    if not (path / "config.yaml").is_file() and (path.parent / "config.yaml").is_file():
        if name is not None:
            raise InputError(f"--member: {path} already names a member.")
        run, name = path.parent, path.name
    members = run_members(run)
    if name is not None:
        return run, named_member(members, name, str(path) if run != path else "--member"), ""
    if len(members) == 1:
        return run, members[0], ""
    best = best_of_run(run, members)
    if best is None:
        raise InputError(f"{run}: no member has finished yet; name one with --member to take what is saved of it.")
    return run, named_member(members, best[0], str(run)), best[1]


def best_of_run(run: Path, members: Sequence[Member]) -> tuple[str, str] | None:
    """The name of a run's best member (`best_result`), and why; None where none has finished."""
    known = {m.name for m in members}
    results = [r for r in read_run(run) if r.name in known]
    if not any(r.status == "finished" for r in results):
        return None
    best, reason = best_result(results)
    return best.name, reason
