"""One transformer layer: attention and MLP, and what all layers of a stack see alike (masks, rotary angles).

Layers may differ in these (a sliding window in some, no rotary positions in others). They then differ in data alone: the context
holds a mask and a table of angles for each layer type, and a layer takes its own by its index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from ..parallel.constraints import take_positions
from .cache import Cache, Memory
from .experts import MixtureOfExperts
from .layers import AXES, MLP, Array, BlockConfig, LayerType, Rows, dropout, linear, norm_of, project
from .positions import of_pairs, rotary_angles, rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Context:
    """What all layers see alike.

    Attributes:
        mask: (layer types, rows, 1, queries, keys) bool, which key each query sees in layers of each type.
        rotary: cos and sin, (layer types, rows, length, dims) each, or None.
        dropout_rng: a PRNG key for dropout, or None where nothing is dropped.
        relative: (1, 2 * span, width), the vectors of relative positions, or None.
        bias: (1, heads, queries, keys) float32, what is added to self-attention's scaled scores, or None.
        entering: (layers, length, width), what is added to each layer's input, or None.
        places: (1 or rows, length, width), what is added to what queries and keys are made of, and not to what values are, or None.
        source: (rows, source length, width), an encoder's output; None where there is none, or a cache has its keys and values.
        source_mask: (rows, 1, queries, source length) bool, which of its tokens each query sees, or None.
        source_places: (1 or rows, source length, width), what is added to what its keys are made of, or None.
        types: for each layer the index of its type; empty where there is one type.
        dropout: share of the values that are dropped; static.
    """

    mask: Array
    rotary: tuple[Array, Array] | None
    dropout_rng: Array | None = None
    relative: Array | None = None
    bias: Array | None = None
    source: Array | None = None
    source_mask: Array | None = None
    entering: Array | None = None
    places: Array | None = None
    source_places: Array | None = None
    types: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def of_layer(self, layer: Array | int) -> tuple[Array, tuple[Array, Array] | None]:
        """The layer's mask (rows, 1, queries, keys) and rotary angles (rows, length, dims)."""
        if self.types:
            kind = jnp.asarray(self.types)[layer]
            return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, kind, keepdims=False), (self.mask, self.rotary))
        return jax.tree.map(lambda a: a[0], (self.mask, self.rotary))

    def drop(self, x: Array, layer: Array | int, place: int, rows: Rows | None = None) -> Array:
        """Dropout of `x` in layer `layer`; each `place` in a layer has a key of its own. `rows` says where a gathered `x` is."""
        if self.dropout_rng is None or not self.dropout:
            return x
        return dropout(x, self.dropout, jax.random.fold_in(jax.random.fold_in(self.dropout_rng, layer), place), rows)


def make_context(
    layers: tuple[LayerType, ...],
    segment_ids: Array,
    positions: Array,
    *,
    causal: bool,
    dropout_rng: Array | None = None,
    dropout: float = 0.0,
    cache: Cache | None = None,
    relative: Array | None = None,
    bias: Array | None = None,
    source: Array | None = None,
    source_mask: Array | None = None,
) -> Context:
    """The context of a batch.

    Args:
        layers: each layer's kind; a single one is that of all.
        segment_ids, positions: (rows, length) int32, as for `segment_mask` and `rotary_angles`.
        dropout_rng, dropout, relative, bias, source, source_mask: as in `Context`.
        cache: that the keys are read from, these tokens' among them; None: they are the tokens' own alone.
    """
    types = tuple(dict.fromkeys(layers))
    if cache is None:
        mask = jnp.stack([segment_mask(segment_ids, causal=causal, window=one.window) for one in types])
    else:
        mask = jnp.stack([cache.seen(segment_ids.shape[1], one.window) for one in types])
    index = tuple(types.index(one) for one in layers) if len(types) > 1 else ()
    rotary = rotary_tables(types, positions)
    return Context(mask, rotary, dropout_rng, relative, bias, source, source_mask, types=index, dropout=dropout)


def rotary_tables(types: tuple[LayerType, ...], positions: Array) -> tuple[Array, Array] | None:
    """Cosines and sines, (layer types, rows, length, dims) each; a type without rotary positions gets angles of 0. None if none has any."""
    if all(one.rotary is None for one in types):
        return None
    tables = [None if one.rotary is None else rotary_angles(positions, one.rotary) for one in types]
    like = next(table[0] for table in tables if table is not None)
    still = jnp.ones_like(like), jnp.zeros_like(like)
    cos, sin = zip(*(table or still for table in tables), strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def segment_mask(segment_ids: Array, *, causal: bool, window: int | None = None) -> Array:
    """Which key each query sees: those of its own segment, for `causal` none after it, with a `window` none so many tokens away.

    Args:
        segment_ids: (rows, length) int32; 0 is padding.

    Returns:
        (rows, 1, length, length) bool. Padding sees padding, so that no row of the softmax is empty.
    """
    mask = segment_ids[:, :, None] == segment_ids[:, None, :]
    place = jnp.arange(segment_ids.shape[1])
    distance = place[:, None] - place[None, :]
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= abs(distance) < window
    return mask[:, None]


class Attention(nnx.Module):
    """Multi-head (or grouped-query) attention.

    Args:
        cross: the keys and values are those of an encoder's output (`Context.source`); positions have no part in it.
    """

    def __init__(self, cfg: BlockConfig, *, cross: bool = False, rngs: nnx.Rngs):
        inner, kv_inner = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        shared = {"bias": cfg.qkv_bias, "dtype": cfg.dtype, "rngs": rngs}
        if cfg.qkv == "separate":
            self.q_proj = linear(cfg.width, inner, ("embed", "heads"), **shared)
            self.k_proj = linear(cfg.width, kv_inner, ("embed", "kv_heads"), **shared)
            self.v_proj = linear(cfg.width, kv_inner, ("embed", "kv_heads"), **shared)
        else:
            self.qkv_proj = linear(cfg.width, inner + 2 * kv_inner, ("embed", "heads"), **shared)
        self.o_proj = linear(inner, cfg.width, ("heads", "embed"), bias=cfg.out_bias, dtype=cfg.dtype, rngs=rngs)
        if cfg.relative is not None and not cfg.relative.shared and not cross:
            if cfg.relative.c2p:
                self.pos_k_proj = linear(cfg.width, inner, ("embed", "heads"), **shared)
            if cfg.relative.p2c:
                self.pos_q_proj = linear(cfg.width, inner, ("embed", "heads"), **shared)
        if cfg.qk_norm is not None:
            whole = cfg.qk_norm == "whole"
            self.q_norm = norm_of(cfg, inner if whole else cfg.head_dim, rngs=rngs)
            self.k_norm = norm_of(cfg, kv_inner if whole else cfg.head_dim, rngs=rngs)
        self.config = nnx.static(cfg)
        self.cross = cross

    def __call__(self, x: Array, context: Context, layer: Array | int, rows: Rows | None, memory: Memory | None = None) -> Array:
        """(rows, length, width) -> the same, or (n, width) at the positions `rows`."""
        if self.cross:
            assert context.source_mask is not None
            mixed = self.mix(*self._over_source(x, context, memory), context.source_mask, context, layer)
        else:
            mask, rotary = context.of_layer(layer)
            q, k, v = self.heads(*self._projected(x, context.places))
            if rotary is not None:
                q, k = rotate(q, rotary), rotate(k, rotary)
            if memory is not None:
                k, v = memory.add(k, v)
            mixed = self.mix(q, k, v, mask, context, layer)
        return project(self.o_proj, take_positions(mixed, None if rows is None else rows.index), rows=rows)

    def heads(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Projections (rows, length, inner) by heads, before rotation: (rows, length, heads or kv_heads, head_dim)."""
        cfg = self.config
        if cfg.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (p.reshape(*p.shape[:2], -1, cfg.head_dim) for p in (q, k, v))
        if cfg.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _over_source(self, x: Array, context: Context, memory: Memory | None) -> tuple[Array, Array, Array]:
        """The queries of `x`, the keys and values of the encoder's output: from the cache, once they are there."""
        q = self.q_proj(_placed(x, context.places))
        if memory is not None and not memory.first:
            k, v = memory.source()
            return self.heads(q, *(a.reshape(*a.shape[:2], -1) for a in (k, v)))[0], k, v
        assert context.source is not None
        q, k, v = self.heads(q, self.k_proj(_placed(context.source, context.source_places)), self.v_proj(context.source))
        if memory is not None:
            memory.keep_source(k, v)
        return q, k, v

    def _projected(self, x: Array, places: Array | None) -> tuple[Array, Array, Array]:
        cfg = self.config
        if cfg.qkv == "separate":
            asked = _placed(x, places)
            return self.q_proj(asked), self.k_proj(asked), self.v_proj(x)
        joined = self.qkv_proj(x)
        if cfg.qkv == "per_head":
            by_head = joined.reshape(*x.shape[:2], cfg.heads, 3, cfg.head_dim)
            q, k, v = (by_head[..., i, :].reshape(*x.shape[:2], -1) for i in range(3))
        else:
            inner = cfg.heads * cfg.head_dim
            q, k, v = jnp.split(joined, (inner, inner + cfg.kv_heads * cfg.head_dim), axis=-1)
        return q, k, v

    def relative(self, q: Array, k: Array, context: Context, layer: Array | int) -> Array:
        """Scores from relative positions, (rows, heads, queries, keys) float32: arXiv:2006.03654, eq. 4, without the scale.

        Args:
            q, k: (rows, length, heads, head_dim).
        """
        cfg = self.config
        of = cfg.relative
        assert of is not None and context.relative is not None
        table = context.drop(context.relative, layer, 4)
        rows = of.rows(q.shape[1])

        def scores(tokens: Array, project: Callable[[Array], Array], keys_first: bool) -> Array:
            # (1, distances, heads, head_dim); as many as there are rows where each row of the batch has its own adapter
            positions = project(table)[:, rows].reshape(-1, len(rows), cfg.heads, cfg.head_dim)
            met = jnp.matmul(tokens.transpose(0, 2, 1, 3), positions.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32)
            return of_pairs(met, keys_first=keys_first)

        found = []
        if of.c2p:
            found.append(scores(q, self.k_proj if of.shared else self.pos_k_proj, False))
        if of.p2c:
            found.append(scores(k, self.q_proj if of.shared else self.pos_q_proj, True))
        return sum(found[1:], found[0])

    def mix(self, q: Array, k: Array, v: Array, mask: Array, context: Context, layer: Array | int) -> Array:
        """softmax(scale * (q k^T + relative) + bias) v: the values each query asks for, (rows, queries, heads * head_dim).

        Args:
            q: (rows, queries, heads, head_dim).
            k, v: (rows, keys, kv_heads, head_dim).
            mask: (rows, 1, queries, keys) bool.
        """
        cfg = self.config
        bias, place = (None, 6) if self.cross else (context.bias, 0)
        rows, length, _, head_dim = q.shape
        grouped = q.reshape(rows, length, k.shape[2], -1, head_dim)  # query heads by the key head they share
        scores = jnp.einsum("rqkgd,rskd->rkgqs", grouped, k, preferred_element_type=jnp.float32)
        if context.relative is not None and not self.cross:
            scores = scores + self.relative(q, k, context, layer).reshape(scores.shape)
        scores = scores * cfg.scale
        if bias is not None:
            scores = scores + bias.reshape(-1, *scores.shape[1:])
        if cfg.softcap is not None:
            scores = cfg.softcap * jnp.tanh(scores / cfg.softcap)
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
        shares = context.drop(jax.nn.softmax(scores, axis=-1).astype(q.dtype), layer, place)
        return jnp.einsum("rkgqs,rskd->rqkgd", shares, v).reshape(rows, length, -1)


def _placed(x: Array, places: Array | None) -> Array:
    return x if places is None else x + places.astype(x.dtype)


class Block(nnx.Module):
    """Attention (over an encoder's output too, in its decoder) and MLP, each added to the residual stream.

    Where they are normed is `BlockConfig.norm_at`.
    """

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        self.attn = Attention(cfg, rngs=rngs)
        self.mlp = MLP(cfg, rngs=rngs) if cfg.experts is None else MixtureOfExperts(cfg, rngs=rngs)
        if cfg.norm_at != "output":
            self.attn_norm = norm_of(cfg, cfg.width, rngs=rngs)
            self.mlp_norm = norm_of(cfg, cfg.width, rngs=rngs)
        if cfg.norm_at in ("output", "both"):
            self.attn_out_norm = norm_of(cfg, cfg.width, rngs=rngs)
            self.mlp_out_norm = norm_of(cfg, cfg.width, rngs=rngs)
        if cfg.cross:
            self.cross_attn = Attention(cfg, cross=True, rngs=rngs)
            self.cross_attn_norm = norm_of(cfg, cfg.width, rngs=rngs)
        if cfg.layer_scale:
            for name in ("attn_scale", "mlp_scale"):
                setattr(self, name, nnx.Param(jnp.ones(cfg.width, cfg.dtype)))
                getattr(self, name).set_metadata(AXES, ("norm",))
        self.config = nnx.static(cfg)

    def __call__(self, x: Array, context: Context, layer: Array | int, gather: Array | None = None, memory: Memory | None = None) -> Array:
        """(rows, length, width) -> the same, or (n, width) at the positions `gather` (see `Stack`), where nothing is crossed."""
        cfg = self.config
        rows = None if gather is None else Rows(gather, x.shape[:2])
        if context.entering is not None:
            x = x + jax.lax.dynamic_index_in_dim(context.entering, layer, keepdims=False).astype(x.dtype)

        def add(x: Array, change: Array, place: int) -> Array:
            change = context.drop(change, layer, place, rows)
            return x + (change if cfg.residual_scale == 1.0 else change * cfg.residual_scale)

        def attend(x: Array) -> Array:
            return self.attn(x, context, layer, rows, memory)

        def cross(x: Array) -> Array:
            return self.cross_attn(x, context, layer, rows, memory)

        def transform(x: Array) -> Array:
            return self.mlp(x, rows)

        kept = take_positions(x, gather)
        if cfg.norm_at == "residual":
            x = self.attn_norm(add(kept, attend(x), 1))
            x = self.cross_attn_norm(add(x, cross(x), 7)) if cfg.cross else x
            return self.mlp_norm(add(x, transform(x), 2))
        attended = add(kept, self._branch("attn", attend, x, layer), 1)
        if cfg.cross:
            attended = add(attended, self._branch("cross_attn", cross, attended, layer), 7)
        return add(attended, self._branch("mlp", transform, kept if cfg.parallel else attended, layer), 2)

    def _branch(self, name: str, run: Callable[[Array], Array], x: Array, layer: Array | int) -> Array:
        """`run` with the norms on its input and output, and the gains of its output, that there are."""
        if self.config.norm_at != "output":
            normed = getattr(self, f"{name}_norm")(x)
            # All layers of a stack are one program: the layer without a norm computes it like the others and leaves it.
            x = normed if self.config.first_norm or name != "attn" else jnp.where(jnp.equal(layer, 0), x, normed)
        y = run(x)
        y = getattr(self, f"{name}_out_norm")(y) if self.config.norm_at in ("output", "both") else y
        return y * getattr(self, f"{name}_scale")[...] if self.config.layer_scale else y
