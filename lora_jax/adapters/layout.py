"""What a config asks of a model (`MemberSpec`), and the shapes that hold several members at once (`Structure`).

A member's own ranks, scales, layers and targets are numbers in arrays; a structure says only how large the arrays are. Several
members fit one structure by padding: unused columns of A and rows of B are zero, and so is all of a site that a member does not
target. Zero factors get zero gradients (dA = x^T dy B^T, dB = A^T x^T dy), and AdamW leaves what is zero with zero gradient at
zero, so padding needs no masks and is exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from flax import nnx

from ..config.doors import METHODS
from ..config.patterns import fullmatch
from ..config.schema import AdapterConfig
from ..errors import InputError
from .sites import Site, find_sites, modules_named, select


@dataclasses.dataclass(frozen=True)
class MemberSite:
    """One member at one site: rank and scale of each layer, (depth,) or (1,); rank 0 where the layer is not adapted."""

    ranks: np.ndarray
    scales: np.ndarray


@dataclasses.dataclass(frozen=True)
class MemberSpec:
    """What one config asks for, resolved against one model."""

    config: AdapterConfig
    sites: dict[str, MemberSite]

    @property
    def needs(self) -> dict[str, tuple[int, int]]:
        """Site name -> (lowest adapted layer, largest rank): what a structure must hold."""
        return {name: (int(np.flatnonzero(site.ranks)[0]), int(site.ranks.max())) for name, site in self.sites.items()}


@dataclasses.dataclass(frozen=True)
class SiteShape:
    """A site of a structure: its layers from `first` to the top of the stack get factors of the padded `rank`."""

    site: Site
    first: int
    rank: int

    @property
    def layers(self) -> int | None:
        """Layers that have factors, or None where the weight is not stacked."""
        return None if self.site.depth is None else self.site.depth - self.first


@dataclasses.dataclass(frozen=True)
class Structure:
    """The static shape of a pack: equal structures compile to equal programs.

    Attributes:
        sites: the union of the members' sites.
        dropout: whether any member has dropout.
        method, bias, modules_to_save: as in the config, the last by our own names; the same for all members, since they decide what
            trains.
    """

    sites: tuple[SiteShape, ...]
    dropout: bool
    method: str
    bias: str
    modules_to_save: tuple[str, ...]


def resolve(model: nnx.Module, config: AdapterConfig) -> MemberSpec:
    """Finds the sites a config adapts, with the rank and scale of each layer.

    The scale is alpha / rank, or alpha / sqrt(rank) with `rslora` (arXiv:2312.03732). Patterns follow PEFT: the first key that
    matches the end of a site's name decides.

    Raises:
        InputError: a target, layer or pattern matches nothing.
    """
    config = METHODS.get(config.method, "adapter.method").configured(config)
    if config.method != "lora":
        return MemberSpec(config, {})
    sites = {s.name: s for s in find_sites(model)}
    chosen = select(list(sites.values()), config.targets, config.exclude, config.layers)
    members = {}
    expert = next((name for name in chosen if sites[name].kind == "expert"), None)
    if config.dropout > 0 and expert is not None:
        raise InputError(f"adapter.dropout: there is none on experts ({expert}), here as in PEFT.")
    unused = {("rank_pattern", p) for p in config.rank_pattern} | {("alpha_pattern", p) for p in config.alpha_pattern}
    for name, wanted in chosen.items():
        ranks, scales = np.zeros(len(wanted), int), np.zeros(len(wanted), np.float32)
        for i in np.flatnonzero(wanted):
            rank_key = _first_match(config.rank_pattern, sites[name].names[i])
            alpha_key = _first_match(config.alpha_pattern, sites[name].names[i])
            unused -= {("rank_pattern", rank_key), ("alpha_pattern", alpha_key)}
            rank = config.rank_pattern.get(rank_key, config.rank)
            alpha = config.alpha_pattern.get(alpha_key, config.alpha)
            ranks[i] = rank
            scales[i] = alpha / np.sqrt(rank) if getattr(config, "rslora", False) else alpha / rank
        members[name] = MemberSite(ranks, scales)
    for key, pattern in sorted(unused):
        raise InputError(f"adapter.{key}: '{pattern}' matches no adapted module; those are {', '.join(list(chosen)[:12])}.")
    return MemberSpec(config, members)


def _first_match(patterns: dict[str, float] | dict[str, int], names: tuple[str, ...]) -> str:
    return next((p for p in patterns for n in names if fullmatch(rf"(.*\.)?({p})", n, "adapter.rank_pattern or adapter.alpha_pattern")), "")


def unite(model: nnx.Module, members: list[MemberSpec]) -> Structure:
    """The smallest structure that holds all members.

    Raises:
        ValueError: members differ in what is static (method, bias, modules_to_save), so that no structure holds them all.
    """
    statics = {(m.config.method, m.config.bias, tuple(m.config.modules_to_save)) for m in members}
    if len(statics) != 1:
        raise ValueError(f"members differ in method, bias or modules_to_save: {sorted(statics)}")
    method, bias, saved = statics.pop()
    own = tuple(dict.fromkeys(n for name in saved for n in modules_named(model, name) or (name,)))
    return Structure(hold(find_sites(model), [m.needs for m in members]), any(m.config.dropout > 0 for m in members), method, bias, own)


def hold(sites: list[Site], needs: Sequence[Mapping[str, tuple[int, int]]]) -> tuple[SiteShape, ...]:
    """The smallest shapes that hold several adapters at once.

    In one stack all sites start at the lowest layer any of them adapts: the layers below are one segment without adapters.

    Args:
        sites: the model's.
        needs: of each adapter, site name -> (lowest adapted layer, rank).
    """
    stacks = {s.name: s.stack for s in sites}
    lowest: dict[object, int] = {}
    for name, (first, _) in ((n, v) for need in needs for n, v in need.items()):
        lowest[stacks[name]] = min(lowest.get(stacks[name], first), first)
    shapes = []
    for site in sites:
        if ranks := [need[site.name][1] for need in needs if site.name in need]:
            shapes.append(SiteShape(site, lowest[site.stack] if site.stack is not None else 0, max(ranks)))
    return tuple(shapes)
