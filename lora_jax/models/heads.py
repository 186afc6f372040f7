"""Models that answer a task: a base, and what turns its hidden states into class logits.

All of them, and what predicts tokens by itself through `LanguageModel`, have one face for the training step:
`features(batch, dropout_rng) -> (n, width)` at the batch's target positions (with the base's dropout if there is a key),
`readout()`, the function (n, width) -> (n, classes) that makes logits of them, and `answers(features)`, what metrics other than the
loss are computed from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from ..parallel.constraints import by_rows, row_groups, take_positions
from .decoder import Decoder
from .encoder import Encoder
from .encoder_decoder import EncoderDecoder, Generative, TextBase
from .layers import HEAD_MODULES, Array, HeadShape, Rows, activation, dropout, head_shape, linear, norm, project
from .vision import VisionBase

# Logits of positions that are no part of a text: finite, so that no gradient is NaN.
NOWHERE = float(jnp.finfo(jnp.float32).min)


class TaskModel(Protocol):
    """What the training step asks of a model."""

    def features(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(n, width): what the head sees, for each target of a batch."""
        ...

    def readout(self) -> Callable[[Array], Array]:
        """(n, width) features -> (n, classes) logits; on a mesh its weights are gathered here, so call this outside of loops."""
        ...

    def answers(self, features: Array) -> Array | None:
        """(n, ...): what the task's own metrics are computed from; None where loss and right predictions suffice."""
        ...

    def trunk(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(rows, length, width): what enters the base's layers above its lowest cut. `features` of a batch that holds it start there."""
        ...


_ROWS = ("tokens", "positions", "segment_ids")


def rows_of(base: TextBase, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The arguments of `base.hidden` that a batch holds."""
    rows = {name: batch[name] for name in _ROWS}
    if isinstance(base, EncoderDecoder):
        rows |= {f"decoder_{name}": batch[f"decoder_{name}"] for name in _ROWS}
    if "token_types" in batch and isinstance(base, Encoder):
        # Some models have fewer types than their tokenizers tell apart (RoBERTa's has one).
        rows["token_types"] = jnp.minimum(batch["token_types"], max(base.config.token_types - 1, 0))
    return rows


class Classifier(nnx.Module):
    """A base with a classification head; the head is float32 whatever the base is.

    Called as `model(tokens, attention_mask=None, positions=None, segment_ids=None, token_types=None)` it gives the logits of one text
    a row: (batch, classes) float32, or (batch, seq, classes) where each token is read.

    Args:
        base: the encoder or decoder, or of `ImageClassifier` the base over images.
        shape: of the head.
        width: of what it reads; None: the base's.
        classes: how many. The head is newly made, with weights ~ N(0, 0.02) as transformers does.

    Attributes:
        kind: of the head (`head_shape.py`).
        new: the head's modules that a member draws by its own seed; none of a head that was loaded.
        class_names: of a head that was loaded, in order.
    """

    kind: str | None = None

    def __init__(self, base: Any, shape: HeadShape, classes: int, *, width: int | None = None, rngs: nnx.Rngs):
        self.base = base
        width = int(base.config.block.width if width is None else width)
        if shape.activation is not None:
            self.pre_classifier = linear(width, width, ("embed", "embed_out"), bias=shape.dense_bias, dtype=jnp.float32, rngs=rngs)
        if shape.norm:
            self.classifier_norm: Any = norm("layer", width, base.config.block.norm_eps, bias=shape.norm_bias, dtype=jnp.float32, rngs=rngs)
        self.classifier = linear(width, classes, ("embed", "classes"), bias=shape.bias, dtype=jnp.float32, rngs=rngs)
        for module in [self.classifier] if shape.activation is None else [self.pre_classifier, self.classifier]:
            module.kernel[...] = 0.02 * jax.random.normal(rngs.params(), module.kernel.shape)
        self.shape = nnx.static(shape)
        self.new: tuple[str, ...] = nnx.static(tuple(name for name in HEAD_MODULES if hasattr(self, name)))
        self.class_names: tuple[str, ...] = nnx.static(())

    @property
    def classes(self) -> int:
        """How many there are."""
        return self.classifier.kernel.shape[-1]

    def __call__(
        self,
        tokens: Array,
        attention_mask: Array | None = None,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        token_types: Array | None = None,
    ) -> Array:
        """Logits, (batch, classes) or (batch, seq, classes); see the class, and `Encoder.hidden` for the arguments."""
        rows = {"tokens": tokens, "attention_mask": attention_mask, "positions": positions, "segment_ids": segment_ids}
        hidden = self.base.hidden(**rows, **({} if token_types is None else {"token_types": token_types}))
        real = jnp.ones(tokens.shape, bool) if attention_mask is None else jnp.asarray(attention_mask) > 0
        if segment_ids is not None:
            real = segment_ids > 0
        if self.shape.reads == "each":
            return self.classifier(self._transform(hidden))
        if self.shape.reads == "mean":
            pooled = jnp.sum(hidden.astype(jnp.float32) * real[..., None], 1) / real.sum(1, keepdims=True)
        else:
            # Of what is real: padding may be on either side.
            at = real.argmax(1) if self.shape.reads == "first" else real.shape[1] - 1 - real[:, ::-1].argmax(1)
            pooled = jnp.take_along_axis(hidden, at[:, None, None], 1)[:, 0]
        return self.classifier(self._transform(pooled))

    def features(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(n, width): what the classifier sees, for each target of the batch."""
        mean = self.shape.reads == "mean"
        x = self._means(batch, self._hidden(batch, dropout_rng)) if mean else self._hidden(batch, dropout_rng, batch["target_index"])
        rows = Rows(batch["target_index"], batch["tokens"].shape)
        x = self._transform(x, rows)
        return x if mean or dropout_rng is None or not self.base.dropout else dropout(x, self.base.dropout, dropout_rng, rows)

    def readout(self) -> Callable[[Array], Array]:
        """(n, width) -> (n, classes) float32 logits."""
        return self.classifier

    def answers(self, features: Array) -> Array | None:
        """None: the loss and the right predictions suffice."""
        return None

    def trunk(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(rows, length, width): what enters the base's layers above its lowest cut."""
        return self.base.trunk(**rows_of(self.base, batch), dropout_rng=dropout_rng)

    def _hidden(self, batch: Mapping[str, Array], dropout_rng: Array | None, gather: Array | None = None) -> Array:
        return self.base.hidden(**rows_of(self.base, batch), gather=gather, dropout_rng=dropout_rng, trunk=batch.get("trunk"))

    def _transform(self, x: Array, rows: Rows | None = None) -> Array:
        """What stands between the hidden states (..., width) and the classifier; `rows` says where a gathered `x` is."""
        if self.shape.reads == "first" and self.shape.pooler and isinstance(self.base, Encoder):
            x = self.base.pool(x, rows)
        if self.shape.activation is not None:
            x = activation(self.shape.activation, project(self.pre_classifier, x, rows=rows))
        return self.classifier_norm(x) if self.shape.norm else x

    def _means(self, batch: Mapping[str, Array], hidden: Array) -> Array:
        """(n, width) float32: the mean over each example's tokens."""
        count = batch["target_index"].shape[0]
        # One matmul sums each example's tokens; padding has the id `count`, which no row of the one-hot matches.
        # On a mesh the rows, and the targets with them, are in groups, and an example is in one of them.
        groups = row_groups()
        ids = batch["example_ids"].reshape(groups, -1) - (count // groups) * jnp.arange(groups)[:, None]
        member = jax.nn.one_hot(ids, count // groups, dtype=jnp.float32)
        total = jnp.einsum("gtn,gtw->gnw", member, hidden.reshape(groups, -1, hidden.shape[-1]).astype(jnp.float32))
        return by_rows(total / jnp.maximum(member.sum(1), 1)[..., None]).reshape(count, -1)


class SequenceClassifier(Classifier):
    """A base with a head for one class a text: over its first token (a decoder's last), or the mean of its tokens.

    Args:
        pooling: `cls` or `mean`.
    """

    kind = "classification"

    def __init__(self, base: Encoder | Decoder, classes: int, pooling: str = "cls", *, rngs: nnx.Rngs):
        shape = head_shape(base.head_shapes, "classification", decoder=base.is_decoder)
        super().__init__(base, shape if pooling == "cls" else dataclasses.replace(shape, reads="mean"), classes, rngs=rngs)

    def answers(self, features: Array) -> Array:
        """(n,) int32: the class of each text."""
        return self.readout()(features).argmax(-1).astype(jnp.int32)


class RewardModel(SequenceClassifier):
    """A base with a head that scores a text by one number. Its kind is that of a classifier with one class, as in transformers."""

    def __init__(self, base: Encoder | Decoder, *, rngs: nnx.Rngs):
        super().__init__(base, 1, rngs=rngs)

    def answers(self, features: Array) -> Array:
        """(n,) float32: the scores."""
        return self.readout()(features)[:, 0]


class TokenClassifier(Classifier):
    """A base with a head for a class of each token."""

    kind = "token_classification"

    def __init__(self, base: Encoder | Decoder, classes: int, *, rngs: nnx.Rngs):
        super().__init__(base, head_shape(base.head_shapes, "token_classification", decoder=base.is_decoder), classes, rngs=rngs)

    def answers(self, features: Array) -> Array:
        """(n,) int32: the class of each target."""
        return self.readout()(features).argmax(-1).astype(jnp.int32)


class QuestionAnswerer(Classifier):
    """A base with a head that says of each token how likely an answer starts, and how likely it ends there: two logits a token.

    A batch has two targets for each example: at its first token the position where the answer starts, at its second where it ends,
    both counted from the example's first token. The classes of a target are then the positions of its example.
    """

    kind = "question_answering"

    def __init__(self, base: Encoder | Decoder, *, rngs: nnx.Rngs):
        super().__init__(base, head_shape(base.head_shapes, "question_answering", decoder=base.is_decoder), 2, rngs=rngs)

    def features(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(n, length) float32: for each target the logits of its example's positions, from the first on; `NOWHERE` after the last."""
        logits = self.classifier(self._transform(self._hidden(batch, dropout_rng)))
        index, length = batch["target_index"], batch["tokens"].shape[1]
        side = _at(batch["positions"], index)  # 0 for a start, 1 for an end
        first = index - side
        there = first[:, None] + jnp.arange(length)
        inside = there // length == first[:, None] // length
        there = jnp.minimum(there, (first // length * length + length - 1)[:, None]).reshape(-1)
        both = take_positions(logits, there).reshape(*inside.shape, 2)
        own = _at(batch["segment_ids"], there).reshape(inside.shape) == _at(batch["segment_ids"], first)[:, None]
        return jnp.where(inside & own, jnp.take_along_axis(both, side[:, None, None], 2)[..., 0], NOWHERE)

    def readout(self) -> Callable[[Array], Array]:
        """The features are the logits."""
        return lambda features: features

    def answers(self, features: Array) -> Array:
        """(n, length) float32: the logits."""
        return features


def _at(x: Array, index: Array) -> Array:
    """Numbers (rows, length) at flattened positions (n,)."""
    return take_positions(x[..., None], index)[:, 0]


# How many classes of an image are answered, the likeliest first.
TOP = 5


class ImageClassifier(Classifier):
    """A base over images with a head for one class each. Called as `model(pixels)` it gives float32 logits (batch, classes).

    A batch holds `pixels`, (rows, height, width, channels) uint8; a target's index is that of its image's first position.
    """

    kind = "image_classification"

    def __init__(self, base: VisionBase, classes: int, *, rngs: nnx.Rngs):
        shape = dict(base.head_shapes).get("image_classification") or HeadShape(base.reads)
        super().__init__(base, shape, classes, width=base.pooled_width(shape.reads), rngs=rngs)

    def __call__(self, pixels: Array) -> Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Logits (batch, classes) of normalised pixels (batch, height, width, channels) float32."""
        return self.classifier(self._transform(self.base.pooled(self.base.hidden(pixels), self.shape.reads)))

    def features(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(n, width): what the classifier sees, for each target of the batch."""
        pixels, options = self.base.normalised(batch["pixels"]), {"dropout_rng": dropout_rng, "trunk": batch.get("trunk")}
        if self.shape.reads == "first":  # the top layer is then run for these tokens alone
            at = batch["target_index"]
            hidden = self.base.hidden(pixels, gather=at, **options).astype(jnp.float32)
            return self._transform(hidden, Rows(at, batch["segment_ids"].shape))
        hidden = self.base.hidden(pixels, **options)
        x = self._transform(self.base.pooled(hidden, self.shape.reads))
        return take_positions(x[:, None], batch["target_index"] // batch["segment_ids"].shape[1])

    def trunk(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(rows, tokens, width): what enters the base's layers above its lowest cut."""
        return self.base.trunk(self.base.normalised(batch["pixels"]), dropout_rng=dropout_rng)

    def answers(self, features: Array) -> Array:
        """(n, up to TOP) int32: the likeliest classes of each image, the likeliest first."""
        logits = self.readout()(features)
        return jax.lax.top_k(logits, min(TOP, logits.shape[-1]))[1].astype(jnp.int32)


class LanguageModel(nnx.Module):
    """A decoder, or an encoder-decoder's, that predicts the token after each target position."""

    def __init__(self, base: Generative):
        self.base = base

    def features(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(n, width): the hidden state at each target position."""
        return self.base.hidden(
            **rows_of(self.base, batch), gather=batch["target_index"], dropout_rng=dropout_rng, trunk=batch.get("trunk")
        )

    def trunk(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(rows, length, width): what enters the base's layers above its lowest cut."""
        return self.base.trunk(**rows_of(self.base, batch), dropout_rng=dropout_rng)

    def readout(self) -> Callable[[Array], Array]:
        """(n, width) -> (n, vocab) logits."""
        return self.base.readout()

    def answers(self, features: Array) -> Array | None:
        """None: the metrics follow from the loss and the right predictions."""
        return None


class HiddenStates(nnx.Module):
    """A base whose last hidden states are themselves the answer: what a distillation compares with a teacher's."""

    def __init__(self, base: TextBase):
        self.base = base

    def features(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(n, width): the hidden state at each target position."""
        return self.base.hidden(
            **rows_of(self.base, batch), gather=batch["target_index"], dropout_rng=dropout_rng, trunk=batch.get("trunk")
        )

    def trunk(self, batch: Mapping[str, Array], dropout_rng: Array | None = None) -> Array:
        """(rows, length, width): what enters the base's layers above its lowest cut."""
        return self.base.trunk(**rows_of(self.base, batch), dropout_rng=dropout_rng)

    def readout(self) -> Callable[[Array], Array]:
        """The features are the answer."""
        return lambda features: features

    def answers(self, features: Array) -> Array | None:
        """None: the loss is the only metric."""
        return None


class ProjectedStates(HiddenStates):
    """A base whose last hidden states a trained linear layer takes to another width.

    Args:
        width: that one.

    Attributes:
        classifier: the layer; called as a head's is, it trains like one, with the member's own draw.
    """

    def __init__(self, base: TextBase, width: int, *, rngs: nnx.Rngs):
        super().__init__(base)
        own = base.config.block.width
        self.classifier = linear(own, width, ("embed", "embed_out"), bias=True, dtype=jnp.float32, rngs=rngs)
        self.new: tuple[str, ...] = nnx.static(("classifier",))

    def readout(self) -> Callable[[Array], Array]:
        """(n, width of the base) -> (n, width) float32."""
        return self.classifier


class LabelWordClassifier(LanguageModel):
    """A decoder that classifies by which class's word comes next.

    Args:
        word_ids: the first token of each class's word.
    """

    def __init__(self, base: Decoder, word_ids: tuple[int, ...]):
        super().__init__(base)
        self.word_ids = nnx.static(word_ids)

    def readout(self) -> Callable[[Array], Array]:
        """(n, width) -> (n, classes): the logits of the classes' words."""
        whole = self.base.readout()
        return lambda features: whole(features)[..., jnp.array(self.word_ids)]

    def answers(self, features: Array) -> Array:
        """(n,) int32: the class of each text. One text at a time: the logits of a whole vocabulary are made of each."""
        readout = self.readout()
        return jax.lax.map(lambda row: readout(row[None])[0].argmax(-1).astype(jnp.int32), features)
