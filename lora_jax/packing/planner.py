"""The plan: members divided into packs, each of which is one compiled program, by what they cost and what fits in memory.

In a pack, every member computes at the sites of all members, with the largest rank at each site, and differentiates down to the lowest
layer that any of them adapts. Compared with the base, additional ranks are cheap and additional layers are not. A site has a fixed cost
besides its ranks, because its inputs and outputs are read and written whatever the rank. All costs are in FLOPs of the whole step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np

from ..adapters.methods.base import Method
from ..adapters.sites import Site, find_sites
from ..config.schema import Config
from ..config.types import size_text
from ..errors import InputError
from ..parallel.processes import is_writer, writer_first
from ..parallel.program import memory_limit
from ..tracking import RunDirectory, RunState
from ..training.setup import Setup, check_adapters, setup_key
from .cost import PackShapes
from .pack import Member, ProgramKey, program_key, static_key

# FLOPs that a device could do while one more program is compiled (about 5 s on two CPU cores, 15 s on an accelerator); padding is
# weighed against them. The numbers are fixed, so that the same members get the same packs on every machine.
_COMPILING = {"cpu": 5e11}
_COMPILING_ELSEWHERE = 1e15

# The fixed cost of a site, in ranks of LoRA: its inputs and outputs are read and written about six times in a step, and two CPU cores
# could do 12 FLOPs per byte meanwhile. Measured on MiniLM's steps with and without additional sites, at ranks 8 and 32: 25 to 68.
_SITE_RANKS = 40.0


@dataclasses.dataclass(frozen=True)
class Weights:
    """The costs of members in one optimizer step, alone or in a pack, in FLOPs or the time for as many.

    Attributes:
        base: (depth + 1,) cost of a member apart from its factors, by its lowest adapted layer (`depth` if it adapts none).
        sites: (sites,) cost of one rank of a site, in one layer.
        stacked: (sites,) whether a site is stacked over layers.
        ranks: (members, sites), 0 where a member does not adapt a site.
        firsts: (members,) lowest adapted layer; `depth` if there is none.
        site: (sites,) fixed cost of a site, in one layer.
    """

    base: np.ndarray
    sites: np.ndarray
    stacked: np.ndarray
    ranks: np.ndarray
    firsts: np.ndarray
    site: np.ndarray | float = 0.0

    @classmethod
    def of(cls, setup: Setup, configs: Sequence[Config]) -> Weights | None:
        """The costs of members with one setup and equal static parts; None if all adapt the same weights, so that all cost the same."""
        members = [setup.spec(c) for c in configs]
        needs = [m.needs for m in members]
        if all(n == needs[0] for n in needs):
            return None
        sites = [s for s in find_sites(setup.model) if any(s.name in n for n in needs)]
        depths = {s.depth for s in sites if s.depth is not None}
        depth = max(depths, default=1)
        ranks = np.array([[max(n[s.name][1]) if s.name in n else 0 for s in sites] for n in needs])
        below = np.array([s.stack is None and s.kind == "embedding" for s in sites])  # its gradient comes down through all layers
        lowest = [[n[s.name][0] if s.stack is not None else depth for s in sites if s.name in n] for n in needs]
        firsts = np.where((ranks[:, below] > 0).any(1), 0, np.array([min(row, default=depth) for row in lowest]))
        # Backward costs twice as much as forward.
        times, method = 3.0 * setup.plan.batch(0)["segment_ids"].size, members[0].method
        lines = np.array([_cost_line(method, s, own[own > 0]) for s, own in zip(sites, ranks.T, strict=True)])
        slopes, fixed = times * lines[:, 0], times * lines[:, 1]
        stacked = np.array([s.stack is not None for s in sites])
        free = cls(np.zeros(depth + 1), slopes, stacked, ranks, firsts, fixed)
        # All layers cost the same except the top one, which is computed only at labelled positions: three points determine the line.
        distinct = np.unique(firsts)
        traced: dict[int, float] = {}
        for first in np.unique([distinct[0], *distinct[-2:]]):
            one = int(np.flatnonzero(firsts == first)[0])
            traced[int(first)] = PackShapes(setup, [configs[one]]).member_flops - float(free.alone[one])
        base = np.interp(np.arange(depth + 1), list(traced), list(traced.values()))
        beside = times * _SITE_RANKS * 2 * np.array([s.inputs + s.outputs for s in sites])
        return dataclasses.replace(free, base=base, site=fixed + beside)

    @property
    def alone(self) -> np.ndarray:
        """(members,): cost of each member alone."""
        return self._cost(self.ranks, self.firsts)

    def packed(self, members: np.ndarray) -> np.ndarray:
        """For each prefix of a list of members, what one member costs in a pack of these: (len(members),)."""
        return self._cost(np.maximum.accumulate(self.ranks[members]), np.minimum.accumulate(self.firsts[members]))

    def padding(self, members: Sequence[int]) -> float:
        """The fraction of a pack's time that is padding."""
        return 1 - float(self.alone[list(members)].sum() / (len(members) * self.packed(np.array(members))[-1]))

    def _cost(self, ranks: np.ndarray, firsts: np.ndarray) -> np.ndarray:
        layers = np.where(self.stacked, (len(self.base) - 1 - firsts)[:, None], 1)
        return self.base[firsts] + (np.where(ranks > 0, ranks * self.sites + self.site, 0) * layers).sum(1)

    def orders(self) -> list[np.ndarray]:
        """Orders in which similar members are neighbours: by lowest layer and cost, and by their sites, after or before the layer."""
        alone, firsts = self.alone, -self.firsts
        _, found = np.unique(self.ranks > 0, axis=0, return_inverse=True)
        sites = found.reshape(-1)  # the set of sites that a member has; sets of similar cost are neighbours
        cost = (np.bincount(sites, alone) / np.bincount(sites))[sites]
        return [np.lexsort(keys) for keys in ((alone, firsts), (alone, sites, cost, firsts), (alone, firsts, sites, cost))]


def _cost_line(method: Method, site: Site, ranks: np.ndarray) -> tuple[float, float]:
    """What a method costs at a site (`Method.cost`) as a line over these ranks: for each further rank, and whatever the rank."""
    low, high = int(ranks.min()), int(ranks.max())
    high = high if high > low else 2 * low
    slope = (method.cost(site, high) - method.cost(site, low)) / (high - low)
    return slope, method.cost(site, low) - slope * low


def cut_evenly(count: int, largest: int) -> list[list[int]]:
    """0 to `count` - 1 in as few runs of at most `largest` as possible, of nearly equal lengths.

    >>> cut_evenly(5, 3)
    [[0, 1], [2, 3, 4]]
    """
    packs = -(-count // largest)
    cuts = [round(i * count / packs) for i in range(packs + 1)]
    return [list(range(a, b)) for a, b in itertools.pairwise(cuts)]


def cut_by_weight(weights: Weights, largest: int, *, most_padding: float, steps: int, platform: str | None = None) -> list[list[int]]:
    """The fewest packs whose padding stays below a fraction of each pack's time; of these, the ones with the fewest FLOPs.

    Members are sorted by their lowest layer, the highest first, and by cost, then cut into runs. If sorting by adapted sites too gives
    less cost, that is used. Equal members keep their order.

    Args:
        weights: the members' costs.
        largest: the largest number of members in a pack.
        most_padding: the largest fraction of padding in a pack's time over all steps, including compiling one program.
        steps: optimizer steps.
        platform: of the devices; by default JAX's.

    Returns:
        indices of the members, by pack; packs, and members within them, keep their order.
    """
    compiling = _COMPILING.get(platform or jax.default_backend(), _COMPILING_ELSEWHERE)
    found = [_cut_order(weights, order, largest, most_padding, steps, compiling) for order in weights.orders()]
    return min(found, key=lambda one: one[0])[1]


def _cut_order(
    weights: Weights, order: np.ndarray, largest: int, most_padding: float, steps: int, compiling: float
) -> tuple[tuple[int, float], list[list[int]]]:
    """The best cut of members in a given order: (number of packs, FLOPs), and the packs."""
    before = np.concatenate([[0.0], np.cumsum(weights.alone[order])])
    # best[j]: of the first j members, (packs, FLOPs, sum of squared sizes), and where the last pack begins.
    best: list[tuple[int, float, int]] = [(0, 0.0, 0)]
    begins = [0]
    for stop in range(1, len(order) + 1):
        start = max(0, stop - largest)
        each = weights.packed(order[start:stop][::-1])  # for the packs that end here, the smallest first
        sizes = np.arange(1, stop - start + 1)
        totals = sizes * each
        waste = totals - (before[stop] - before[stop - sizes])
        allowed = steps * waste <= most_padding * (steps * totals + compiling) + 1e-6 * steps * totals
        allowed[0] = True
        found = min(
            (best[stop - k][0] + 1, best[stop - k][1] + float(totals[k - 1]), best[stop - k][2] + k * k, stop - k)
            for k in sizes[allowed].tolist()
        )
        best.append(found[:3])
        begins.append(found[3])
    packs, stop = [], len(order)
    while stop:
        packs.append(sorted(int(i) for i in order[begins[stop] : stop]))
        stop = begins[stop]
    return best[-1][:2], sorted(packs)


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """The members of one pack: they share model, data and everything static."""

    members: tuple[Member, ...]


_MOST_PARTS = 100_000  # assigning members to parts takes time for each part, so a mistyped number would hang


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
        if int(count) > _MOST_PARTS:
            raise InputError(f"--part: at most {_MOST_PARTS:,} parts, got {int(count):,}.")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def alike(members: Sequence[Member]) -> list[list[Member]]:
    """Groups of members that could share a pack.

    Members of a group differ only in traced data: ranks, alphas, targets, layers, dropout, the optimizer's numbers and seeds.
    """
    groups: dict[object, list[Member]] = {}
    for member in members:
        groups.setdefault((setup_key(member.config), static_key(member.config)), []).append(member)
    return list(groups.values())


class Planner:
    """Assigns members to packs.

    The same members always get the same packs: costs are counted, and memory is read from compiled programs; nothing is timed.

    Args:
        config: of the sweep.
        prepare: makes setups.
        largest: the largest number of members in a pack, whatever the memory.
        say: prints how large packs may be, if memory limits them.
    """

    def __init__(self, config: Config, prepare: Callable[[Config], Setup], *, largest: int, say: Callable[[str], None] = lambda text: None):
        self.largest = largest
        self._prepare, self._say = prepare, say
        self._limit = memory_limit(config)
        self._most_padding = config.sweep.max_padding if config.sweep is not None else 0.0
        self._before: dict[tuple[int, tuple[str, ...]], list[PackPlan]] = {}

    def packs(self, members: Sequence[Member], *, largest: int | None = None) -> list[PackPlan]:
        """The packs, after checking that their adapters fit the model.

        Args:
            members: in the sweep's order, which each pack keeps.
            largest: the largest number of members in a pack, if less than the planner's own.

        Raises:
            InputError: an adapter does not fit its model, or the model or the data is not valid.
        """
        most = min(self.largest, largest or self.largest)
        key = (most, tuple(m.name for m in members))
        if key not in self._before:
            # The first group last, so that its setup is still loaded for training.
            found = [self._cut(group, most) for group in reversed(alike(members))]
            self._before[key] = [pack for packs in reversed(found) for pack in packs]
        return self._before[key]

    def part(self, members: Sequence[Member], part: Part) -> list[PackPlan]:
        """The packs of one part of a sweep. Every process computes the same division, and the parts together are all members.

        If there are at least as many packs as parts, whole packs are assigned, so that any other division can resume their checkpoints.
        Otherwise packs are made smaller. The largest pack is assigned first, each to the part that has the fewest members.
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
        """Packs with equal program keys one after the other, so that they share their programs; otherwise the order is kept."""
        found: dict[ProgramKey, list[PackPlan]] = {}
        for pack in packs:
            configs = [m.config for m in pack.members]
            found.setdefault(program_key(configs, setup.layout(configs)), []).append(pack)
        return [pack for alike in found.values() for pack in alike]

    def _fitting(self, setup: Setup, configs: list[Config], most: int) -> int:
        """How many members of a pack fit into memory. If an upper bound fits, nothing is compiled."""
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
                + (f"at most {fitting} in a pack" if fitting else "even one exceeds it; trying one at a time")
            )
        return max(1, fitting)


def planned(state: RunState, stage: int = 0) -> list[list[str]]:
    """The member names of each planned pack; empty if nothing was planned.

    Args:
        state: of the run.
        stage: of successive halving; 0 is the first, and the only one without halving.
    """
    return state.plan[stage] if stage < len(state.plan) else []


def keep_plan(run: RunDirectory, packs: Sequence[PackPlan], stage: int = 0) -> list[PackPlan]:
    """Adds packs to the plan in the run's state, in place of earlier ones that share members with them; returns them.

    If there are several processes, the first one writes and all use its plan, because their memory limits may differ.
    """
    by_name = {m.name: m for p in packs for m in p.members}

    def change(state: RunState) -> None:
        kept = [pack for pack in planned(state, stage) if not by_name.keys() & set(pack)]
        state.plan = [*(planned(state, i) for i in range(stage)), kept + [[m.name for m in p.members] for p in packs]]

    writer_first(lambda: run.update_state(change) if is_writer() else None)
    return packs_of_names((pack for pack in planned(run.state(), stage) if by_name.keys() >= set(pack)), by_name)


def packs_of_names(packs: Iterable[Sequence[str]], by_name: Mapping[str, Member]) -> list[PackPlan]:
    """Packs of members, given by their names."""
    return [PackPlan(tuple(by_name[name] for name in names)) for names in packs]
