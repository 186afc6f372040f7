"""Losses by name. A task names one (`Task.objective`), and the training step is handed it.

An objective is a pure function (model, features, batch) -> (summed loss, summed right predictions), float32 scalars of one micro-batch:
`features` are what the model's `features(batch)` gave, (targets, width), and `batch` holds the targets. Both sums weigh each target by
`batch["target_weights"]`; the step divides by the weights' total. Where nothing is right or wrong the second is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..config.doors import Door
from ..models.heads import TaskModel
from ..parallel.constraints import by_rows, row_groups

# Logits of one chunk on one device at the most, in floats (16 MiB): few enough to stay in a CPU's cache between the passes over them.
CHUNK_FLOATS = 4 * 1024 * 1024

Objective = Callable[[TaskModel, jax.Array, dict[str, jax.Array]], tuple[jax.Array, jax.Array]]
OBJECTIVES: Door[Objective] = Door("objective", "lora_jax.tasks", "lora_jax.objectives")


def cross_entropy(model: TaskModel, features: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the readout's logits and `target_ids`, (targets,) int32."""
    return summed_cross_entropy(model.readout(), features, batch["target_ids"], batch["target_weights"])


def squared_error(model: TaskModel, features: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Squared error of the readout and `target_values`, (targets, width) float32: each target's is the mean over its numbers."""
    return summed_squared_error(model.readout()(features), batch["target_values"], batch["target_weights"]), jnp.float32(0)


OBJECTIVES.register("cross_entropy", cross_entropy)
OBJECTIVES.register("squared_error", squared_error)


def summed_squared_error(values: jax.Array, wanted: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum of weights * mean((value - wanted)^2), a float32 scalar.

    Args:
        values, wanted: (n, width).
        weights: (n,) float32, 0 where there is no target.
    """
    error = jnp.square(values.astype(jnp.float32) - wanted.astype(jnp.float32)).mean(-1)
    return jnp.sum(weights * error)


def summed_cross_entropy(
    head: Callable[[jax.Array], jax.Array], features: jax.Array, ids: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy and summed correct predictions.

    The gradient of a chunk is taken while its logits are at hand, so that they are neither kept nor computed twice: the loss is a
    sum, and its gradient by the features is known in the forward pass but for a factor. Only what is being differentiated gets a
    gradient: a frozen vocabulary matrix costs one product forward and one back.

    Args:
        head: (m, width) -> (m, classes) logits; may close over anything, differentiated or not.
        features: (n, width).
        ids: (n,) int32, the right class.
        weights: (n,) float32, 0 where there is no label.

    Returns:
        two float32 scalars: sum of weights * -log p, and sum of weights where the right logit is larger than all others (no gradient).
    """
    classes = jax.eval_shape(head, features[:1]).shape[-1]
    # On a mesh the features are in groups, each with its own devices: every chunk has a part of each.
    groups = row_groups()
    own = features.shape[0] // groups
    chunks = max(1, -(-own * classes // CHUNK_FLOATS))
    size = -(-own // chunks)
    # What `head` closes over and is being differentiated becomes an argument; the rest stays closed over. It is traced for the shape
    # of a chunk: some operations (a gather of columns) have the number of rows in them.
    pure_head, trained = jax.closure_convert(head, jnp.zeros((groups * size, *features.shape[1:]), features.dtype))

    def cut(x: jax.Array) -> jax.Array:
        grouped = by_rows(x.reshape(groups, own, *x.shape[1:]))
        padded = jnp.pad(grouped, [(0, 0), (0, chunks * size - own)] + [(0, 0)] * (x.ndim - 1))
        return jnp.moveaxis(padded.reshape(groups, chunks, size, *x.shape[1:]), 0, 1).reshape(chunks, groups * size, *x.shape[1:])

    def chunk_loss(trained: list[Any], features: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = by_rows(pure_head(by_rows(features), *trained)).astype(jnp.float32)
        right = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
        loss = jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - right))
        # Right where no other logit is as large: a tie says nothing. Counted, as an argmax over a vocabulary costs as much as its softmax.
        as_large = jnp.sum(jax.lax.stop_gradient(logits) >= jax.lax.stop_gradient(right)[:, None], axis=-1, dtype=jnp.int32)
        return loss, jnp.sum(weights * (as_large == 1))

    @jax.custom_vjp
    def total(trained: list[Any], features: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, correct = jax.lax.map(lambda c: chunk_loss(trained, *c), (features, ids, weights))
        return losses.sum(), correct.sum()

    def forward(trained: list[Any], features: jax.Array, ids: jax.Array, weights: jax.Array) -> Any:
        def one(grads: list[Any], chunk: tuple[jax.Array, ...]) -> Any:
            x, i, w = chunk
            (loss, correct), (more, dx) = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)(trained, x, i, w)
            return jax.tree.map(jnp.add, grads, more), (loss, correct, dx)

        grads, (losses, correct, dx) = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, trained), (features, ids, weights))
        return (losses.sum(), correct.sum()), (grads, dx)

    def backward(kept: tuple[list[Any], jax.Array], cotangents: tuple[jax.Array, jax.Array]) -> Any:
        grads, dx = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), kept)
        return grads, dx, None, None

    total.defvjp(forward, backward)
    return total(trained, cut(features), cut(ids), cut(weights))
