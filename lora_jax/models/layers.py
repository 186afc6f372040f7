"""What every model is made of: attention, MLP, norms, rotary positions. One implementation each, switched by `BlockConfig`.

Every parameter carries logical axis names in its metadata (`axes`); `parallel/` turns them into shardings. A stacked parameter
has the axis `layers` in front. Names: `vocab`, `embed` (the residual width), `heads` and `kv_heads` (heads * head width),
`mlp` (hidden units), `positions`, `norm`, `classes`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..parallel.constraints import look_up, take_positions
from .noise import uniform
from .stack import AXES

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The shape and options of one transformer layer.

    Attributes:
        width: residual width.
        heads, kv_heads: query heads, and key/value heads (fewer: grouped-query attention).
        head_dim: width of one head.
        hidden: width of the MLP's hidden layer.
        activation: `gelu` (exact), `gelu_tanh`, `silu` or `relu`.
        gated: MLP computes `down(act(gate(x)) * up(x))` in place of `down(act(up(x)))`.
        norm: `layer` or `rms`.
        norm_first: norms before attention and MLP (Llama) or after the residual sum (BERT).
        attention_bias, mlp_bias: whether the projections have biases.
        dtype: of the weights and matmuls; norms and softmax are computed in float32.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    activation: str
    gated: bool
    norm: str
    norm_eps: float
    norm_first: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: Any = jnp.float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Context:
    """What all layers see alike.

    Attributes:
        mask: (rows, 1, queries, keys) bool, which key each query sees.
        rotary: cos and sin, (rows, length, head_dim) each, or None.
        noise: a PRNG key for dropout, or None where nothing is dropped.
        dropout: share of the values that are dropped; static.
    """

    mask: Array
    rotary: tuple[Array, Array] | None
    noise: Array | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def drop(self, x: Array, layer: Array | int, place: int) -> Array:
        """Dropout of `x` in layer `layer`; each `place` in a layer has noise of its own."""
        if self.noise is None or not self.dropout:
            return x
        return dropout(x, self.dropout, jax.random.fold_in(jax.random.fold_in(self.noise, layer), place))


def dropout(x: Array, rate: float, key: Array) -> Array:
    """`x` with a share `rate` of its values set to 0 and the others scaled up by 1 / (1 - rate)."""
    return jnp.where(uniform(key, x) < 1.0 - rate, x / (1.0 - rate), 0).astype(x.dtype)


def linear(inputs: int, outputs: int, axes: tuple[str, str], *, bias: bool, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """An `nnx.Linear` whose parameters know their logical axes."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=bias,
        dtype=dtype,
        param_dtype=dtype,
        kernel_metadata={AXES: axes},
        bias_metadata={AXES: axes[1:]},
        rngs=rngs,
    )


class Embedding(nnx.Embed):
    """An `nnx.Embed` that finds its vectors wherever a mesh has put them."""

    def __call__(self, tokens: Array) -> Array:
        """(rows, length) int32 -> (rows, length, width)."""
        return look_up(self.embedding[...], self.embedding.get_metadata().get(AXES), tokens).astype(self.dtype)


def embedding(rows: int, width: int, axis: str, *, dtype: Any, rngs: nnx.Rngs) -> Embedding:
    """An `Embedding` of `rows` vectors whose rows lie along the logical axis `axis`."""
    return Embedding(rows, width, dtype=dtype, param_dtype=dtype, embedding_metadata={AXES: (axis, "embed")}, rngs=rngs)


def norm(kind: str, width: int, eps: float, *, bias: bool = True, dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
    """A layer norm (with a bias or without) or RMS norm over the last axis, computed in float32 (two-pass variance, as PyTorch does)."""
    shared = {"epsilon": eps, "dtype": dtype, "param_dtype": dtype, "use_fast_variance": False, "rngs": rngs}
    if kind == "rms":
        return nnx.RMSNorm(width, scale_metadata={AXES: ("norm",)}, **shared)
    return nnx.LayerNorm(width, use_bias=bias, scale_metadata={AXES: ("norm",)}, bias_metadata={AXES: ("norm",)}, **shared)


def activation(name: str, x: Array) -> Array:
    """Applies the named activation; `gelu` is the exact one, with erf."""
    if name == "gelu":
        return jax.nn.gelu(x, approximate=False)
    return {"gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu, "tanh": jnp.tanh}[name](x)


def rotary_angles(positions: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines of rotary position embedding (arXiv:2104.09864), for the half-split layout.

    Args:
        positions: (rows, length) int32.

    Returns:
        two (rows, length, head_dim) float32 arrays.
    """
    inverse = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, rotary: tuple[Array, Array]) -> Array:
    """Rotates (rows, length, heads, head_dim) by the angles of `rotary_angles`."""
    cos, sin = (a[:, :, None, :].astype(x.dtype) for a in rotary)
    half = x.shape[-1] // 2
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos + turned * sin


def segment_mask(segment_ids: Array, *, causal: bool) -> Array:
    """Which key each query sees: those of its own segment, and for `causal` none after it.

    Args:
        segment_ids: (rows, length) int32; 0 is padding.

    Returns:
        (rows, 1, length, length) bool. Padding sees padding, so that no row of the softmax is empty.
    """
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    if causal:
        length = segment_ids.shape[1]
        mask &= jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
    return mask[:, None]


def row_layout(tokens: Array, mask: Array | None, positions: Array | None, segment_ids: Array | None) -> tuple[Array, Array]:
    """Segment ids and positions, (batch, seq) int32 each, with their defaults filled in from the attention mask and the shape."""
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens) if mask is None else mask.astype(jnp.int32)
    if positions is None:
        positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    return segment_ids, positions


class Attention(nnx.Module):
    """Multi-head (or grouped-query) attention."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        shared = {"bias": cfg.attention_bias, "dtype": cfg.dtype, "rngs": rngs}
        inner, kv_inner = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q_proj = linear(cfg.width, inner, ("embed", "heads"), **shared)
        self.k_proj = linear(cfg.width, kv_inner, ("embed", "kv_heads"), **shared)
        self.v_proj = linear(cfg.width, kv_inner, ("embed", "kv_heads"), **shared)
        self.o_proj = linear(inner, cfg.width, ("heads", "embed"), **shared)
        self.head_dim = cfg.head_dim

    def __call__(self, x: Array, context: Context, layer: Array | int, gather: Array | None) -> Array:
        rows, length, _ = x.shape
        q, k, v = (p(x).reshape(rows, length, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        if context.rotary is not None:
            q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        grouped = q.reshape(rows, length, k.shape[2], -1, self.head_dim)  # query heads by the key head they share
        scores = jnp.einsum("rqkgd,rskd->rkgqs", grouped, k, preferred_element_type=jnp.float32) * self.head_dim**-0.5
        scores = jnp.where(context.mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
        shares = context.drop(jax.nn.softmax(scores, axis=-1).astype(x.dtype), layer, 0)
        mixed = jnp.einsum("rkgqs,rskd->rqkgd", shares, v).reshape(rows, length, -1)
        return self.o_proj(take_positions(mixed, gather))


class MLP(nnx.Module):
    """Two-layer perceptron, gated or plain."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        shared = {"bias": cfg.mlp_bias, "dtype": cfg.dtype, "rngs": rngs}
        if cfg.gated:
            self.gate_proj = linear(cfg.width, cfg.hidden, ("embed", "mlp"), **shared)
        self.up_proj = linear(cfg.width, cfg.hidden, ("embed", "mlp"), **shared)
        self.down_proj = linear(cfg.hidden, cfg.width, ("mlp", "embed"), **shared)
        self.activation = cfg.activation
        self.gated = cfg.gated

    def __call__(self, x: Array) -> Array:
        if self.gated:
            return self.down_proj(activation(self.activation, self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(activation(self.activation, self.up_proj(x)))


class Block(nnx.Module):
    """One transformer layer: attention and MLP, each with a residual and a norm before it or after it."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        self.attn = Attention(cfg, rngs=rngs)
        self.attn_norm = norm(cfg.norm, cfg.width, cfg.norm_eps, dtype=cfg.dtype, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs)
        self.mlp_norm = norm(cfg.norm, cfg.width, cfg.norm_eps, dtype=cfg.dtype, rngs=rngs)
        self.norm_first = cfg.norm_first

    def __call__(self, x: Array, context: Context, layer: Array | int, gather: Array | None = None) -> Array:
        if self.norm_first:
            x = take_positions(x, gather) + context.drop(self.attn(self.attn_norm(x), context, layer, gather), layer, 1)
            return x + context.drop(self.mlp(self.mlp_norm(x)), layer, 2)
        x = self.attn_norm(take_positions(x, gather) + context.drop(self.attn(x, context, layer, gather), layer, 1))
        return self.mlp_norm(x + context.drop(self.mlp(x), layer, 2))
