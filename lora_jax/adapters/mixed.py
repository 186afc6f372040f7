"""Mixed batches: the factors of several adapters at each site, and for each row of a batch the one it takes.

Row i of a batch gets `base(x)[i] + scale[k] * x[i] A[k] B[k]` with k = rows[i]; a row whose k is negative gets the base's output,
bit for bit. Which row takes which is data: one compiled program whatever the assignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from ..models.experts import grouped_matmul
from ..models.layers import PER_SEGMENT
from ..models.positions import targets_of
from ..parallel.constraints import take_positions
from .methods.lora import AdapterSetting, LoRAParam

NO_ADAPTER = -1


class MixedSite(nnx.Module):
    """What stands at a site in a mixed batch.

    Args:
        base: the module that stood there.
        a, b, scale: (..., adapters, inputs, rank), (..., adapters, rank, outputs) and (..., adapters) float32; the layers of a
            stacked site in front, the experts of an expert site after the adapters.
        stacked: whether they are.
    """

    def __init__(self, base: nnx.Module, a: jax.Array, b: jax.Array, scale: jax.Array, *, stacked: bool):
        own: dict[str, Any] = {PER_SEGMENT: True} if stacked else {}
        self.base: Any = base
        self.lora_a = LoRAParam(a, **own)
        self.lora_b = LoRAParam(b, **own)
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

    def __call__(self, x: jax.Array) -> jax.Array:
        y, rows = self.base(x), self.rows[...]
        if x.ndim > 2 and x.shape[0] == 1:  # what all rows share (relative positions): from here on each has its own
            x, y = (jnp.broadcast_to(a, (rows.shape[0], *a.shape[1:])) for a in (x, y))
        rows = _rows_of(rows, x)
        return self.add(y, jnp.einsum("n...i,nir->n...r", x.astype(y.dtype), self.lora_a[...][rows].astype(y.dtype)), rows)


class MixedEmbed(MixedSite):
    """An embedding site."""

    def __call__(self, tokens: jax.Array) -> jax.Array:
        y = self.base(tokens)
        rows = _rows_of(self.rows[...], y)
        return self.add(y, self.lora_a[...][_along(rows, tokens), tokens].astype(y.dtype), rows)

    def attend(self, query: jax.Array) -> jax.Array:
        """The base's output projection with the same weights, which LoRA on an embedding leaves as it is."""
        return self.base.attend(query)

    @property
    def embedding(self) -> nnx.Param:
        """The base's weights."""
        return self.base.embedding


class MixedExperts(MixedSite):
    """An expert site, (tokens * used, inputs): each row with its expert's factors out of its token's adapter's."""

    def __call__(self, x: jax.Array, expert: jax.Array) -> jax.Array:
        y = self.base(x, expert)
        used = self.base.used
        rows = jnp.repeat(_rows_of(self.rows[...], x[::used]), used)
        a, b = (f[...].astype(y.dtype) for f in (self.lora_a, self.lora_b))
        adapters, experts = a.shape[:2]
        which = jnp.clip(rows, 0, adapters - 1) * experts + expert
        low = grouped_matmul(x.astype(y.dtype), a.reshape(-1, *a.shape[2:]), which)
        scale = _along(self.scale[...][rows], y).astype(y.dtype)
        updated = y + grouped_matmul(low * scale, b.reshape(-1, *b.shape[2:]), which)
        return jnp.where(_along(rows, y) < 0, y, updated)


MIXED_MODULES: dict[str, type[MixedSite]] = {"linear": MixedLinear, "embedding": MixedEmbed, "expert": MixedExperts}


def with_rows(model: nnx.Module, rows: ArrayLike | Sequence[int]) -> nnx.Module:
    """The mixed model for another batch: the same arrays, other rows. `model` is left as it was; `rows` may be traced.

    Args:
        model: of `AdapterBank.mixed`.
        rows: (batch,) int32, each row's adapter as `AdapterBank.row_ids` gives it, -1 for none.

    Raises:
        ValueError: the model is not made for mixed batches.
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


def _rows_of(rows: jax.Array, x: jax.Array) -> jax.Array:
    """The adapter of each x[i]: x has a row of the batch for each i; or it is flat, (n, width), and has positions of rows.

    Flat activations that a model gathered are at the positions it says (`models/positions.py`), others have equally many
    positions of each row, in order.

    Raises:
        ValueError: neither is the case.
    """
    if (targets := targets_of(x)) is not None:
        index, shape = targets
        if shape[0] != rows.shape[0]:
            raise ValueError(f"a batch of {shape[0]} rows, and {rows.shape[0]} of them have adapters")
        return take_positions(jnp.broadcast_to(rows[:, None, None], (*shape, 1)), index)[:, 0]
    each, rest = divmod(x.shape[0], rows.shape[0])
    if each == 0 or rest or (each > 1 and x.ndim != 2):
        raise ValueError(f"an activation of shape {x.shape} in a batch whose {rows.shape[0]} rows have adapters")
    return jnp.repeat(rows, each)
