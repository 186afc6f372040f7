"""A mixture of experts (arXiv:1701.06538) in an MLP's place: a router sends each token through a few of many MLPs.

The experts' weights are stacked `(experts, in, out)`, and their products are grouped (`grouped.py`): no token is dropped, and no
expert does work for tokens that are not its own.

Matrix products of which each row has a weight of its own, out of a few: what a mixture of experts is made of.

`jax.lax.ragged_dot` does the work. Around it: rows are sorted by their weight and put back; and under `jax.vmap`, for which ragged
products have no rule, the members' rows (and, where they have their own, their weights) are laid side by side in one product, so that
weights which all members share are never copied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_batching import custom_vmap

from .layers import AXES, Array, BlockConfig, Rows, gated, linear, project


class ExpertLinear(nnx.Module):
    """A linear layer without bias for each expert.

    Args:
        experts: how many.
        used: through how many of them each token goes.
        axes: logical ones, of inputs and outputs.
    """

    def __init__(self, experts: int, used: int, inputs: int, outputs: int, axes: tuple[str, str], *, dtype: Any, rngs: nnx.Rngs):
        drawn = nnx.initializers.lecun_normal(batch_axis=(0,))(rngs.params(), (experts, inputs, outputs), dtype)
        self.kernel = nnx.Param(drawn)
        self.kernel.set_metadata(AXES, ("experts", *axes))
        self.used = used
        self.dtype = dtype

    def __call__(self, x: Array, expert: Array) -> Array:
        """(tokens * used, inputs) -> (tokens * used, outputs), a token's rows together; row i by expert `expert[i]`."""
        return grouped_matmul(x.astype(self.dtype), self.kernel[...], expert)


class Experts(nnx.Module):
    """As many gated MLPs as there are experts."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        assert cfg.experts is not None
        counts = (cfg.experts, cfg.experts_used)
        self.gate_up_proj = ExpertLinear(*counts, cfg.width, 2 * cfg.hidden, ("embed", "mlp"), dtype=cfg.dtype, rngs=rngs)
        self.down_proj = ExpertLinear(*counts, cfg.hidden, cfg.width, ("mlp", "embed"), dtype=cfg.dtype, rngs=rngs)
        self.activation = cfg.activation

    def __call__(self, x: Array, expert: Array, rows: Rows | None = None) -> Array:
        """(tokens * used, width) -> the same; `rows` says where the tokens are in the batch if they were gathered."""
        hidden = gated(self.activation, *jnp.split(project(self.gate_up_proj, x, expert, rows=rows), 2, axis=-1))
        return project(self.down_proj, hidden, expert, rows=rows)


class MixtureOfExperts(nnx.Module):
    """The router and its experts: y = sum over the best `experts_used` experts e of p_e(x) MLP_e(x), p = softmax(router(x))."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        assert cfg.experts is not None
        self.router = linear(cfg.width, cfg.experts, ("embed", "experts"), bias=False, dtype=cfg.dtype, rngs=rngs)
        self.experts = Experts(cfg, rngs=rngs)
        self.config = nnx.static(cfg)

    def __call__(self, x: Array, rows: Rows | None = None) -> Array:
        """(..., width) -> the same; `rows` says where the rows of a gathered `x` are."""
        used = self.config.experts_used
        tokens = x.reshape(-1, x.shape[-1])
        shares, expert = jax.lax.top_k(jax.nn.softmax(project(self.router, tokens, rows=rows).astype(jnp.float32), axis=-1), used)
        if self.config.experts_normed:
            shares = shares / shares.sum(-1, keepdims=True)
        y = self.experts(jnp.repeat(tokens, used, axis=0), expert.reshape(-1), rows).reshape(-1, used, x.shape[-1])
        return jnp.einsum("tuw,tu->tw", y, shares.astype(y.dtype)).reshape(x.shape)


# Of two factors with the same ragged rows the sum over each group's rows: (rows, k), (rows, n) -> (groups, k, n).
_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


@jax.custom_vjp
def grouped_matmul(x: Array, weights: Array, groups: Array) -> Array:
    """`x[i] @ weights[groups[i]]` for each row i.

    Args:
        x: (rows, k).
        weights: (groups, k, n).
        groups: (rows,) int32, in any order.

    Returns:
        (rows, n).

    >>> x, weights = jnp.ones((3, 2)), jnp.arange(2.0)[:, None, None] * jnp.ones((2, 2, 1))
    >>> grouped_matmul(x, weights, jnp.array([1, 0, 1]))[:, 0].tolist()
    [2.0, 0.0, 2.0]
    """
    return _product(x, weights, groups)


def _forward(x: Array, weights: Array, groups: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(x, weights, groups), (x, weights, groups)


def _backward(kept: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    x, weights, groups = kept
    return _product(dy, weights.swapaxes(1, 2), groups), _outer(weights.shape[0])(x, dy, groups), None


grouped_matmul.defvjp(_forward, _backward)


def _sorted(groups: Array, count: int) -> tuple[Array, Array]:
    """The rows in the order of their groups, and how many each group has."""
    return jnp.argsort(groups), jnp.bincount(groups, length=count).astype(jnp.int32)


@custom_vmap
def _product(x: Array, weights: Array, groups: Array) -> Array:
    order, sizes = _sorted(groups, weights.shape[0])
    y = jax.lax.ragged_dot(x[order], weights, sizes)
    return jnp.zeros_like(y).at[order].set(y, unique_indices=True)


@_product.def_vmap
def _product_of_members(size: int, batched: Sequence[Any], x: Array, weights: Array, groups: Array) -> tuple[Array, bool]:
    own_x, own_weights, own_groups = batched
    count, k, n = weights.shape[-3:]
    if not own_x and not own_groups:  # what goes in is common to all: their weights side by side
        y = _product(x, jnp.moveaxis(weights, 0, 2).reshape(count, k, size * n), groups)
        return jnp.moveaxis(y.reshape(-1, size, n), 1, 0), True
    x, groups = (a if own else jnp.broadcast_to(a, (size, *a.shape)) for a, own in ((x, own_x), (groups, own_groups)))
    if own_weights:
        groups, weights = _apart(groups, count), weights.reshape(size * count, k, n)
    return _product(x.reshape(-1, k), weights, groups.reshape(-1)).reshape(size, -1, n), True


def _apart(groups: Array, count: int) -> Array:
    """(members, rows): each member's groups by numbers of their own."""
    return groups + count * jnp.arange(groups.shape[0], dtype=groups.dtype)[:, None]


@functools.cache
def _outer(count: int) -> Callable[[Array, Array, Array], Array]:
    """The sum of `x[i]^T y[i]` over each group's rows: (rows, k), (rows, n), (rows,) -> (count, k, n)."""

    @custom_vmap
    def outer(x: Array, y: Array, groups: Array) -> Array:
        order, sizes = _sorted(groups, count)
        return jax.lax.ragged_dot_general(x[order], y[order], sizes, _OVER_ROWS)

    @outer.def_vmap
    def outer_of_members(size: int, batched: Sequence[Any], x: Array, y: Array, groups: Array) -> tuple[Array, bool]:
        own_x, own_y, own_groups = batched
        k, n = x.shape[-1], y.shape[-1]
        if own_y and not own_x and not own_groups:
            found = outer(x, jnp.moveaxis(y, 0, 1).reshape(-1, size * n), groups)
            return jnp.moveaxis(found.reshape(count, k, size, n), 2, 0), True
        arrays = zip((x, y, groups), batched, strict=True)
        x, y, groups = (a if own else jnp.broadcast_to(a, (size, *a.shape)) for a, own in arrays)
        found = _outer(size * count)(x.reshape(-1, k), y.reshape(-1, n), _apart(groups, count).reshape(-1))
        return found.reshape(size, count, k, n), True

    return outer
