"""The best member of a run: what `export` and `generate` take where no member is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..packing.pack import Member
from ..sweeps.restore import named_member, run_members
from ..tasks.evaluators import Evaluator
from ..tracking.results import MemberResult, read_run
from .metrics import best_of, primary_metric


def best_result(results: Sequence[MemberResult]) -> tuple[MemberResult, Evaluator, float]:
    """The best of some finished members by their primary metric, at its best step; the metric, and the value. Of equals the first.

    Raises:
        InputError: they have no metric in common.
    """
    metric = primary_metric(results)

    def value(result: MemberResult) -> float:
        return (result.best or result.final).get(metric.name, math.nan)

    best = best_of(results, value, metric) or results[0]
    return best, metric, value(best)


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
            raise InputError(f"--member: {path} names a member already.")
        run, name = path.parent, path.name
    members = run_members(run)
    if name is not None:
        return run, named_member(members, name, str(path) if run != path else "--member"), ""
    if len(members) == 1:
        return run, members[0], ""
    known = {m.name for m in members}
    finished = [r for r in read_run(run) if r.name in known and r.status == "finished"]
    if not finished:
        raise InputError(f"{run}: no member has finished yet; name one with --member to take what is saved of it.")
    best, metric, value = best_result(finished)
    reason = f"best of {len(finished)} by {metric.heading}: {metric.format(value)}"
    return run, named_member(members, best.name, str(run)), reason
