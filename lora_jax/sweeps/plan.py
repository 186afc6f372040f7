"""The plan: members cut into packs, each of which is one compiled program."""

from __future__ import annotations

import dataclasses
import itertools

from ..training.pack import static_key
from ..training.setup import setup_key
from .members import Member


@dataclasses.dataclass(frozen=True)
class PackPlan:
    """Members that share a model, data and everything static."""

    members: tuple[Member, ...]


def plan_packs(members: list[Member], *, largest: int) -> list[PackPlan]:
    """Cuts members into as few packs as possible.

    Members go together where nothing differs but what is traced data: ranks, alphas, targets, layers, dropout, optimizer numbers and
    seeds. Groups larger than `largest` are cut evenly.

    Args:
        members: in the sweep's order, which each pack keeps.
        largest: most members in a pack; 1 trains each alone.
    """
    groups: dict[object, list[Member]] = {}
    for member in members:
        groups.setdefault((setup_key(member.config), static_key(member.config)), []).append(member)
    packs = []
    for group in groups.values():
        count = -(-len(group) // largest)
        cuts = [round(i * len(group) / count) for i in range(count + 1)]
        packs += [PackPlan(tuple(group[a:b])) for a, b in itertools.pairwise(cuts)]
    return packs
