"""Losses by name. A task names one (`Task.objective`), or makes one of its section (`Task.loss`), and the training step is handed it.

An objective is a pure function (model, features, batch) -> (summed loss, summed right predictions), float32 scalars of one micro-batch:
`features` are what the model's `features(batch)` gave, (targets, width), and `batch` holds the targets. Both sums weigh each target by
`batch["target_weights"]`, or each example by `batch["example_weights"]` where examples are several texts; the step divides by the
weights' total (`total_weight`). Where nothing is right or wrong the second is 0. What else is to be known of the batch may come third:
name -> (sum, weight), float32 scalars without a gradient, whose quotient over the batches is logged and is a metric of this name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..config.doors import Door
from ..models.heads import TaskModel
from ..parallel.constraints import by_rows, row_groups

# Logits of one chunk on one device at the most, in floats (16 MiB): few enough to stay in a CPU's cache between the passes over them.
CHUNK_FLOATS = 4 * 1024 * 1024

Means = dict[str, tuple[jax.Array, jax.Array]]
Objective = Callable[[TaskModel, jax.Array, dict[str, jax.Array]], tuple[jax.Array, jax.Array] | tuple[jax.Array, jax.Array, Means]]
OBJECTIVES: Door[Objective] = Door("objective", "lora_jax.tasks", "lora_jax.objectives")


def sums_of(objective: Objective, model: TaskModel, features: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, Means]:
    """An objective's loss, right predictions, and what else it says: nothing of most."""
    loss, right, *more = objective(model, features, batch)
    return loss, right, more[0] if more else {}


def held_out(objective: Any) -> Any:
    """What members are evaluated by: the objective itself, but for one with a teacher, who is asked in training alone (`held_out`)."""
    return getattr(objective, "held_out", objective)


def total_weight(batch: dict[str, Any]) -> Any:
    """What the mean of a loss is over: the number of a batch's examples where those are counted, else of its targets. NumPy or JAX."""
    return batch.get("example_weights", batch["target_weights"]).sum()


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
    chunked = _Chunked.of(head, features)

    def chunk_loss(trained: list[Any], features: jax.Array, ids: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, right, loss = chunked.losses(trained, features, ids)
        return jnp.sum(weights * loss), jnp.sum(weights * _is_right(logits, right))

    return _summed(chunked, chunk_loss, features, ids, weights)


def _is_right(logits: jax.Array, right: jax.Array) -> jax.Array:
    """(n,) whether no other logit is as large as the right one: a tie says nothing. No gradient."""
    # Counted, as an argmax over a vocabulary costs as much as its softmax.
    as_large = jnp.sum(jax.lax.stop_gradient(logits) >= jax.lax.stop_gradient(right)[:, None], axis=-1, dtype=jnp.int32)
    return as_large == 1


def summed_distillation(
    head: Callable[[jax.Array], jax.Array],
    features: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float,
    alpha: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Summed alpha T^2 KL(teacher || student) + (1 - alpha) cross-entropy, both distributions softened by T (Hinton et al.,
    arXiv:1503.02531, section 2). Gradients are taken while logits are at hand, as in `summed_cross_entropy`.

    Args:
        head, features, ids, weights: as for `summed_cross_entropy`.
        teacher: what `taught` made of the teacher's logits, (n, ...) float32.
        temperature: T, the teacher's.
        alpha: 0 to 1.

    Returns:
        four float32 scalars, sums over targets times their weights: the loss; and without gradients right predictions, the cross-entropy
        and the divergence.
    """
    chunked = _Chunked.of(head, features)

    def chunk_loss(trained: list[Any], x: jax.Array, ids: jax.Array, weights: jax.Array, teacher: jax.Array) -> tuple[jax.Array, Any]:
        logits, right, loss = chunked.losses(trained, x, ids)
        apart = divergence(logits / temperature, teacher)
        both = alpha * temperature**2 * apart + (1 - alpha) * loss
        return jnp.sum(weights * both), (jnp.sum(weights * _is_right(logits, right)), jnp.sum(weights * loss), jnp.sum(weights * apart))

    loss, (correct, plain, apart) = _summed(chunked, chunk_loss, features, ids, weights, teacher)
    return loss, correct, plain, apart


def taught(logits: jax.Array, top: int | None) -> jax.Array:
    """What is kept of a teacher's logits, already divided by the temperature, as float32.

    Args:
        logits: (n, classes).
        top: how many classes are told apart, the likeliest ones; all where it is None or not below their number.

    Returns:
        (n, classes) logarithms of probabilities; or (n, 2 top + 1): those of the likeliest classes, which these are, and of all the rest
        together.
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    if top is None or top >= logits.shape[-1]:
        return logs
    values, ids = jax.lax.top_k(logs, top)
    return jnp.concatenate([values, ids.astype(jnp.float32), _rest(logs, ids)], axis=-1)  # a float32 holds ids below 2^24


def divergence(logits: jax.Array, teacher: jax.Array) -> jax.Array:
    """(n,) KL(teacher || student) of logits (n, classes); where the teacher's likeliest classes alone are known, of the distribution over
    these and all the rest together, which is at most that over all classes."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    if teacher.shape[-1] != logits.shape[-1]:
        top = teacher.shape[-1] // 2
        ids = teacher[:, top : 2 * top].astype(jnp.int32)
        logs = jnp.concatenate([jnp.take_along_axis(logs, ids, axis=-1), _rest(logs, ids)], axis=-1)
        teacher = jnp.concatenate([teacher[:, :top], teacher[:, 2 * top :]], axis=-1)
    return jnp.sum(jnp.exp(teacher) * (teacher - logs), axis=-1)


def _rest(logs: jax.Array, ids: jax.Array) -> jax.Array:
    """(n, 1): the logarithm of the probability of all classes but `ids` (n, top) together."""
    others = logs.at[jnp.arange(logs.shape[0])[:, None], ids].set(-jnp.inf)
    return jax.nn.logsumexp(others, axis=-1, keepdims=True)


def _summed(chunked: _Chunked, chunk_loss: Callable[..., tuple[jax.Array, Any]], features: jax.Array, *columns: jax.Array) -> Any:
    """The sums over chunks of a loss and what comes with it, without a gradient: scalars each.

    Args:
        chunked: how targets are cut.
        chunk_loss: (what the readout trains, features of a chunk, columns of a chunk) -> (loss, more).
        features: (n, width).
        columns: (n, ...) each, what is known of the targets.
    """

    @jax.custom_vjp
    def total(trained: list[Any], features: jax.Array, *columns: jax.Array) -> Any:
        return jax.tree.map(lambda a: a.sum(), jax.lax.map(lambda c: chunk_loss(trained, *c), (features, *columns)))

    def forward(trained: list[Any], features: jax.Array, *columns: jax.Array) -> Any:
        def one(grads: list[Any], chunk: tuple[jax.Array, ...]) -> Any:
            found, (more, dx) = jax.value_and_grad(chunk_loss, argnums=(0, 1), has_aux=True)(trained, *chunk)
            return jax.tree.map(jnp.add, grads, more), (found, dx)

        grads, (found, dx) = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, trained), (features, *columns))
        return jax.tree.map(lambda a: a.sum(), found), (grads, dx)

    def backward(kept: tuple[list[Any], jax.Array], cotangents: Any) -> Any:
        grads, dx = jax.tree.map(lambda g: (g * cotangents[0]).astype(g.dtype), kept)
        return grads, dx, *[None] * len(columns)

    total.defvjp(forward, backward)
    return total(chunked.trained, chunked.cut(features), *map(chunked.cut, columns))


def target_log_probs(head: Callable[[jax.Array], jax.Array], features: jax.Array, ids: jax.Array) -> jax.Array:
    """The logarithm of the probability of each target, for losses that are no sum over targets.

    The gradient of each by its own features is taken while the logits are at hand and waits for what it is to be multiplied by: logits
    are neither kept nor computed twice. What `head` itself trains gets a sum over targets, each times what is known in the backward
    pass alone: the logits are computed again then, a chunk at a time.

    Args:
        head, features, ids: as for `summed_cross_entropy`.

    Returns:
        (n,) float32.
    """
    chunked = _Chunked.of(head, features)

    def chunk_losses(trained: list[Any], features: jax.Array, ids: jax.Array) -> jax.Array:
        return chunked.losses(trained, features, ids)[2]

    @jax.custom_vjp
    def every(trained: list[Any], features: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.lax.map(lambda c: chunk_losses(trained, *c), (features, ids))

    def forward(trained: list[Any], features: jax.Array, ids: jax.Array) -> Any:
        if trained:
            return every(trained, features, ids), (trained, features, ids)

        def one(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, i = chunk
            losses, pull = jax.vjp(lambda x: chunk_losses(trained, x, i), x)
            return losses, pull(jnp.ones_like(losses))[0]

        return jax.lax.map(one, (features, ids))

    def backward(kept: Any, cotangents: jax.Array) -> Any:
        if not isinstance(kept, tuple):
            return [], (kept * cotangents[..., None]).astype(kept.dtype), None
        trained, features, ids = kept

        def one(grads: list[Any], chunk: tuple[jax.Array, ...]) -> Any:
            x, i, g = chunk
            more, dx = jax.vjp(lambda t, x: chunk_losses(t, x, i), trained, x)[1](g)
            return jax.tree.map(jnp.add, grads, more), dx

        grads, dx = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, trained), (features, ids, cotangents))
        return grads, dx, None

    every.defvjp(forward, backward)
    return -chunked.joined(every(chunked.trained, chunked.cut(features), chunked.cut(ids)))


class _Chunked(NamedTuple):
    """A readout, and targets cut into chunks whose logits fit `CHUNK_FLOATS`.

    Attributes:
        head: (m, width) features and `trained` -> (m, classes) logits.
        trained: what the readout closes over and is being differentiated.
        groups: of rows, on a mesh: each has its own devices, and every chunk has a part of each.
        own: targets of a group.
        chunks, size: how many there are, and how many targets of each group are in one.
    """

    head: Callable[..., jax.Array]
    trained: list[Any]
    groups: int
    own: int
    chunks: int
    size: int

    @classmethod
    def of(cls, head: Callable[[jax.Array], jax.Array], features: jax.Array) -> _Chunked:
        """For features (n, width)."""
        classes = jax.eval_shape(head, features[:1]).shape[-1]
        groups = row_groups()
        own = features.shape[0] // groups
        chunks = max(1, -(-own * classes // CHUNK_FLOATS))
        size = -(-own // chunks)
        # What `head` closes over and is being differentiated becomes an argument; the rest stays closed over. It is traced for the
        # shape of a chunk: some operations (a gather of columns) have the number of rows in them.
        pure_head, trained = jax.closure_convert(head, jnp.zeros((groups * size, *features.shape[1:]), features.dtype))
        return cls(pure_head, trained, groups, own, chunks, size)

    def cut(self, x: jax.Array) -> jax.Array:
        """(n, ...) -> (chunks, targets of a chunk, ...); what the last one lacks is 0."""
        grouped = by_rows(x.reshape(self.groups, self.own, *x.shape[1:]))
        padded = jnp.pad(grouped, [(0, 0), (0, self.chunks * self.size - self.own)] + [(0, 0)] * (x.ndim - 1))
        cut = jnp.moveaxis(padded.reshape(self.groups, self.chunks, self.size, *x.shape[1:]), 0, 1)
        return cut.reshape(self.chunks, self.groups * self.size, *x.shape[1:])

    def joined(self, x: jax.Array) -> jax.Array:
        """The inverse of `cut`, for numbers: (chunks, targets of a chunk) -> (n,)."""
        grouped = jnp.moveaxis(x.reshape(self.chunks, self.groups, self.size), 1, 0).reshape(self.groups, -1)
        return by_rows(by_rows(grouped)[:, : self.own].reshape(-1))

    def losses(self, trained: list[Any], features: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of one chunk: float32 logits (m, classes), those of the right classes (m,), and each target's -log p (m,)."""
        logits = by_rows(self.head(by_rows(features), *trained)).astype(jnp.float32)
        right = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0]
        return logits, right, jax.nn.logsumexp(logits, axis=-1) - right
