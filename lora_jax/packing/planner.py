"""The plan: members cut into packs, each of which is one compiled program, by what they cost and what fits in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..config.schema import Config
from ..config.types import size_text
from ..errors import InputError
from ..parallel.processes import is_writer, writer_first
from ..parallel.program import memory_limit
from ..tracking import RunDirectory, RunState
from ..training.setup import Setup, check_adapters, setup_key
from .cost import PackShapes
from .pack import Member, ProgramKey, program_key, static_key
from .padding import Weights, cut_by_weight, cut_evenly


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Members that share a model, data and everything static."""

    members: tuple[Member, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """The members of a sweep that one process trains: part `number` (from 1) of `count`; written `2/4`."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Reads `2/4`.

        Raises:
            InputError: it is not of that form.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise InputError(f"--part: '{text}' is not NUMBER/COUNT, such as 1/4 to 4/4.")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def alike(members: Sequence[Member]) -> list[list[Member]]:
    """Groups of members that could share a pack.

    Everything but traced data is equal in them: ranks, alphas, targets, layers, dropout, optimizer numbers and seeds may differ.
    """
    groups: dict[object, list[Member]] = {}
    for member in members:
        groups.setdefault((setup_key(member.config), static_key(member.config)), []).append(member)
    return list(groups.values())


class Planner:
    """Cuts members into packs.

    The same members are always cut alike: by counts and by the memory of compiled programs, never by a clock.

    Args:
        config: of the sweep.
        prepare: makes setups.
        largest: most members in a pack, whatever the memory.
        say: prints how large packs may be, where memory limits them.
    """

    def __init__(self, config: Config, prepare: Callable[[Config], Setup], *, largest: int, say: Callable[[str], None] = lambda text: None):
        self.largest = largest
        self._prepare, self._say = prepare, say
        self._limit = memory_limit(config)
        self._most_padding = config.sweep.max_padding if config.sweep is not None else 0.0
        self._before: dict[tuple[int, tuple[str, ...]], list[PackPlan]] = {}

    def packs(self, members: Sequence[Member], *, largest: int | None = None) -> list[PackPlan]:
        """The packs, whose members are known to fit the model.

        Args:
            members: in the sweep's order, which each pack keeps.
            largest: most members in a pack, where that is less than the planner's own.

        Raises:
            InputError: an adapter does not fit its model, or the model or the data will not do.
        """
        most = min(self.largest, largest or self.largest)
        key = (most, tuple(m.name for m in members))
        if key not in self._before:
            # The first last, so that its set-up is at hand for training.
            found = [self._cut(group, most) for group in reversed(alike(members))]
            self._before[key] = [pack for packs in reversed(found) for pack in packs]
        return self._before[key]

    def part(self, members: Sequence[Member], part: Part) -> list[PackPlan]:
        """The packs of one part of a sweep. Every part finds the same division by itself, and together they are all members.

        Whole packs are assigned where there are enough of them, so that any division can resume their checkpoints. Otherwise packs are
        cut smaller. The largest goes first, each to the part that has fewest members.
        """
        packs = self.packs(members)
        if len(packs) < part.count:
            packs = self.packs(members, largest=-(-len(members) // part.count))
        parts: list[list[PackPlan]] = [[] for _ in range(part.count)]
        for pack in sorted(packs, key=lambda p: -len(p.members)):
            min(parts, key=lambda own: sum(len(p.members) for p in own)).append(pack)
        return parts[part.number - 1]

    def _cut(self, group: list[Member], largest: int) -> list[PackPlan]:
        configs = [m.config for m in group]
        setup = self._prepare(configs[0])
        check_adapters(setup, configs)
        weights = Weights.of(setup, configs) if largest > 1 else None
        most = min(largest, len(group))
        if self._limit is not None and most > 1:
            most = self._fitting(setup, configs, most)
        if weights is None:
            cuts = cut_evenly(len(group), most)
        else:
            cuts = cut_by_weight(weights, most, most_padding=self._most_padding, steps=setup.steps)
        return self._by_program(setup, [PackPlan(tuple(group[i] for i in cut)) for cut in cuts])

    def _by_program(self, setup: Setup, packs: list[PackPlan]) -> list[PackPlan]:
        """Packs of one program key after one another, so that they share their programs; otherwise in the order they had."""
        found: dict[ProgramKey, list[PackPlan]] = {}
        for pack in packs:
            configs = [m.config for m in pack.members]
            found.setdefault(program_key(configs, setup.layout(configs)), []).append(pack)
        return [pack for alike in found.values() for pack in alike]

    def _fitting(self, setup: Setup, configs: list[Config], most: int) -> int:
        """How many members a pack may have for its memory. Where an upper bound fits, nothing is compiled to find out."""
        assert self._limit is not None
        shapes = PackShapes(setup, configs)
        if shapes.upper_bound(most) <= self._limit:
            return most
        line = shapes.memory_line(most)
        fitting = line.fitting(self._limit, most)
        if fitting < most:
            one, two = line.at(1).total, line.at(2).total
            self._say(
                f"memory: {size_text(one)} for one member, {size_text(two - one)} for each more, limit {size_text(self._limit)}: "
                + (f"at most {fitting} in a pack" if fitting else "one is too much already; trying one at a time")
            )
        return max(1, fitting)


def planned(state: RunState, stage: int = 0) -> list[list[str]]:
    """The names of each planned pack's members; none where nothing was planned.

    Args:
        state: of the run.
        stage: of successive halving; 0 is the first, and the only one without halving.
    """
    return state.plan[stage] if stage < len(state.plan) else []


def keep_plan(run: RunDirectory, packs: Sequence[PackPlan], stage: int = 0) -> list[PackPlan]:
    """Writes packs into the run's state, beside those planned before that share no member with them; returns them.

    Of several processes the first writes, and all take what it wrote: each may have seen another limit of memory.
    """
    by_name = {m.name: m for p in packs for m in p.members}

    def change(state: RunState) -> None:
        kept = [pack for pack in planned(state, stage) if not by_name.keys() & set(pack)]
        state.plan = [*(planned(state, i) for i in range(stage)), kept + [[m.name for m in p.members] for p in packs]]

    writer_first(lambda: run.update_state(change) if is_writer() else None)
    return packs_of_names((pack for pack in planned(run.state(), stage) if by_name.keys() >= set(pack)), by_name)


def packs_of_names(packs: Iterable[Sequence[str]], by_name: Mapping[str, Member]) -> list[PackPlan]:
    """Packs of members by their names."""
    return [PackPlan(tuple(by_name[name] for name in names)) for names in packs]
