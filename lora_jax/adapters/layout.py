"""What a config adapts in a model (`ResolvedAdapter`), and the padded shapes that hold several members at once (`Layout`).

A member's own ranks, scales, layers and targets are numbers in arrays; a layout says only how large the arrays are. Members fit one
layout by padding: along the rank, and in the layers and sites that a member does not adapt. Padding has its parameter's fill value. In
LoRA that is 0, zero factors get zero gradients (dA = x^T dy B^T, dB = A^T x^T dy), and AdamW leaves what is zero with zero gradient at
zero: its padding needs no masks and is exact. Where a method cannot promise that, updates of the padding are masked (`update_mask`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flax import nnx

from ..config.patterns import fullmatch
from ..config.schema import AdapterConfig
from ..errors import InputError, warn
from .labels import Table
from .methods.base import Method, method_of
from .parameters import Parameter, largest, shared_name
from .sites import Site, find_sites, modules_named, passed_over
from .targets import select


@dataclasses.dataclass(frozen=True)
class ResolvedSite:
    """One member at one site.

    Attributes:
        ranks: of each layer, (depth,) or (1,) int; 0 where the layer is not adapted.
        settings: the method's numbers of each layer, of the same shape, float32; 0 likewise.
    """

    ranks: np.ndarray
    settings: dict[str, np.ndarray]


# Site name -> (lowest adapted layer, the extent of its ranks).
Needs = dict[str, tuple[int, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class ResolvedAdapter:
    """What one config asks for, resolved against one model.

    Attributes:
        config: as the method's own section.
        sites: site name -> the member there.
        method: the config's.
    """

    config: AdapterConfig
    sites: dict[str, ResolvedSite]

    @property
    def method(self) -> Method:
        return method_of(self.config)

    @property
    def needs(self) -> Needs:
        """What a layout must hold."""
        found = {}
        for name, site in self.sites.items():
            ranks = tuple(sorted({int(rank) for rank in site.ranks if rank}))
            found[name] = (int(np.flatnonzero(site.ranks)[0]), self.method.extent(ranks))
        return found


@dataclasses.dataclass(frozen=True)
class SiteLayout:
    """A site of a layout: its layers from `first` to the top of the stack have arrays that hold the ranks of `extent`."""

    site: Site
    first: int
    extent: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The largest."""
        return max(self.extent)

    @property
    def layers(self) -> int | None:
        """Layers that have arrays, or None where the weight is not stacked."""
        return None if self.site.depth is None else self.site.depth - self.first


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static shape of a pack: equal layouts compile to equal programs.

    Attributes:
        sites: the union of the members' sites.
        dropout: whether any member has dropout.
        method, bias, modules_to_save: as in the config, the last by our own names; the same for all members, since they decide what
            trains.
    """

    sites: tuple[SiteLayout, ...]
    dropout: bool
    method: Method
    bias: str
    modules_to_save: tuple[str, ...]

    def shared(self) -> dict[str, Parameter]:
        """Name -> array of scope `adapter`, as large as the largest that a site says."""
        found: dict[str, Parameter] = {}
        for of in self.sites:
            for name, parameter in self.method.padded(of.site, of.extent).items():
                if parameter.scope == "adapter":
                    found[name] = largest([found.get(name, parameter), parameter])
        return found


def resolve(model: nnx.Module, config: AdapterConfig, *, any_rank: bool = False) -> ResolvedAdapter:
    """Finds the sites a config adapts, with the rank and the method's settings of each layer.

    Patterns follow PEFT: the first key that matches the end of a site's name decides.

    Args:
        model: without adapters.
        config: what to adapt, and how.
        any_rank: whether ranks that the method does not take at a site pass (`Method.check`).

    Raises:
        InputError: a target, layer or pattern matches nothing, or the method cannot do at a site what is asked for.
    """
    method = method_of(config)
    config = method.configured(config)
    _warn_of_ignored(method, config)
    if not method.kinds:
        return ResolvedAdapter(config, {})
    sites = {s.name: s for s in find_sites(model)}
    chosen = select(list(sites.values()), config.targets, config.exclude, config.layers, passed_over(model))
    _check_kinds(method, config, [sites[name] for name in chosen])
    unused = {("rank_pattern", p) for p in config.rank_pattern} | {("alpha_pattern", p) for p in config.alpha_pattern}
    resolved = {}
    for name, wanted in chosen.items():
        ranks = np.zeros(len(wanted), int)
        settings = {setting: np.zeros(len(wanted), np.float32) for setting in method.setting_names}
        for i in np.flatnonzero(wanted):
            rank_key = _first_match(config.rank_pattern, sites[name].names[i])
            alpha_key = _first_match(config.alpha_pattern, sites[name].names[i])
            unused -= {("rank_pattern", rank_key), ("alpha_pattern", alpha_key)}
            ranks[i] = config.rank_pattern.get(rank_key, config.rank)
            if not any_rank:
                method.check(config, sites[name], int(ranks[i]))
                method.check_start(config, sites[name], int(ranks[i]))
            alpha = config.alpha_pattern.get(alpha_key, config.alpha)
            for setting, value in method.settings(config, int(ranks[i]), alpha).items():
                if not abs(value) <= float(np.finfo(np.float32).max):
                    raise InputError(f"adapter.alpha: {alpha:g} gives {name} a {setting} beyond the largest float32.")
                settings[setting][i] = value
        resolved[name] = ResolvedSite(ranks, settings)
    for key, pattern in sorted(unused):
        raise InputError(f"adapter.{key}: '{pattern}' matches no adapted module; those are {', '.join(list(chosen)[:12])}.")
    return ResolvedAdapter(config, resolved)


def _warn_of_ignored(method: Method, config: AdapterConfig) -> None:
    """A sweep over methods gives all of them the same keys, so what one of them cannot use is said, and not refused."""
    for key in method.ignores:
        if getattr(config, key) != AdapterConfig.model_fields[key].get_default(call_default_factory=True):
            warn(f"adapter.{key}: '{method.name}' has no use for it; it changes nothing.")


def _check_kinds(method: Method, config: AdapterConfig, sites: Sequence[Site]) -> None:
    for site in sites:
        if site.kind not in method.kinds:
            kinds = " and ".join(method.kinds)
            article = "an" if site.kind[0] in "aeiou" else "a"
            raise InputError(f"adapter.targets: '{method.name}' adapts {kinds} sites, and {site.name} is {article} {site.kind} site.")
        if config.dropout > 0 and site.kind not in method.dropout_kinds:
            raise InputError(f"adapter.dropout: '{method.name}' has none at {site.kind} sites ({site.name}).")


def _first_match(patterns: Mapping[str, float], names: tuple[str, ...]) -> str:
    return next((p for p in patterns for n in names if fullmatch(rf"(.*\.)?({p})", n, "adapter.rank_pattern or adapter.alpha_pattern")), "")


def unite(model: nnx.Module, members: Sequence[ResolvedAdapter]) -> Layout:
    """The smallest layout that holds all members.

    Raises:
        ValueError: members differ in what is static (method, bias, modules_to_save), so that no layout holds them all.
    """
    statics = {(m.method, m.config.bias, tuple(m.config.modules_to_save)) for m in members}
    if len(statics) != 1:
        raise ValueError(f"members differ in method, bias or modules_to_save: {sorted(map(repr, statics))}")
    method, bias, saved = statics.pop()
    own = tuple(dict.fromkeys(n for name in saved for n in modules_named(model, name) or (name,)))
    sites = site_layouts(find_sites(model), [m.needs for m in members], method.extent)
    return Layout(sites, any(m.config.dropout > 0 for m in members), method, bias, own)


def site_layouts(
    sites: Sequence[Site], needs: Sequence[Needs], extent: Callable[[Sequence[int]], tuple[int, ...]] = lambda ranks: (max(ranks),)
) -> tuple[SiteLayout, ...]:
    """The smallest site layouts that hold several adapters at once.

    In one stack all sites start at the lowest layer any of them adapts: the layers below are one segment without adapters.

    Args:
        sites: the model's.
        needs: of each adapter.
        extent: `Method.extent` of the method whose adapters they are; by default the largest rank holds all.
    """
    stacks = {s.name: s.stack for s in sites}
    lowest: dict[object, int] = {}
    for name, (first, _) in ((n, v) for need in needs for n, v in need.items()):
        lowest[stacks[name]] = min(lowest.get(stacks[name], first), first)
    layouts = []
    for site in sites:
        if ranks := sorted({rank for need in needs if site.name in need for rank in need[site.name][1]}):
            layouts.append(SiteLayout(site, lowest[site.stack] if site.stack is not None else 0, extent(ranks)))
    return tuple(layouts)


def label_table(layout: Layout) -> Table:
    """The label table of a layout: the adapters' own parameters, then what the method says of the base's."""
    own = tuple(
        (re.escape(f"{s.site.name}.{name}"), parameter.label)
        for s in layout.sites
        for name, parameter in layout.method.padded(s.site, s.extent).items()
        if parameter.trained and parameter.scope == "layer"
    )
    shared = tuple((re.escape(shared_name(name)), parameter.label) for name, parameter in layout.shared().items() if parameter.trained)
    return (*own, *shared, *layout.method.labels([s.site.name for s in layout.sites], layout.bias, layout.modules_to_save))
