"""What is left to train of a sweep whose run directory already holds some of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config.load import with_values
from ..config.schema import Config
from ..errors import InputError
from ..packing.pack import Member
from ..packing.planner import PackPlan, Planner
from ..packing.runner import Pieces
from ..tracking import RunDirectory
from .plan_record import packs_of_names, planned_packs


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


def plan_remaining(members: list[Member], run: RunDirectory, planner: Planner) -> list[PackPlan]:
    """Packs of the members that have not ended.

    A pack that has a checkpoint goes on as it was, with members of it that ended meanwhile, or as the pieces it was cut into. One that
    was planned and has no checkpoint yet is as it was planned, without those that ended. Who is in neither is planned anew.

    Args:
        members: of the whole sweep, in its order.
        run: what there is.
        planner: cuts the rest.
    """
    by_name = {m.name: m for m in members}
    waiting = {name for name in by_name if name not in run.statuses}
    packs: list[list[str]] = []
    pieces = Pieces(run, members)
    started = [*pieces.uncut(), *run.started_packs()]
    for names in [*started, *planned_packs(run)]:
        whole = set(names) <= by_name.keys() and len(names) <= planner.largest and bool(waiting & set(names)) and not pieces.is_cut(names)
        if whole and names not in started:
            names = [n for n in names if n in waiting]
        if whole and not any(set(names) & set(pack) for pack in packs):
            packs.append(names)
    taken = {name for names in packs for name in names}
    rest = planner.packs([m for m in members if m.name in waiting and m.name not in taken])
    return packs_of_names(packs, by_name) + rest
