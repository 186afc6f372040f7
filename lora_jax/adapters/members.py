"""One member's numbers in a layout: its arrays (initialised by its own seed and padded), settings and dropout rates.

What is drawn depends on the member's seed, the site's name and the layer, and never on what else is in the pack: a member starts
the same alone and beside any others. NumPy draws it, so that a hundred members of different ranks compile nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..parallel.mesh import to_host
from .layout import ResolvedAdapter, ResolvedSite
from .methods.base import AdaptedSite
from .sites import SiteModule, logical_name


def site_modules(model: nnx.Module) -> dict[str, AdaptedSite]:
    """Site name -> its module, of an adapted model."""
    return {logical_name(path): m for path, m in nnx.iter_modules(model) if isinstance(m, AdaptedSite)}


def fill_member(model: nnx.Module, member: ResolvedAdapter, seed: int) -> None:
    """Sets the adapters of a model made by `inject_layout` to one member at step 0, in place.

    With one seed, a member of a smaller rank starts as the leading part of a larger one where the method draws rank after rank, so that
    they differ in their rank alone; with `adapter.nested_init: false` each rank has draws of its own.
    """
    for name, module in site_modules(model).items():
        _fill_site(module, name, member.sites.get(name), member.config, seed)


def draw_head(model: nnx.Module, seed: int) -> None:
    """Draws a task's new head by a member's seed, each of its matrices from N(0, 0.02), in place; a head that was loaded stays."""
    for name in getattr(model, "new", ()):
        module: Any = getattr(model, name)
        module = module.base if isinstance(module, SiteModule) else module
        if isinstance(module, nnx.Linear):
            drawn = random_of(seed, name, 0).standard_normal(module.kernel.shape, np.float32)
            module.kernel.set_value(jnp.asarray(0.02 * drawn, module.kernel.dtype))


def random_of(seed: int, name: str, layer: int, *more: int) -> np.random.Generator:
    """Random numbers for a seed, name and layer: the same in every process and on every platform."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode()), layer, *more])))


def _fill_site(module: AdaptedSite, name: str, member: ResolvedSite | None, config: Any, seed: int) -> None:
    site, method = module.site, module.method
    layers = len(module.ranks)
    first = len(site.names) - layers
    ranks = np.zeros(layers, int) if member is None else member.ranks[first:]
    padded = method.parameters(site, module.rank)
    arrays = {n: np.full((layers, *p.shape), p.fill, np.float32) for n, p in padded.items()}
    for i in np.flatnonzero(ranks):
        rank = int(ranks[i])
        random = random_of(seed, name, first + int(i), *([] if config.nested_init else [rank]))
        for array, value in method.init(site, rank, config, random, _weight_of(module, first + int(i))).items():
            arrays[array][(i, *padded[array].own(rank))] = value
    for setting in method.setting_names:
        arrays[setting] = np.zeros(layers, np.float32) if member is None else member.settings[setting][first:]
    module.fill(arrays)
    module.ranks = nnx.static(tuple(int(r) for r in ranks))
    if hasattr(module, "dropout_rate"):
        rate = np.full(module.dropout_rate.shape, config.dropout if member is not None else 0.0, np.float32)
        module.dropout_rate.set_value(jnp.asarray(rate))


def _weight_of(module: AdaptedSite, layer: int) -> Callable[[], np.ndarray]:
    """Gives one layer's weight of the base, float32 on the host."""

    def weight() -> np.ndarray:
        whole = getattr(module.base, module.weight)[...]
        return to_host(whole[layer] if module.stacked else whole).astype(np.float32)

    return weight
