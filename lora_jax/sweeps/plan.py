"""The plan: members cut into packs, each of which is one compiled program."""

from __future__ import annotations

import dataclasses
import itertools

from ..config.errors import InputError
from ..training.pack import static_key
from ..training.setup import setup_key
from .members import Member


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


def plan_part(members: list[Member], part: Part, *, largest: int) -> list[PackPlan]:
    """The packs of one part. Every part finds the same division by itself, and together they are all members.

    Whole packs are dealt where there are enough, so that a checkpoint of one is read by any division. Otherwise they are cut smaller.

    Args:
        members: of the whole sweep, in its order.
        part: which share.
        largest: most members in a pack.
    """
    packs = plan_packs(members, largest=largest)
    if len(packs) < part.count:
        packs = plan_packs(members, largest=min(largest, -(-len(members) // part.count)))
    shares: list[list[PackPlan]] = [[] for _ in range(part.count)]
    for pack in sorted(packs, key=lambda p: -len(p.members)):  # the largest first, each to whoever has least
        min(shares, key=lambda share: sum(len(p.members) for p in share)).append(pack)
    return shares[part.number - 1]
