"""`plan.json`: the packs of a run, so that its members keep them when it goes on, here or on another machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import InputError
from ..packing.pack import Member
from ..packing.planner import PackPlan
from ..parallel.processes import is_writer, writer_first
from ..tracking import RunDirectory, read_json, write_json

_FILE = "plan.json"


def planned_packs(run: RunDirectory, stage: int = 0) -> list[list[str]]:
    """The names of each pack's members, as they were planned; none where nothing was, or the file is damaged.

    Args:
        run: where.
        stage: of successive halving; 0 is the first, and all there is without.
    """
    path = run.path / _FILE
    try:
        stages = read_json(path)["stages"] if path.exists() else []
        packs = stages[stage] if stage < len(stages) else []
        return [[str(name) for name in pack] for pack in packs]
    except (InputError, KeyError, TypeError):
        return []


def keep_plan(run: RunDirectory, packs: Sequence[PackPlan], stage: int = 0) -> list[PackPlan]:
    """Writes packs down, beside those that were planned before and share no member with them; returns them.

    Of several processes the first writes, and what it wrote is what all get: a limit of memory may have looked different to each.
    """
    by_name = {m.name: m for p in packs for m in p.members}

    def write() -> None:
        if is_writer():
            before = [planned_packs(run, i) for i in range(stage + 1)]
            kept = [pack for pack in before[stage] if not by_name.keys() & set(pack)]
            write_json(run.path / _FILE, {"stages": [*before[:stage], kept + [[m.name for m in p.members] for p in packs]]})

    writer_first(write)
    return packs_of_names((pack for pack in planned_packs(run, stage) if by_name.keys() >= set(pack)), by_name)


def packs_of_names(packs: Iterable[Sequence[str]], by_name: dict[str, Member]) -> list[PackPlan]:
    """Packs of members by their names."""
    return [PackPlan(tuple(by_name[name] for name in names)) for names in packs]
