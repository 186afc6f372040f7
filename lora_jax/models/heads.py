"""Models that answer a task: a base, and what turns its hidden states into class logits.

All of them, and `Decoder` itself through `LanguageModel`, have one face for the training step:
`features(batch, noise) -> (n, width)` at the batch's target positions (with the base's dropout if there is a key `noise`), and
`readout()`, the function (n, width) -> (n, classes) that makes logits of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from ..parallel.constraints import by_rows, row_groups
from .decoder import Decoder
from .encoder import Encoder
from .layers import Array, dropout, linear


class TaskModel(Protocol):
    """What the training step asks of a model."""

    def features(self, batch: Mapping[str, Array], noise: Array | None = None) -> Array:
        """(n, width): what the head sees, for each target of a batch."""
        ...

    def readout(self) -> Callable[[Array], Array]:
        """(n, width) features -> (n, classes) logits; on a mesh its weights are gathered here, so call this outside of loops."""
        ...


class SequenceClassifier(nnx.Module):
    """An encoder with a linear classifier over the first token (through BERT's pooler) or the mean of the tokens.

    Args:
        base: the encoder.
        classes: how many classes; the classifier is newly made, with weights ~ N(0, 0.02) as transformers does.
        pooling: `cls` or `mean`.
    """

    def __init__(self, base: Encoder, classes: int, pooling: str, *, rngs: nnx.Rngs):
        self.base = base
        width = base.config.block.width
        self.classifier = linear(width, classes, ("embed", "classes"), bias=True, dtype=jnp.float32, rngs=rngs)
        self.classifier.kernel[...] = 0.02 * jax.random.normal(rngs.params(), (width, classes))
        self.pooling = pooling

    def features(self, batch: Mapping[str, Array], noise: Array | None = None) -> Array:
        """(n, width): one pooled vector for each target of the batch."""
        rows = {k: batch[k] for k in ("tokens", "positions", "segment_ids")}
        if self.pooling == "cls":
            pooled = self.base.pool(self.base(**rows, gather=batch["target_index"], noise=noise))
            return pooled if noise is None or not self.base.dropout else dropout(pooled, self.base.dropout, noise)
        hidden = self.base(**rows, noise=noise)
        count = batch["target_index"].shape[0]
        # One matmul sums each example's tokens; padding has the id `count`, which no row of the one-hot matches.
        # On a mesh the rows, and the targets with them, are in groups, and an example is in one of them.
        groups = row_groups()
        ids = batch["example_ids"].reshape(groups, -1) - (count // groups) * jnp.arange(groups)[:, None]
        member = jax.nn.one_hot(ids, count // groups, dtype=jnp.float32)
        total = jnp.einsum("gtn,gtw->gnw", member, hidden.reshape(groups, -1, hidden.shape[-1]).astype(jnp.float32))
        return by_rows(total / jnp.maximum(member.sum(1), 1)[..., None]).reshape(count, -1)

    def readout(self) -> Callable[[Array], Array]:
        """(n, width) -> (n, classes) float32 logits."""
        return self.classifier


class LanguageModel(nnx.Module):
    """A decoder that predicts the token after each target position."""

    def __init__(self, base: Decoder):
        self.base = base

    def features(self, batch: Mapping[str, Array], noise: Array | None = None) -> Array:
        """(n, width): the hidden state at each target position."""
        return self.base.hidden(
            batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"], gather=batch["target_index"], noise=noise
        )

    def readout(self) -> Callable[[Array], Array]:
        """(n, width) -> (n, vocab) logits."""
        return self.base.readout()


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
