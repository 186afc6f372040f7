"""Mixed batches: the factors of several adapters at each site, and for each row of a batch the one it takes.

Row i of a batch gets `base(x)[i] + scale[k] * x[i] A[k] B[k]` with k = rows[i]; a row whose k is negative gets the base's output,
bit for bit. Which row takes which is data: one compiled program whatever the assignment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from ..models.experts import grouped_matmul
from ..models.layers import PER_SEGMENT, Rows
from ..parallel.constraints import take_positions
from .contraction import GENERAL, FlatSite
from .convolution import convolve
from .parameters import AdapterParam, AdapterSetting
from .sites import Site, SiteModule

NO_ADAPTER = -1


class MixedSite(SiteModule):
    """What stands at a site in a mixed batch.

    Args:
        base: the module that stood there.
        site: which one it is.
        a, b, scale: (..., adapters, inputs, rank), (..., adapters, rank, outputs) and (..., adapters) float32; the layers of a
            stacked site in front, the experts of an expert site after the adapters.
    """

    def __init__(self, base: nnx.Module, site: Site, a: jax.Array, b: jax.Array, scale: jax.Array):
        super().__init__(base, site)
        own: dict[str, Any] = {} if site.depth is None else {PER_SEGMENT: True}
        self.lora_a = AdapterParam(a, **own)
        self.lora_b = AdapterParam(b, **own)
        self.scale = AdapterSetting(scale, **own)
        # Each layer's copy: a scan hands each layer its own part of every array.
        self.rows = AdapterSetting(jnp.full((*scale.shape[:-1], 1), NO_ADAPTER, jnp.int32), **own)

    def add(self, y: jax.Array, low: jax.Array, rows: jax.Array) -> jax.Array:
        """`y + scale * low B`, each row with its own adapter's.

        Args:
            y: (n, ..., outputs), the base's output.
            low: (n, ..., rank), its input times A.
            rows: (n,).
        """
        scale = _along(self.scale[...][rows], low).astype(y.dtype)
        updated = y + jnp.einsum("n...r,nro->n...o", low * scale, self.lora_b[...][rows].astype(y.dtype))
        return jnp.where(_along(rows, y) < 0, y, updated)


class MixedLinear(MixedSite):
    """A linear site."""

    def __call__(self, x: jax.Array, rows: Rows | None = None, out_sharding: None = None) -> jax.Array:
        if not isinstance(self.base, GENERAL):
            return self._mixed(self.base, x, rows)
        flat = FlatSite(self, x)
        return flat.unfold(self._mixed(flat.base, flat.x, rows))

    def _mixed(self, base: Callable[[jax.Array], jax.Array], x: jax.Array, rows: Rows | None) -> jax.Array:
        y, adapters = base(x), self.rows[...]
        if x.ndim > 2 and x.shape[0] == 1:  # what all rows share (relative positions): from here on each has its own
            x, y = (jnp.broadcast_to(a, (adapters.shape[0], *a.shape[1:])) for a in (x, y))
        own = _adapters_of(adapters, x, rows)
        return self.add(y, jnp.einsum("n...i,nir->n...r", x.astype(y.dtype), self.lora_a[...][own].astype(y.dtype)), own)


class MixedConvolution(MixedSite):
    """A convolution; every row of the batch is convolved with its own adapter's A."""

    def __call__(self, x: jax.Array, rows: Rows | None = None, out_sharding: None = None) -> jax.Array:
        y, own = self.base(x), _adapters_of(self.rows[...], x, rows)
        low = jax.vmap(lambda x, a: convolve(self.base, x, a))(x.astype(y.dtype), self.lora_a[...][own].astype(y.dtype))
        return self.add(y, low, own)


class MixedEmbed(MixedSite):
    """An embedding site."""

    def __call__(self, tokens: jax.Array, rows: Rows | None = None) -> jax.Array:
        y = self.base(tokens)
        own = _adapters_of(self.rows[...], y, rows)
        return self.add(y, self.lora_a[...][_along(own, tokens), tokens].astype(y.dtype), own)


class MixedExperts(MixedSite):
    """An expert site, (tokens * used, inputs): each row with its expert's factors out of its token's adapter's."""

    def __call__(self, x: jax.Array, expert: jax.Array, rows: Rows | None = None) -> jax.Array:
        y = self.base(x, expert)
        used = self.base.used
        own = jnp.repeat(_adapters_of(self.rows[...], x[::used], rows), used)
        a, b = (f[...].astype(y.dtype) for f in (self.lora_a, self.lora_b))
        adapters, experts = a.shape[:2]
        which = jnp.clip(own, 0, adapters - 1) * experts + expert
        low = grouped_matmul(x.astype(y.dtype), a.reshape(-1, *a.shape[2:]), which)
        scale = _along(self.scale[...][own], y).astype(y.dtype)
        updated = y + grouped_matmul(low * scale, b.reshape(-1, *b.shape[2:]), which)
        return jnp.where(_along(own, y) < 0, y, updated)


MIXED_MODULES: dict[str, type[MixedSite]] = {
    "linear": MixedLinear,
    "convolution": MixedConvolution,
    "embedding": MixedEmbed,
    "expert": MixedExperts,
}


def with_rows(model: nnx.Module, rows: ArrayLike | Sequence[int]) -> nnx.Module:
    """The mixed model for another batch: the same arrays, other rows. `model` itself is unchanged; `rows` may be traced.

    Args:
        model: from `AdapterBank.mixed`.
        rows: (batch,) int32, the adapter index of each row (`AdapterBank.row_ids`), -1 for no adapter.

    Raises:
        ValueError: the model is not from `AdapterBank.mixed`.
    """
    ids = jnp.asarray(rows, jnp.int32)
    graphdef, state = nnx.split(model, graph=True)
    mixed = nnx.merge(graphdef, jax.tree.map(lambda a: a, state))
    sites = [m for _, m in nnx.iter_modules(mixed) if isinstance(m, MixedSite)]
    if not sites:
        raise ValueError("the model has no adapters that rows could take: make it with AdapterBank.mixed")
    for site in sites:
        site.rows.set_value(jnp.broadcast_to(ids, (*site.scale.shape[:-1], *ids.shape)))
    return mixed


def _along(rows: jax.Array, x: jax.Array) -> jax.Array:
    """(n,) shaped to go with x (n, ...)."""
    return rows.reshape(-1, *[1] * (x.ndim - 1))


def _adapters_of(adapters: jax.Array, x: jax.Array, rows: Rows | None) -> jax.Array:
    """The adapter of each x[i], (len(x),) int32.

    Args:
        adapters: (batch,), of each row of the batch.
        x: an activation with a row of the batch for each i; or a flat one, (n, width), with equally many positions of each row, in order.
        rows: where in the batch the x[i] are, if they were gathered.

    Raises:
        ValueError: x belongs to a batch of another number of rows.
    """
    if rows is not None:
        if rows.shape[0] != adapters.shape[0]:
            raise ValueError(f"a batch of {rows.shape[0]} rows, and {adapters.shape[0]} of them have adapters")
        return take_positions(jnp.broadcast_to(adapters[:, None, None], (*rows.shape, 1)), rows.index)[:, 0]
    each, rest = divmod(x.shape[0], adapters.shape[0])
    if each == 0 or rest or (each > 1 and x.ndim != 2):
        raise ValueError(f"an activation of shape {x.shape} in a batch whose {adapters.shape[0]} rows have adapters")
    return jnp.repeat(adapters, each)
