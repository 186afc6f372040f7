"""The training step and the evaluation step: pure functions of one member. `packing/execution.py` compiles them over a whole pack."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from ..adapters.labels import STATISTIC
from ..adapters.partition import Arrays, Partition, with_dropout_keys
from ..models.heads import TaskModel
from ..parallel.constraints import in_order, targets_by_rows
from ..tasks.objectives import Means, Objective, held_out, sums_of, total_weight
from ..tasks.on_policy import OnPolicy
from .optimizer import Hyper, learning_rate, make_optimizer

Batch = dict[str, jax.Array]


class MemberState(NamedTuple):
    """What a step changes: a member's trainable arrays, its optimizer state, `alive` (bool: it still trains), its method's state, and
    what it keeps of the batches it makes itself (`OnPolicy.begin`)."""

    trainable: Arrays
    optimizer: Any
    alive: jax.Array
    method: dict[str, Arrays] = {}  # noqa: RUF012 - never changed in place
    rollout: Any = ()


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


# Mixed into a member's seed, for the draws of what it keeps: steps are numbered from 0.
_BEGIN = 2**31


def init_member(part: Partition, trainable: Arrays, fixed: MemberFixed, objective: Objective | OnPolicy | None = None) -> MemberState:
    """The state before step 0. `objective` is needed where the members make their own batches."""
    method = {} if part.method is None else part.method.init_state(part.sites(trainable, fixed.settings))
    key = jax.random.fold_in(jax.random.key(fixed.hyper.seed), _BEGIN)
    rollout = objective.begin(key) if isinstance(objective, OnPolicy) else ()
    return MemberState(trainable, make_optimizer(fixed.hyper, part).init(trainable), jnp.array(True), method, rollout)


def train_step(
    part: Partition,
    objective: Objective | OnPolicy,
    state: MemberState,
    fixed: MemberFixed,
    frozen: Arrays,
    batch: Batch,
    step: jax.Array,
    dropout_rng: jax.Array,
) -> tuple[MemberState, Metrics]:
    """One training step of one member: an optimizer step, or as many as an on-policy task makes on the batch that it collects.

    The loss is the mean over all targets (or examples) of the step; its gradient is summed over the micro-batches. A member whose loss
    or gradient is not finite keeps its last state and stops for good. Under `vmap`, other members are not affected.

    Args:
        part: makes a model of the arrays; static.
        objective: the loss (`tasks/objectives.py`), or how the member makes batches and learns of them (`tasks/on_policy.py`); static.
        state: what the step changes.
        fixed: the member's hyperparameters, settings and mask.
        frozen: the base, the same for all members.
        batch: arrays with a leading micro-batch axis, the same for all members, including what the task computes once for all
            (`Task.shared`). If it contains a `trunk` (`trunk.py`), the model starts from there.
        step: int32 scalar, 0-based.
        dropout_rng: PRNG key for the base's own dropout in this step; the same for all members, so that shared layers stay equal.
    """
    key = jax.random.fold_in(jax.random.key(fixed.hyper.seed), step)
    if isinstance(objective, OnPolicy):
        return _collect_and_update(part, objective, state, fixed, frozen, batch, step, key)
    total = jnp.maximum(total_weight(batch), 1.0)

    def loss_of(trainable: Arrays, micro: Batch, index: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Means, Arrays]]:
        settings = with_dropout_keys(part, fixed.settings, jax.random.fold_in(key, index))
        model = cast(TaskModel, part.merge(trainable, settings, frozen, training=True))
        features = model.features(micro, jax.random.fold_in(dropout_rng, index))
        loss, correct, more = sums_of(objective, model, features, micro)
        return loss / total, (correct / total, more, part.statistics(cast(Any, model)))

    def micro_step(carry: Any, micro: tuple[jax.Array, Batch]) -> tuple[Any, Means]:
        (sums, running), (index, rows) = carry, micro
        now = {**state.trainable, **running}
        (loss, (correct, more, running)), grads = jax.value_and_grad(loss_of, has_aux=True)(now, targets_by_rows(rows), index)
        return (jax.tree.map(jnp.add, sums, (loss, correct, grads)), running), more

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trainable))
    running = {name: array for name, array in state.trainable.items() if part.labels[name] == STATISTIC}
    numbered = (jnp.arange(batch["segment_ids"].shape[0]), batch)
    ((loss, correct, grads), running), more = jax.lax.scan(micro_step, (zero, running), numbered)
    means = {name: value.sum() / weight.sum() for name, (value, weight) in more.items()}
    new, loss, norm = _updated(part, state, fixed, loss, grads, step, running)
    return new, Metrics(loss, correct, norm, learning_rate(fixed.hyper, step), means)


def _collect_and_update(
    part: Partition,
    task: OnPolicy,
    state: MemberState,
    fixed: MemberFixed,
    frozen: Arrays,
    batch: Batch,
    step: jax.Array,
    key: jax.Array,
) -> tuple[MemberState, Metrics]:
    """`train_step` of an on-policy task. The loss is the mean over the updates, gradient norm and learning rate are the newest."""
    model = part.merge(state.trainable, fixed.settings, frozen, training=False)
    base = functools.partial(part.base, state.trainable, fixed.settings, frozen)
    rollout, collected = task.collect(model, state.rollout, batch, key, base)

    def update(state: MemberState, index: jax.Array) -> tuple[MemberState, tuple[jax.Array, jax.Array]]:
        def loss_of(trainable: Arrays) -> jax.Array:
            settings = with_dropout_keys(part, fixed.settings, jax.random.fold_in(key, index))
            return task.loss(part.merge(trainable, settings, frozen, training=True), task.part(collected, index))

        loss, grads = jax.value_and_grad(loss_of)(state.trainable)
        new, loss, norm = _updated(part, state, fixed, loss, grads, step * task.updates + index)
        return new, (loss, norm)

    new, (losses, norms) = jax.lax.scan(update, state, jnp.arange(task.updates))
    # Of a member that has stopped nothing changes any more.
    rollout = jax.tree.map(lambda a, b: jnp.where(new.alive, a, b), rollout, state.rollout)
    rate = learning_rate(fixed.hyper, (step + 1) * task.updates - 1)
    return new._replace(rollout=rollout), Metrics(losses.mean(), jnp.float32(0), norms[-1], rate, task.figures(collected))


def _updated(
    part: Partition, state: MemberState, fixed: MemberFixed, loss: jax.Array, grads: Arrays, step: jax.Array, running: Arrays | None = None
) -> tuple[MemberState, jax.Array, jax.Array]:
    """One optimizer step; a member whose loss or gradient is not finite keeps its last state and stops for good.

    Args:
        step: int32 scalar, how many optimizer steps were before this one.
        running: the running statistics after the step's batch, where it has changed them.

    Returns:
        the new state, the loss with the method's penalty, and the norm of the gradient.
    """

    def penalty_of(trainable: Arrays) -> jax.Array | None:
        return None if part.method is None else part.method.penalty(part.sites(trainable, fixed.settings))

    if jax.eval_shape(penalty_of, state.trainable) is not None:  # once a step, and not for each micro-batch
        more, of_penalty = jax.value_and_grad(cast(Any, penalty_of))(state.trainable)
        loss, grads = loss + more, jax.tree.map(jnp.add, grads, of_penalty)
    grads = _masked(grads, fixed.mask)
    norm = optax.tree.norm(grads)
    sites = {} if part.method is None else part.sites(state.trainable, fixed.settings)
    optimizer = make_optimizer(fixed.hyper, part, sites)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trainable)
    updates = _masked(cast(Arrays, updates), fixed.mask)
    trainable, kept_by_method = {**cast(Arrays, optax.apply_updates(state.trainable, updates)), **(running or {})}, state.method
    if part.method is not None and part.method.has_state:
        kept_by_method, trainable = part.method.after_step(kept_by_method, trainable, grads, sites, step, fixed.hyper.steps)
    new = MemberState(trainable, optimizer_state, state.alive, kept_by_method, state.rollout)
    alive = state.alive & jnp.isfinite(loss) & jnp.isfinite(norm)
    kept = jax.tree.map(lambda a, b: jnp.where(alive, a, b), new, state)
    return kept._replace(alive=alive), loss, norm


def _masked(tree: Arrays, mask: Arrays | None) -> Arrays:
    return tree if mask is None else {name: a * mask[name] if name in mask else a for name, a in tree.items()}


# Summed loss, summed correct predictions, what else the objective says, and `TaskModel.answers` in the batch's order, from which the
# task's metrics are computed.
Evaluated = tuple[jax.Array, jax.Array, Means, jax.Array | None]


def eval_step(
    part: Partition, objective: Objective | OnPolicy, trainable: Arrays, settings: Arrays, frozen: Arrays, batch: Batch
) -> Evaluated:
    """One member's summed loss and correct predictions on one batch (without a micro axis), what else its objective says, and its
    answers; no dropout."""
    if isinstance(objective, OnPolicy):
        answers = objective.evaluate(part.merge(trainable, settings, frozen, training=False), batch)
        return jnp.float32(0), jnp.float32(0), {}, answers
    count = batch["target_index"].shape[0]
    model, batch = cast(TaskModel, part.merge(trainable, settings, frozen, training=False)), targets_by_rows(batch)
    features = model.features(batch)
    answers = model.answers(features)
    answers = None if answers is None else in_order(batch, answers, count)
    return *sums_of(held_out(objective), model, features, batch), answers
