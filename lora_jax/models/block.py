"""One transformer layer."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from ..parallel.constraints import take_positions
from .attention import Attention, Context
from .cache import Memory
from .experts import MixtureOfExperts
from .layers import MLP, Array, BlockConfig, Rows, norm_of


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream; where they are normed is `BlockConfig.norm_at`."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs) if cfg.experts is None else MixtureOfExperts(cfg, rngs=rngs)
        if cfg.norm_at != "output":
            self.attn_norm = norm_of(cfg, cfg.width, rngs=rngs)
            self.mlp_norm = norm_of(cfg, cfg.width, rngs=rngs)
        if cfg.norm_at in ("output", "both"):
            self.attn_out_norm = norm_of(cfg, cfg.width, rngs=rngs)
            self.mlp_out_norm = norm_of(cfg, cfg.width, rngs=rngs)
        self.config = nnx.static(cfg)

    def __call__(self, x: Array, context: Context, layer: Array | int, gather: Array | None = None, memory: Memory | None = None) -> Array:
        """(rows, length, width) -> the same, or (n, width) at the positions `gather` (see `Stack`)."""
        cfg = self.config
        rows = None if gather is None else Rows(gather, x.shape[:2])

        def add(x: Array, change: Array, place: int) -> Array:
            change = context.drop(change, layer, place, rows)
            return x + (change if cfg.residual_scale == 1.0 else change * cfg.residual_scale)

        def attend(x: Array) -> Array:
            return self.attn(x, context, layer, rows, memory)

        def transform(x: Array) -> Array:
            return self.mlp(x, rows)

        kept = take_positions(x, gather)
        if cfg.norm_at == "residual":
            x = self.attn_norm(add(kept, attend(x), 1))
            return self.mlp_norm(add(x, transform(x), 2))
        attended = add(kept, self._branch("attn", attend, x, layer), 1)
        return add(attended, self._branch("mlp", transform, kept if cfg.parallel else attended, layer), 2)

    def _branch(self, name: str, run: Callable[[Array], Array], x: Array, layer: Array | int) -> Array:
        """`run` with the norms on its input and output that there are."""
        if self.config.norm_at != "output":
            normed = getattr(self, f"{name}_norm")(x)
            # All layers of a stack are one program: the layer without a norm computes it like the others and leaves it.
            x = normed if self.config.first_norm or name != "attn" else jnp.where(jnp.equal(layer, 0), x, normed)
        y = run(x)
        return getattr(self, f"{name}_out_norm")(y) if self.config.norm_at in ("output", "both") else y
