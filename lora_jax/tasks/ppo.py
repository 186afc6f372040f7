"""Proximal policy optimization (PPO, arXiv:1707.06347): a policy learns of what it does in an environment.

A training step plays `rollout` steps of `environments` environments with each member's own policy, then makes
`update_epochs` x `minibatches` optimizer steps on them. Members have environments, actions and batches of their own, and nothing but the
base in common; a member's draws follow from its seed, whatever pack it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field, model_validator

from ..config.doors import TASKS
from ..config.types import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, TaskSection
from ..data.episodes import Episodes
from ..errors import InputError
from ..models.policy import Policy, PolicyConfig, log_probability
from .base import Base, Columns, Encoded, Rows, Task, TaskData, TaskMetrics
from .environments import Environment, make_environment
from .evaluators import Evaluator, register
from .on_policy import Completer, Minibatches, OnPolicy, Tree, clipped_surrogate, strong

# So many ends of episodes are looked at together.
_ENDS = 16


class PPOConfig(TaskSection):
    kind: Literal["ppo"] = Field(default="ppo", description="Proximal policy optimization in an environment (arXiv:1707.06347).")
    environment: str = Field(description="An environment of gymnax with discrete actions, such as CartPole-v1 or Asterix-MinAtar.")
    physics: dict[str, float] = Field(
        default_factory=dict,
        description=(
            "Numbers of the environment to change: name -> value, such as {length: 1.0}. One that the environment derives from another "
            "(CartPole's total_mass, polemass_length) does not follow it: give both."
        ),
    )
    environments: PositiveInt = Field(default=16, description="Environments that each member steps side by side.")
    rollout: PositiveInt = Field(default=128, description="Steps of each environment in a training step.")
    update_epochs: PositiveInt = Field(default=4, description="Passes over them in a training step.")
    minibatches: PositiveInt = Field(default=4, description="Optimizer steps of a pass; must divide environments * rollout.")
    gamma: Fraction = Field(default=0.99, description="Discount of rewards.")
    gae_lambda: float = Field(default=0.95, ge=0, le=1, description="Lambda of generalized advantage estimation (arXiv:1506.02438).")
    clip: PositiveFloat = Field(default=0.2, description="Epsilon of the clipped objective: ratios count from 1 - clip to 1 + clip.")
    entropy: NonNegativeFloat = Field(default=0.01, description="Coefficient of the policy's entropy in the objective.")
    value: NonNegativeFloat = Field(default=0.5, description="Coefficient of the squared error of the values in the objective.")
    eval_episodes: PositiveInt = Field(default=32, description="Episodes of an evaluation, the same for all members; data_seed draws them.")

    @model_validator(mode="after")
    def _parts(self) -> PPOConfig:
        if self.environments * self.rollout % self.minibatches:
            raise ValueError(
                f"'minibatches' ({self.minibatches}) must divide 'environments' * 'rollout' ({self.environments * self.rollout})"
            )
        return self

    @property
    def title(self) -> str:
        """The environment, and what of it is changed."""
        changed = ", ".join(f"{key}={value:g}" for key, value in self.physics.items())
        return f"{self.environment} ({changed})" if changed else self.environment


def advantages(rewards: Any, values: Any, following: Any, terminated: Any, done: Any, gamma: float, lam: float) -> jax.Array:
    """Generalized advantage estimation (arXiv:1506.02438, eq. 16), cut at each episode's end.

    Args:
        rewards, values: (steps, environments) float32.
        following: the same, the value of the state that each step led to, before any reset.
        terminated: bool; nothing follows it. An episode that only ran out of time goes on in its value.
        done: bool, terminated or out of time.

    Returns:
        (steps, environments) float32.
    """
    errors = rewards + gamma * following * ~terminated - values

    def back(later: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        error, ended = step
        now = error + gamma * lam * later * ~ended
        return now, now

    return jax.lax.scan(back, jnp.zeros_like(errors[0]), (errors, done), reverse=True)[1]


def values_where(value: Callable[[jax.Array], jax.Array], observations: jax.Array, wanted: jax.Array) -> jax.Array:
    """The values of some observations, a few at a time: of most nobody asks.

    Args:
        value: of observations (n, ...), (n,) float32.
        observations: (steps, environments, ...).
        wanted: (steps, environments) bool.

    Returns:
        (steps, environments) float32, 0 where they are not wanted.
    """
    count, seen = wanted.size, observations.reshape(-1, *observations.shape[2:])
    at = jnp.nonzero(wanted.reshape(-1), size=count + _ENDS, fill_value=count)[0]  # in front, then fillers

    def some(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, found = carry
        index = jax.lax.dynamic_slice_in_dim(at, start, _ENDS)
        return start + _ENDS, found.at[index].set(value(seen[jnp.minimum(index, count - 1)]), mode="drop")

    blank = jnp.int32(0), jnp.zeros(count, jnp.float32)
    return jax.lax.while_loop(lambda carry: carry[0] < wanted.sum(), some, blank)[1].reshape(wanted.shape)


class Rollouts(OnPolicy):
    """How a member plays and learns.

    Args:
        section: the config section.
    """

    def __init__(self, section: PPOConfig):
        self._section = section
        self._world: Environment = make_environment(section.environment, section.physics)
        self._minibatches = Minibatches(section.update_epochs, section.minibatches)
        self.updates = self._minibatches.updates

    def begin(self, key: jax.Array) -> Tree:
        """The environments' states and what is observed of them, (environments, ...)."""
        world = self._world
        observed, states = jax.vmap(lambda k: world.env.reset(k, world.params))(jax.random.split(key, self._section.environments))
        return strong((states, observed))

    def collect(self, model: Any, kept: Tree, batch: dict[str, jax.Array], key: jax.Array, base: Callable[[], Any]) -> tuple[Tree, Tree]:
        """Rollouts with their advantages and returns, arrays (environments * rollout, ...), and which of them each update learns of."""
        section, world = self._section, self._world

        def play(carry: Tree, drawn: tuple[jax.Array, jax.Array]) -> tuple[Tree, Tree]:
            (states, observed), (noise, moving) = carry, drawn
            logits, values = model(observed)
            actions = jnp.argmax(noise + logits, axis=-1).astype(jnp.int32)
            step = jax.vmap(lambda k, state, action: world.env.step(k, state, action, world.params))
            after, states, rewards, terminated, truncated, info = step(moving, states, actions)
            seen = {"observations": observed, "actions": actions, "log_probabilities": log_probability(logits, actions), "values": values}
            ended = {"terminated": terminated, "done": terminated | truncated}
            return strong((states, after)), seen | ended | {"rewards": rewards.astype(jnp.float32), "final": info["final_observation"]}

        # All that is drawn but by the environments, before the first step: small draws one after the other are slow on CPUs.
        acting, moving = jnp.moveaxis(jax.vmap(jax.random.split)(jax.random.split(jax.random.fold_in(key, 1), section.rollout)), 1, 0)
        noise = jax.vmap(lambda k: jax.random.gumbel(k, (section.environments, world.actions)))(acting)
        moving = jax.vmap(lambda k: jax.random.split(k, section.environments))(moving)
        kept, steps = jax.lax.scan(play, kept, (noise, moving))
        # The value of what each step led to: the next step's, but where an episode ended, which another follows.
        last = jnp.concatenate([steps["values"][1:], model(kept[1])[1][None]])
        terminated, done = steps.pop("terminated"), steps.pop("done")
        following = jnp.where(done, values_where(lambda seen: model(seen)[1], steps.pop("final"), done), last)
        found = advantages(steps.pop("rewards"), steps["values"], following, terminated, done, section.gamma, section.gae_lambda)
        steps |= {"advantages": found, "returns": found + steps.pop("values")}
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), steps)
        chosen = self._minibatches.draw(section.environments * section.rollout, jax.random.fold_in(key, 2))
        return kept, (jax.lax.stop_gradient(flat), chosen)

    def part(self, collected: Tree, index: jax.Array) -> Tree:
        """A minibatch."""
        steps, chosen = collected
        return jax.tree.map(lambda a: a[chosen[index]], steps)

    def loss(self, model: Any, part: Tree) -> jax.Array:
        """What is to shrink: the negative of eq. 9 of arXiv:1707.06347, with advantages of mean 0 and deviation 1 in each minibatch."""
        section = self._section
        logits, values = model(part["observations"])
        ratio = jnp.exp(log_probability(logits, part["actions"]) - part["log_probabilities"])
        advantage = part["advantages"]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        gain = clipped_surrogate(ratio, advantage, section.clip).mean()
        entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1).mean()
        return section.value * jnp.square(values - part["returns"]).mean() - gain - section.entropy * entropy

    def evaluate(self, model: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """The undiscounted return of each episode, (episodes,) float32; actions are drawn as in training."""
        world, seeds = self._world, batch["tokens"]
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(row[0]), row[1]), row[2]))(seeds)
        observed, states = jax.vmap(lambda k: world.env.reset(jax.random.fold_in(k, 0), world.params))(keys)

        def play(carry: Tree, number: jax.Array) -> tuple[Tree, None]:
            states, observed, total, going = carry
            own = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, number)))(keys)
            actions = jax.vmap(jax.random.categorical)(own[:, 0], model(observed)[0]).astype(jnp.int32)
            step = jax.vmap(lambda k, state, action: world.env.step(k, state, action, world.params))
            observed, states, rewards, terminated, truncated, _ = step(own[:, 1], states, actions)
            return strong((states, observed, total + rewards * going, going & ~(terminated | truncated))), None

        start = strong((states, observed, jnp.zeros(len(seeds), jnp.float32), jnp.ones(len(seeds), bool)))
        (_, _, total, _), _ = jax.lax.scan(play, start, jnp.arange(1, world.longest + 1))
        return total


EPISODE_RETURN = register(
    Evaluator("episode_return", True, decimals=2, from_answers=lambda answers, wanted: float(np.mean(np.concatenate(list(answers)))))
)


class PPO(Task):
    """What is learned of what the policy itself does."""

    name, section = "ppo", PPOConfig
    tokenized = False

    def columns(self, section: PPOConfig) -> Columns:
        """None: there are no rows."""
        return Columns(())

    def encode(self, section: PPOConfig, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None) -> Encoded:
        """There are no rows.

        Raises:
            InputError: always.
        """
        raise InputError(f"task.kind: '{self.name}' reads no rows.")

    def metrics(self, section: PPOConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """The mean return of the evaluated episodes."""
        return TaskMetrics((EPISODE_RETURN.name,), EPISODE_RETURN.name)

    def on_policy(self, section: PPOConfig, data: TaskData | None = None, complete: Completer | None = None) -> OnPolicy:
        """Rollouts."""
        return Rollouts(section)

    def own_data(self, section: PPOConfig, base: Any, known: tuple[str, ...]) -> TaskData:
        """The evaluated episodes; there are no training examples."""
        said = (
            f"{section.environments} environments of {section.title} for each member, {section.rollout} steps of each a training step; "
            f"{section.eval_episodes} episodes an evaluation"
        )
        episodes = Episodes(section.environments, section.rollout, section.eval_episodes, said)
        held_out = episodes.examples(None)
        return TaskData(held_out, held_out, self.metrics(section, None), per_example=True, collected=episodes)

    def check_base(self, section: PPOConfig, base: Any, source: str) -> None:
        """The base is a policy for this environment."""
        world = make_environment(section.environment, section.physics)
        if not isinstance(base, Policy):
            raise InputError(f"model.source: {source} is no policy, which task.kind: {self.name} needs (config.json: model_type).")
        has: PolicyConfig = base.config
        _same(source, "observations of shape", has.observation, section.environment, world.observation)
        _same(source, "a number of actions of", (has.actions,), section.environment, (world.actions,))

    def model(
        self, section: PPOConfig, base: Base, classes: tuple[str, ...] | None, class_token_ids: np.ndarray | None = None
    ) -> nnx.Module:
        """The policy itself."""
        return base


def _same(source: str, what: str, has: Sequence[int], environment: str, wants: Sequence[int]) -> None:
    if tuple(has) != tuple(wants):
        theirs, ours = (" x ".join(map(str, sizes)) for sizes in (wants, has))
        raise InputError(f"model.source: {source} is a policy for {what} {ours}, and {environment} has {theirs}.")


TASKS.register("ppo", PPO())
