"""The plan: members cut into packs, each of which is one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ..adapters.spec import resolve, unite
from ..config.errors import InputError
from ..config.schema import Config
from ..config.sizes import size_text
from ..training.forecast import forecast
from ..training.memory import memory_limit
from ..training.pack import Form, form_of, static_key
from ..training.pack_shapes import PackShapes
from ..training.setup import Setup, check_adapters, setup_key
from .members import Member
from .padding import Weights, cut_by_weight, cut_evenly

# A count from shapes (`training/forecast.py`) is near what is compiled, but not the same: with this much room nothing is compiled to see.
_AMPLE = 2


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Members that share a model, data and everything static."""

    members: tuple[Member, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A process's share of a sweep: part `number` (from 1) of `count`; written `2/4`."""

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


def plan_packs(members: list[Member], *, largest: int) -> list[PackPlan]:
    """Cuts members into as few packs as possible, by their configs alone: nothing is loaded, padding and memory are not looked at.

    Members go together where nothing differs but what is traced data: ranks, alphas, targets, layers, dropout, optimizer numbers and
    seeds. Groups larger than `largest` are cut evenly.

    Args:
        members: in the sweep's order, which each pack keeps.
        largest: most members in a pack; 1 trains each alone.
    """
    return [PackPlan(tuple(group[i] for i in cut)) for group in alike(members) for cut in cut_evenly(len(group), largest)]


def alike(members: Sequence[Member]) -> list[list[Member]]:
    """Members by what must be equal in a pack: model, task, training, mesh, and how the adapters are made."""
    groups: dict[object, list[Member]] = {}
    for member in members:
        groups.setdefault((setup_key(member.config), static_key(member.config)), []).append(member)
    return list(groups.values())


class Planner:
    """Cuts members into packs by what they cost and what fits in memory.

    The same members are always cut alike: by counts and by what compiled programs say of themselves, never by a clock.

    Args:
        config: of the sweep.
        prepare: makes set-ups.
        largest: most members in a pack, whatever the memory.
        say: is told how large packs may be, where memory limits them.
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

    def _cut(self, group: list[Member], largest: int) -> list[PackPlan]:
        configs = [m.config for m in group]
        setup = self._prepare(configs[0])
        check_adapters(setup, configs)
        weights = Weights.of(setup, configs) if largest > 1 else None
        most = min(largest, len(group))
        if self._limit is not None and most > 1:
            most = self._fitting(setup, configs, weights, most)
        if weights is None:
            cuts = cut_evenly(len(group), most)
        else:
            cuts = cut_by_weight(weights, most, most_padding=self._most_padding, steps=setup.steps)
        return self._by_form(setup, [PackPlan(tuple(group[i] for i in cut)) for cut in cuts])

    def _by_form(self, setup: Setup, packs: list[PackPlan]) -> list[PackPlan]:
        """Packs of one form one after the other, so that they share their programs; forms, and the packs of one, in the order they had."""
        forms: dict[Form, list[PackPlan]] = {}
        for pack in packs:
            configs = [m.config for m in pack.members]
            structure = unite(setup.model, [resolve(setup.model, c.adapter) for c in configs])
            forms.setdefault(form_of(configs, structure), []).append(pack)
        return [pack for alike in forms.values() for pack in alike]

    def _fitting(self, setup: Setup, configs: list[Config], weights: Weights | None, most: int) -> int:
        """How many members a pack may have for its memory; compiled only where a count from shapes alone does not leave ample room."""
        assert self._limit is not None
        heaviest = configs[:most] if weights is None else [configs[i] for i in np.argsort(weights.alone, kind="stable")[-most:]]
        if _AMPLE * forecast(heaviest, len(jax.devices())).total <= self._limit:
            return most
        line = PackShapes(setup, configs).memory_line(most)
        fitting = line.fitting(self._limit, most)
        if fitting < most:
            one, two = line.at(1).total, line.at(2).total
            self._say(
                f"memory: {size_text(one)} for one member, {size_text(two - one)} for each more, limit {size_text(self._limit)}: "
                + (f"at most {fitting} in a pack" if fitting else "one is too much already; trying one at a time")
            )
        return max(1, fitting)


def plan_part(members: list[Member], part: Part, *, largest: int, cut: Callable[..., list[PackPlan]] = plan_packs) -> list[PackPlan]:
    """The packs of one part. Every part finds the same division by itself, and together they are all members.

    Whole packs are dealt where there are enough, so that a checkpoint of one is read by any division. Otherwise they are cut smaller.

    Args:
        members: of the whole sweep, in its order.
        part: which share.
        largest: most members in a pack.
        cut: `plan_packs`, or a planner's `packs`.
    """
    packs = cut(members, largest=largest)
    if len(packs) < part.count:
        packs = cut(members, largest=min(largest, -(-len(members) // part.count)))
    shares: list[list[PackPlan]] = [[] for _ in range(part.count)]
    for pack in sorted(packs, key=lambda p: -len(p.members)):  # the largest first, each to whoever has least
        min(shares, key=lambda share: sum(len(p.members) for p in share)).append(pack)
    return shares[part.number - 1]
