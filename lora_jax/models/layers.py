"""What every model is made of: linear layers, embeddings, norms, the MLP, the shape of a head. One implementation each.

Every parameter carries logical axis names in its metadata (`axes`); `parallel/` turns them into shardings. A stacked parameter
has the axis `layers` in front. Names: `vocab`, `embed` (the residual width), `heads` and `kv_heads` (heads * head width),
`mlp` (hidden units), `experts`, `positions`, `norm`, `classes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..parallel.constraints import gathered, look_up, take_positions
from .positions import Relative, Rotary

# The kinds of head a base can bear, beside a decoder's own vocabulary projection; a config's `task.kind` says the same words.
HEADS = ("classification", "token_classification", "question_answering", "image_classification", "object_detection")
# A head's modules, all of which train with it.
HEAD_MODULES = ("pre_classifier", "classifier_norm", "classifier", "detection_tokens", "class_predictor", "box_predictor")


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """A head, but for how many classes it has.

    Attributes:
        reads: the hidden state of the `first` or `last` token of each text, the `mean` over them, or `each` of them by itself. Of an image
            the `first` token, the `mean` of its patches, or both (`first_mean`).
        pooler: whether the first token goes through the base's own pooler, where it has one (BERT).
        activation: of a dense layer before the classifier (`tanh`, `relu`, `gelu`, ...); None where there is no such layer.
        dense_bias: whether that layer has a bias.
        norm: whether a layer norm follows it.
        norm_bias: whether that norm has a bias.
        bias: whether the classifier has one.
    """

    reads: str = "first"
    pooler: bool = False
    activation: str | None = None
    dense_bias: bool = True
    norm: bool = False
    norm_bias: bool = False
    bias: bool = True


# What a base that was not loaded, or whose family says nothing else, takes.
_ENCODER = {
    "classification": HeadShape(pooler=True),
    "token_classification": HeadShape("each"),
    "question_answering": HeadShape("each"),
}
_DECODER = _ENCODER | {"classification": HeadShape("last", bias=False)}


def head_shape(shapes: tuple[tuple[str, HeadShape], ...], kind: str, *, decoder: bool) -> HeadShape:
    """The shape of a head on a base: what its family says in `shapes`, else a linear layer alone."""
    return dict(shapes).get(kind) or (_DECODER if decoder else _ENCODER)[kind]


Array = jax.Array

# Metadata key of a parameter's logical axis names, one an array axis.
AXES = "axes"

# Metadata key of variables that belong to one segment alone (value True): their leading axis counts the segment's layers, and they
# are given to the scan as its inputs, so that their gradient is stacked by it. All others hold every layer of the stack and are
# indexed.
PER_SEGMENT = "per_segment"
# Likewise, of a running statistic that a forward pass in training updates (value True): each member has its own.
UPDATED = "updated"
# Likewise, of a variable that all layers of a stack see whole: it has no layers in front.
OF_ALL_LAYERS = "of_all_layers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The shape and options of one transformer layer.

    Attributes:
        width: residual width.
        heads, kv_heads: query heads, and key/value heads (fewer: grouped-query attention).
        head_dim: width of one head.
        hidden: width of the MLP's hidden layer.
        activation: `gelu` (exact), `gelu_tanh`, `gelu_quick`, `silu`, `relu` or `tanh`.
        gated: MLP computes `down(act(gate(x)) * up(x))` in place of `down(act(up(x)))`.
        norm: `layer` or `rms`.
        norm_bias: whether a layer norm has a bias.
        norm_offset: an RMS norm multiplies by its weight plus this (Gemma: 1).
        norm_at: on the `input` of attention and MLP (Llama), their `output` (OLMo 2), on `both` (Gemma 2), or on the `residual` sum
            after them (BERT).
        first_norm: whether attention's input has a norm in layer 0 too; where it has none (ModernBERT), that layer's norm is not used.
        parallel: attention and MLP both see the layer's input (GPT-NeoX); else the MLP sees attention's sum.
        qkv_bias, out_bias, mlp_bias: whether the projections to queries, keys and values, attention's output projection, and the MLP's
            have biases.
        qkv: queries, keys and values by `separate` projections; `joined` in one (all queries, all keys, all values); or joined
            `per_head` (the first head's query, key and value, the second's, ...).
        joined_gate: gate and up in one projection, gate first.
        experts: as many gated MLPs stand in the MLP's place, and a router sends each token through `experts_used` of them; None for
            the one MLP.
        experts_normed: whether the shares of the experts that a token goes through are scaled to add up to 1.
        qk_norm: norm of queries and keys: over each `head`, over the `whole` projection, or None.
        attention_scale: what scores are multiplied by; None for head_dim^-0.5.
        relative: scores that follow from relative positions, beside those of queries and keys; None for none.
        softcap: scores s become softcap * tanh(s / softcap); None for s.
        residual_scale: what attention's and the MLP's outputs are multiplied by before they are added.
        layer_scale: whether what attention and the MLP add is multiplied by trained gains (arXiv:2103.17239, eq. 4).
        cross: whether attention over an encoder's output stands between self-attention and the MLP, normed on its input or on the
            residual sum as these are.
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
    norm_bias: bool = True
    norm_offset: float = 0.0
    norm_at: str = "input"
    first_norm: bool = True
    parallel: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qkv: str = "separate"
    joined_gate: bool = False
    experts: int | None = None
    experts_used: int = 1
    experts_normed: bool = True
    qk_norm: str | None = None
    attention_scale: float | None = None
    relative: Relative | None = None
    softcap: float | None = None
    residual_scale: float = 1.0
    layer_scale: bool = False
    cross: bool = False
    dtype: Any = jnp.float32

    @property
    def scale(self) -> float:
        """What attention's scores are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Where in a batch the rows of a gathered activation (n, width) are: a model's top layer computes a few positions only.

    Attributes:
        index: (n,) int32, positions of the flattened batch (rows * length).
        shape: (rows, length) of the batch; static.
    """

    index: Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def project(module: Any, *inputs: Array, rows: Rows | None) -> Array:
    """`module(*inputs)`; a module with `takes_rows = True` (what a caller put in a layer's place) also gets `rows`.

    Args:
        module: a linear layer, or what replaced it.
        rows: where the rows of a gathered input are; None where the input is not gathered.
    """
    return module(*inputs, rows=rows) if getattr(module, "takes_rows", False) else module(*inputs)


def uniform(key: Array, x: Array, rows: Rows | None = None) -> Array:
    """Float32 numbers in [0, 1) of the shape of `x`.

    A number belongs to a position of the batch: a gathered `x` gets the numbers that its positions have in the whole batch.
    """
    if rows is None:
        return jax.random.uniform(key, x.shape)
    return take_positions(jax.random.uniform(key, (*rows.shape, x.shape[-1])), rows.index)


def dropout(x: Array, rate: float, key: Array, rows: Rows | None = None) -> Array:
    """`x` with a fraction `rate` of its values set to 0 and the others scaled by 1 / (1 - rate); `rows` as for `uniform`."""
    return jnp.where(uniform(key, x, rows) < 1.0 - rate, x / (1.0 - rate), 0).astype(x.dtype)


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

    def projection(self) -> Callable[[Array], Array]:
        """(..., width) -> (..., rows): the product with every row. On a mesh the table is gathered when this is called."""
        table = gathered(self.embedding[...], self.embedding.get_metadata().get(AXES))
        return lambda hidden: jnp.dot(hidden, table.astype(hidden.dtype).T)


def embedding(rows: int, width: int, axis: str, *, dtype: Any, rngs: nnx.Rngs) -> Embedding:
    """An `Embedding` of `rows` vectors whose rows lie along the logical axis `axis`."""
    return Embedding(rows, width, dtype=dtype, param_dtype=dtype, embedding_metadata={AXES: (axis, "embed")}, rngs=rngs)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + scale) over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float, offset: float, *, dtype: Any):
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, dtype))
        self.scale.set_metadata(AXES, ("norm",))
        self.eps, self.offset, self.dtype = eps, offset, dtype

    def __call__(self, x: Array) -> Array:
        x, scale = x.astype(jnp.float32), self.scale[...].astype(jnp.float32)
        scale = scale + self.offset if self.offset else scale
        return (x * (jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * scale)).astype(self.dtype)


def norm(
    kind: str, width: int, eps: float, *, bias: bool = True, offset: float = 0.0, dtype: Any, rngs: nnx.Rngs
) -> nnx.LayerNorm | RMSNorm:
    """A layer norm (with a bias or without) or RMS norm over the last axis, computed in float32 (two-pass variance, as PyTorch does)."""
    if kind == "rms":
        return RMSNorm(width, eps, offset, dtype=dtype)
    shared = {"epsilon": eps, "dtype": dtype, "param_dtype": dtype, "use_fast_variance": False, "rngs": rngs}
    return nnx.LayerNorm(width, use_bias=bias, scale_metadata={AXES: ("norm",)}, bias_metadata={AXES: ("norm",)}, **shared)


def norm_of(cfg: BlockConfig, width: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm | RMSNorm:
    """A norm as the block has them."""
    return norm(cfg.norm, width, cfg.norm_eps, bias=cfg.norm_bias, offset=cfg.norm_offset, dtype=cfg.dtype, rngs=rngs)


def activation(name: str, x: Array) -> Array:
    """Applies the named activation; `gelu` is the exact one, with erf."""
    if name == "gelu":
        # `jax.nn.gelu` takes erfc here, whose branches cost a CPU several times as much; PyTorch takes erf too.
        return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))
    if name == "gelu_quick":
        return x * jax.nn.sigmoid(1.702 * x)
    if name == "relu6":
        return jnp.clip(x, 0, 6)
    return {"gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu, "relu": jax.nn.relu, "tanh": jnp.tanh}[name](x)


def gated(name: str, gate: Array, up: Array) -> Array:
    """The hidden units of a gated MLP."""
    return activation(name, gate) * up


def row_layout(tokens: Array, mask: Array | None, positions: Array | None, segment_ids: Array | None) -> tuple[Array, Array]:
    """Segment ids and positions, (batch, seq) int32 each, with their defaults filled in from the attention mask and the shape."""
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens) if mask is None else mask.astype(jnp.int32)
    if positions is None:
        positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    return segment_ids, positions


class MLP(nnx.Module):
    """Two-layer perceptron, gated or plain."""

    def __init__(self, cfg: BlockConfig, *, rngs: nnx.Rngs):
        shared = {"bias": cfg.mlp_bias, "dtype": cfg.dtype, "rngs": rngs}
        if cfg.joined_gate:
            self.gate_up_proj = linear(cfg.width, 2 * cfg.hidden, ("embed", "mlp"), **shared)
        else:
            if cfg.gated:
                self.gate_proj = linear(cfg.width, cfg.hidden, ("embed", "mlp"), **shared)
            self.up_proj = linear(cfg.width, cfg.hidden, ("embed", "mlp"), **shared)
        self.down_proj = linear(cfg.hidden, cfg.width, ("mlp", "embed"), **shared)
        self.config = nnx.static(cfg)

    def __call__(self, x: Array, rows: Rows | None = None) -> Array:
        """(..., width) -> the same; `rows` says where the rows of a gathered `x` are."""
        name = self.config.activation
        if self.config.joined_gate:
            hidden = gated(name, *jnp.split(project(self.gate_up_proj, x, rows=rows), 2, axis=-1))
        elif self.config.gated:
            hidden = gated(name, project(self.gate_proj, x, rows=rows), project(self.up_proj, x, rows=rows))
        else:
            hidden = activation(name, project(self.up_proj, x, rows=rows))
        return project(self.down_proj, hidden, rows=rows)


@dataclasses.dataclass(frozen=True)
class LayerType:
    """What layers of one stack may differ in.

    Attributes:
        window: how far a query sees: keys less than so many positions away; None for all.
        rotary: its rotary positions, or None.
    """

    window: int | None = None
    rotary: Rotary | None = None
