"""The optimizer of one member. All its numbers are traced data, so members that differ in them share one compiled step."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ..adapters.labels import FROZEN, TRAINABLE
from ..adapters.methods.base import Method
from ..adapters.parameters import SiteArrays
from ..adapters.partition import Partition
from ..config.schema import Config

SCHEDULES = ("linear", "cosine", "constant")


class Hyper(NamedTuple):
    """One member's hyperparameters, float32 scalars (in a pack: (members,) arrays).

    `schedule` indexes `SCHEDULES`; `clip_norm` is infinite where nothing is clipped; `seed` (uint32) is of dropout.
    """

    learning_rate: jax.Array
    schedule: jax.Array
    warmup_steps: jax.Array
    steps: jax.Array
    weight_decay: jax.Array
    b1: jax.Array
    b2: jax.Array
    eps: jax.Array
    clip_norm: jax.Array
    b_lr_ratio: jax.Array
    head_lr_ratio: jax.Array
    seed: jax.Array


def hyper_of(config: Config, steps: int) -> Hyper:
    """The hyperparameters a config asks for, over `steps` optimizer steps; numpy scalars."""
    optimizer = config.optimizer
    same = ("learning_rate", "warmup_steps", "weight_decay", "b1", "b2", "eps", "b_lr_ratio", "head_lr_ratio")
    values: dict[str, Any] = {name: np.float32(getattr(optimizer, name)) for name in same}
    values["schedule"] = np.int32(SCHEDULES.index(optimizer.schedule))
    values["clip_norm"] = np.float32(np.inf if optimizer.clip_norm is None else optimizer.clip_norm)
    values["steps"] = np.float32(steps)
    values["seed"] = np.uint32(config.training.seed)
    return Hyper(**values)


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
    """Clipping by the global norm, what the method makes of the gradients, then AdamW (arXiv:1711.05101) for each label.

    Weights decay; biases and norms do not, as in transformers' Trainer. B's learning rate is `b_lr_ratio` times A's (LoRA+,
    arXiv:2402.12354), the head's `head_lr_ratio` times.

    Args:
        hyper: scalars, traced or not.
        part: what trains, by name: labels, and whether weight decay is for it.
        sites: of the member, for a method that changes gradients (`Method.preconditioned`); not needed to make a state.
    """
    labels = part.labels

    def decayed(params: Any) -> Any:
        def one(path: Any, _: Any) -> bool:
            name = path[-1].key
            return part.parameters[name].parameter.decays if name in part.parameters else _NOT_DECAYED.fullmatch(name) is None

        return jax.tree_util.tree_map_with_path(one, params)

    ratios = {"adapter_b": hyper.b_lr_ratio, "head": hyper.head_lr_ratio}

    def adamw(label: str) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: learning_rate(hyper, step) * ratios.get(label, 1.0),
            b1=hyper.b1,
            b2=hyper.b2,
            eps=hyper.eps,
            weight_decay=hyper.weight_decay,
            mask=decayed,
        )

    own = sorted(set(labels.values()) - {*TRAINABLE, FROZEN})  # of methods that have other groups
    groups: dict[Hashable, optax.GradientTransformation] = {label: adamw(label) for label in (*TRAINABLE, *own)}
    groups[FROZEN] = optax.set_to_zero()
    clip, grouped = optax.clip_by_global_norm(hyper.clip_norm), optax.multi_transform(groups, labels)
    if part.method is None or type(part.method).preconditioned is Method.preconditioned:
        return optax.chain(clip, grouped)
    method = part.method
    precondition = optax.stateless(lambda grads, _: method.preconditioned(cast(Any, grads), sites or {}))
    return optax.chain(clip, precondition, grouped)
