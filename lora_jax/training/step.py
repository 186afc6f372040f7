"""The training step and the evaluation step: pure functions of one member. `packing/execution.py` compiles them over a whole pack."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from ..adapters.partition import Arrays, Partition, with_dropout_keys
from ..models.heads import TaskModel
from ..parallel.constraints import in_order, targets_by_rows
from ..tasks.objectives import Means, Objective, sums_of, total_weight
from .optimizer import Hyper, learning_rate, make_optimizer

Batch = dict[str, jax.Array]


class MemberState(NamedTuple):
    """What a step changes: a member's trainable arrays, its optimizer state, `alive` (bool: it still trains), and its method's state."""

    trainable: Arrays
    optimizer: Any
    alive: jax.Array
    method: dict[str, Arrays] = {}  # noqa: RUF012 - never changed in place


class MemberFixed(NamedTuple):
    """What a step only reads: a member's hyperparameters, settings (scales, dropout), and a mask of its trained numbers, if any."""

    hyper: Hyper
    settings: Arrays
    mask: Arrays | None


class Metrics(NamedTuple):
    """Float32 scalars of one step.

    Attributes:
        loss, accuracy: means over the targets, or over the examples where those are counted.
        grad_norm: of the gradient.
        learning_rate: of A, with LoRA+.
        means: what else the objective says, by name; NaN where the step has nothing of it.
    """

    loss: jax.Array
    accuracy: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    means: dict[str, jax.Array] = {}  # noqa: RUF012 - never changed in place


def init_member(part: Partition, trainable: Arrays, fixed: MemberFixed) -> MemberState:
    """The state before step 0."""
    method = {} if part.method is None else part.method.init_state(part.sites(trainable, fixed.settings))
    return MemberState(trainable, make_optimizer(fixed.hyper, part).init(trainable), jnp.array(True), method)


def train_step(
    part: Partition,
    objective: Objective,
    state: MemberState,
    fixed: MemberFixed,
    frozen: Arrays,
    batch: Batch,
    step: jax.Array,
    dropout_rng: jax.Array,
) -> tuple[MemberState, Metrics]:
    """One optimizer step of one member.

    The loss is the mean over all targets (or examples) of the step; its gradient is summed over the micro-batches. A member whose loss
    or gradient is not finite keeps its last state and stops for good. Under `vmap`, other members are not affected.

    Args:
        part: makes a model of the arrays; static.
        objective: the loss (`tasks/objectives.py`); static.
        state: what the step changes.
        fixed: the member's hyperparameters, settings and mask.
        frozen: the base, the same for all members.
        batch: arrays with a leading micro-batch axis, the same for all members, including what the task computes once for all
            (`Task.shared`). If it contains a `trunk` (`trunk.py`), the model starts from there.
        step: int32 scalar, 0-based.
        dropout_rng: PRNG key for the base's own dropout in this step; the same for all members, so that shared layers stay equal.
    """
    key = jax.random.fold_in(jax.random.key(fixed.hyper.seed), step)
    total = jnp.maximum(total_weight(batch), 1.0)

    def loss_of(trainable: Arrays, micro: Batch, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Means]]:
        settings = with_dropout_keys(part, fixed.settings, jax.random.fold_in(key, index))
        model = cast(TaskModel, part.merge(trainable, settings, frozen, training=True))
        features = model.features(micro, jax.random.fold_in(dropout_rng, index))
        loss, correct, more = sums_of(objective, model, features, micro)
        return loss / total, (correct / total, more)

    def penalty_of(trainable: Arrays) -> jax.Array | None:
        return None if part.method is None else part.method.penalty(part.sites(trainable, fixed.settings))

    def micro_step(carry: Any, micro: tuple[jax.Array, Batch]) -> tuple[Any, Means]:
        index, rows = micro
        (loss, (correct, more)), grads = jax.value_and_grad(loss_of, has_aux=True)(state.trainable, targets_by_rows(rows), index)
        return jax.tree.map(jnp.add, carry, (loss, correct, grads)), more

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable))
    (loss, correct, grads), more = jax.lax.scan(micro_step, zero, (jnp.arange(batch["tokens"].shape[0]), batch))

    if jax.eval_shape(penalty_of, state.trainable) is not None:  # once a step, and not for each micro-batch
        more, of_penalty = jax.value_and_grad(cast(Any, penalty_of))(state.trainable)
        loss, grads = loss + more, jax.tree.map(jnp.add, grads, of_penalty)
    grads = _masked(grads, fixed.mask)
    norm = optax.tree.norm(grads)
    sites = {} if part.method is None else part.sites(state.trainable, fixed.settings)
    optimizer = make_optimizer(fixed.hyper, part, sites)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
    updates = _masked(cast(Arrays, updates), fixed.mask)
    trainable, kept_by_method = cast(Arrays, optax.apply_updates(state.trainable, updates)), state.method
    if part.method is not None and part.method.has_state:
        kept_by_method, trainable = part.method.after_step(kept_by_method, trainable, grads, sites, step, fixed.hyper.steps)
    new = MemberState(trainable, optimizer_state, state.alive, kept_by_method)
    alive = state.alive & jnp.isfinite(loss) & jnp.isfinite(norm)
    kept = jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, state)
    means = {name: value.sum() / weight.sum() for name, (value, weight) in more.items()}
    return kept._replace(alive=alive), Metrics(loss, correct, norm, learning_rate(fixed.hyper, step), means)


def _masked(tree: Arrays, mask: Arrays | None) -> Arrays:
    return tree if mask is None else {name: a * mask[name] if name in mask else a for name, a in tree.items()}


# Summed loss, summed correct predictions, what else the objective says, and `TaskModel.answers` in the batch's order, from which the
# task's metrics are computed.
Evaluated = tuple[jax.Array, jax.Array, Means, jax.Array | None]


def eval_step(part: Partition, objective: Objective, trainable: Arrays, settings: Arrays, frozen: Arrays, batch: Batch) -> Evaluated:
    """One member's summed loss and correct predictions on one batch (without a micro axis), what else its objective says, and its
    answers; no dropout."""
    count = batch["target_index"].shape[0]
    model, batch = cast(TaskModel, part.merge(trainable, settings, frozen, training=False)), targets_by_rows(batch)
    features = model.features(batch)
    answers = model.answers(features)
    answers = None if answers is None else in_order(batch, answers, count)
    return *sums_of(objective, model, features, batch), answers
