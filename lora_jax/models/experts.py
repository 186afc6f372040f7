"""A mixture of experts (arXiv:1701.06538) in an MLP's place: a router sends each token through a few of many MLPs.

The experts' weights are stacked `(experts, in, out)`, and their products are grouped (`grouped.py`): no token is dropped, and no
expert does work for tokens that are not its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .grouped import grouped_matmul
from .layers import Array, BlockConfig, gated, linear
from .stack import AXES


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

    def __call__(self, x: Array, expert: Array) -> Array:
        """(tokens * used, width) -> the same."""
        return self.down_proj(gated(self.activation, *jnp.split(self.gate_up_proj(x, expert), 2, axis=-1)), expert)


class MixtureOfExperts(nnx.Module):
    """The router and its experts: y = sum over the best `experts_used` experts e of p_e(x) MLP_e(x), p = softmax(router(x))."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        assert cfg.experts is not None
        self.router = linear(cfg.width, cfg.experts, ("embed", "experts"), bias=False, dtype=cfg.dtype, rngs=rngs)
        self.experts = Experts(cfg, rngs=rngs)
        self.config = nnx.static(cfg)

    def __call__(self, x: Array) -> Array:
        """(..., width) -> the same."""
        used = self.config.experts_used
        tokens = x.reshape(-1, x.shape[-1])
        shares, expert = jax.lax.top_k(jax.nn.softmax(self.router(tokens).astype(jnp.float32), axis=-1), used)
        if self.config.experts_normed:
            shares = shares / shares.sum(-1, keepdims=True)
        y = self.experts(jnp.repeat(tokens, used, axis=0), expert.reshape(-1)).reshape(-1, used, x.shape[-1])
        return jnp.einsum("tuw,tu->tw", y, shares.astype(y.dtype)).reshape(x.shape)
