"""What is left to train of a sweep whose run directory already holds some of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config.errors import InputError
from ..config.load import with_values
from ..config.schema import Config
from ..tracking import RunDirectory
from .members import Member
from .plan import PackPlan, plan_packs


def take_over_names(run: RunDirectory, config: Config, members: Sequence[Member]) -> None:
    """Gives members that have ended the names they have in `config` now.

    A name holds the swept keys, so one more of these gives the same member another: `rank=2` becomes `rank=2,seed=0`.

    Args:
        run: open for writing; equal to `config` but for the sweep.
        config: of the whole sweep.
        members: its members.
    """
    waiting = {m.name: m for m in members if m.name not in run.statuses}
    known = {m.name for m in members}
    for result in run.results() if run.statuses else []:
        if result.name in known or not waiting:
            continue
        try:
            same = with_values(config, result.settings)
        except InputError:
            continue  # it has keys or values that are not valid any more
        new = next((m for m in waiting.values() if m.config == same), None)
        if new is not None:
            run.rename(result, replace(result, name=new.name, settings=new.settings))
            del waiting[new.name]


def plan_remaining(members: list[Member], run: RunDirectory, *, largest: int) -> list[PackPlan]:
    """Packs of the members that have not ended.

    A pack that has a checkpoint goes on as it was, with members of it that ended meanwhile; all others are planned anew.

    Args:
        members: of the whole sweep, in its order.
        run: what there is.
        largest: most members in a pack.
    """
    by_name = {m.name: m for m in members}
    packs = []
    taken: set[str] = set()
    for names in run.started_packs():
        going_on = all(n in by_name for n in names) and len(names) <= largest and not taken & set(names)
        if going_on and any(n not in run.statuses for n in names):
            packs.append(PackPlan(tuple(by_name[n] for n in names)))
            taken |= set(names)
    rest = [m for m in members if m.name not in run.statuses and m.name not in taken]
    return packs + plan_packs(rest, largest=largest)
