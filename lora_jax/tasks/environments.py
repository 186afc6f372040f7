"""Environments of gymnax, which are written in JAX: by name, with some of their numbers (the physics) changed."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Mapping
from typing import Any

from ..errors import InputError, hint


@dataclasses.dataclass(frozen=True)
class Environment:
    """An environment with discrete actions.

    Attributes:
        env: gymnax's.
        params: gymnax's, with the changes.
        observation: shape of an observation.
        actions: how many.
        longest: steps of an episode at the most.
    """

    env: Any
    params: Any
    observation: tuple[int, ...]
    actions: int
    longest: int


@functools.cache
def _made(name: str) -> tuple[Any, Any]:
    try:
        import gymnax
    except ModuleNotFoundError as error:
        raise InputError(f"task.environment: needs gymnax, and there is no module '{error.name}': pip install 'lora-jax[rl]'.") from None
    if name not in gymnax.registered_envs:
        raise InputError(f"task.environment: gymnax has no '{name}'. {hint(name, gymnax.registered_envs)}".rstrip())
    return gymnax.make(name)


def make_environment(name: str, physics: Mapping[str, float]) -> Environment:
    """An environment.

    Args:
        name: as gymnax has it, such as `CartPole-v1`.
        physics: some of its parameters -> value.

    Raises:
        InputError: gymnax is not installed, has no such environment, or that has no such parameter; or its actions are not discrete.
    """
    env, params = _made(name)
    known = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    known = {key: value for key, value in known.items() if isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()}
    changed: dict[str, Any] = {}
    for key, value in physics.items():
        if key not in known:
            raise InputError(f"task.physics: {name} has no number '{key}'. {hint(key, known)} It has: {', '.join(known)}.")
        kind: Any = type(known[key]) if isinstance(known[key], bool | int) else float
        if kind(value) != value:
            raise InputError(f"task.physics: {key} = {value!r} should be {'true or false' if kind is bool else 'a whole number'}.")
        changed[key] = kind(value)
    params = params.replace(**changed)
    if params.max_steps_in_episode < 1:
        raise InputError(f"task.physics: max_steps_in_episode = {params.max_steps_in_episode} should be 1 or more.")
    actions, observations = env.action_space(params), env.observation_space(params)
    if getattr(actions, "n", None) is None or getattr(observations, "low", None) is None:
        raise InputError(f"task.environment: {name}: only environments with discrete actions and an array to observe are supported.")
    return Environment(env, params, tuple(observations.shape), int(actions.n), int(params.max_steps_in_episode))
