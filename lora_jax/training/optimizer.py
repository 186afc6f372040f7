"""The optimizer of one member. All its numbers are traced data, so members that differ in them share one compiled step."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ..adapters.labels import FROZEN, STATISTIC, TRAINABLE
from ..adapters.methods.base import Method
from ..adapters.parameters import SiteArrays
from ..adapters.partition import Arrays, Partition
from ..config.schema import Config
from ..tasks.base import task_of
from .optimizers.base import Group, Optimizer, optimizer_of

SCHEDULES = ("linear", "cosine", "constant")


class Hyper(NamedTuple):
    """One member's hyperparameters, float32 scalars (in a pack: (members,) arrays), and its optimizer, which is static.

    `schedule` indexes `SCHEDULES`; `clip_norm` is infinite where nothing is clipped; `seed` (uint32) is of dropout; `numbers` are the
    optimizer's own, and `shapes` what it asks for (`Group.shapes`).
    """

    learning_rate: jax.Array
    schedule: jax.Array
    warmup_steps: jax.Array
    steps: jax.Array
    weight_decay: jax.Array
    clip_norm: jax.Array
    b_lr_ratio: jax.Array
    head_lr_ratio: jax.Array
    seed: jax.Array
    numbers: dict[str, jax.Array]
    shapes: Arrays
    optimizer: Optimizer


def updates_of(config: Config) -> int:
    """Optimizer steps of a training step."""
    found = task_of(config.task).on_policy(config.task)
    return 1 if found is None else found.updates


def hyper_of(config: Config, steps: int, shapes: Callable[[], dict[str, np.ndarray]] = dict) -> Hyper:
    """The hyperparameters a config asks for, over `steps` training steps; numpy scalars.

    Args:
        shapes: gives the shapes of the member's own arrays (`own_shapes`); asked where the optimizer needs them.
    """
    section = config.optimizer
    optimizer = optimizer_of(section)
    same = ("learning_rate", "warmup_steps", "weight_decay", "b_lr_ratio", "head_lr_ratio")
    values: dict[str, Any] = {name: np.float32(getattr(section, name)) for name in same}
    values["schedule"] = np.int32(SCHEDULES.index(section.schedule))
    values["clip_norm"] = np.float32(np.inf if section.clip_norm is None else section.clip_norm)
    values["steps"] = np.float32(steps * updates_of(config))
    values["seed"] = np.uint32(config.training.seed)
    own = {"numbers": optimizer.numbers(section), "shapes": shapes() if optimizer.shaped else {}}
    return Hyper(**values, **cast(Any, own), optimizer=optimizer)


def learning_rate(hyper: Hyper, step: ArrayLike) -> jax.Array:
    """The learning rate of 0-based `step`: linear warm-up from 0, then linear or half-cosine decay to 0 at `steps`, or flat.

    The values are those of transformers' `get_linear_schedule_with_warmup` and its cosine sibling.
    """
    step = jnp.asarray(step, jnp.float32)
    rising = step / jnp.maximum(hyper.warmup_steps, 1.0)
    done = jnp.clip((step - hyper.warmup_steps) / jnp.maximum(hyper.steps - hyper.warmup_steps, 1.0), 0.0, 1.0)
    falling = jnp.stack([1.0 - done, 0.5 * (1.0 + jnp.cos(jnp.pi * done)), jnp.ones_like(done)])[hyper.schedule]
    return hyper.learning_rate * jnp.where(step < hyper.warmup_steps, rising, falling)


# Parameters of the base whose whole name matches get no weight decay.
_NOT_DECAYED = re.compile(r"(.*\.)?bias|(.*\.)?[a-z_]*norm\..*")


def make_optimizer(hyper: Hyper, part: Partition, sites: Mapping[str, SiteArrays] | None = None) -> optax.GradientTransformation:
    """Clipping by the global norm, what the method and then the optimizer make of the gradients, then the optimizer for each label.

    Weights decay; biases and norms do not, as in transformers' Trainer. B's learning rate is `b_lr_ratio` times A's (LoRA+,
    arXiv:2402.12354), the head's `head_lr_ratio` times.

    Args:
        hyper: scalars, traced or not.
        part: what trains, by name: labels, and whether weight decay is for it.
        sites: of the member, for a method that changes gradients (`Method.preconditioned`); not needed to make a state.
    """
    labels, optimizer, method = part.labels, hyper.optimizer, part.method

    def decayed(params: Any) -> Any:
        def one(path: Any, _: Any) -> bool:
            name = path[-1].key
            return part.parameters[name].parameter.decays if name in part.parameters else _NOT_DECAYED.fullmatch(name) is None

        return jax.tree_util.tree_map_with_path(one, params)

    ratios = {"adapter_b": hyper.b_lr_ratio, "head": hyper.head_lr_ratio}

    def group(label: str) -> optax.GradientTransformation:
        def rate(step: ArrayLike) -> jax.Array:
            return learning_rate(hyper, step) * ratios.get(label, 1.0)

        return optimizer.group(Group(part, rate, hyper.weight_decay, decayed, hyper.numbers, hyper.shapes))

    own = sorted(set(labels.values()) - {*TRAINABLE, FROZEN, STATISTIC})  # of methods that have other groups
    groups: dict[Hashable, optax.GradientTransformation] = {label: group(label) for label in (*TRAINABLE, *own)}
    groups |= {FROZEN: optax.set_to_zero(), STATISTIC: optax.set_to_zero()}
    chained = [optax.clip_by_global_norm(hyper.clip_norm)]
    if method is not None and type(method).preconditioned is not Method.preconditioned:
        chained.append(optax.stateless(lambda grads, _: method.preconditioned(cast(Any, grads), sites or {})))
    if type(optimizer).preconditioned is not Optimizer.preconditioned:
        change = optimizer.preconditioned
        chained.append(optax.stateless(lambda grads, now: change(cast(Any, grads), cast(Any, now), part, hyper.numbers)))
    return optax.chain(*chained, optax.multi_transform(groups, labels))


def eval_params(part: Partition, hyper: Hyper, state: Any, trainable: Arrays) -> Arrays:
    """What one member is evaluated and saved with: its trainable arrays, or what the optimizer makes of them.

    Args:
        state: of `make_optimizer`.
    """
    found = dict(trainable)
    if hyper.optimizer.averages:
        for label in sorted(set(part.labels.values()) - {FROZEN, STATISTIC}):
            own = {name: trainable[name] for name, of in part.labels.items() if of == label}
            found |= hyper.optimizer.averaged(state[-1].inner_states[label].inner_state, own)
    return found
