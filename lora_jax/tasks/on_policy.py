"""On-policy tasks: each member makes its own batches from its own state, inside the compiled step.

Such a task's objective (`objective_of`) is an `OnPolicy`: a step of training is then to collect a batch with the member's model, and
to make several optimizer steps on it. Both run under the same `vmap` over members as any other step, so their batches get a member
axis, and one program serves the pack. What a member keeps from one step to the next (`begin`) is a part of its state, and is in its
checkpoints. What the members have in common (`batch`: prompts, say) comes from outside.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

# An array or a tree of them.
Tree = Any


class Completer(Protocol):
    """Writes on after prompts; tasks of language models are given one, as decoding lies beyond what they import."""

    def __call__(
        self,
        model: Any,
        tokens: jax.Array,
        mask: jax.Array,
        seeds: jax.Array,
        tokenizer: Any,
        *,
        temperature: float,
        top_p: float | None,
        room: int,
    ) -> tuple[jax.Array, jax.Array]:
        """The `room` tokens that follow each prompt, and which of them belong to the answer.

        Args:
            model: the language model, without a head of a task.
            tokens, mask: (rows, length) int32, prompts padded on the left, and 1 where they are.
            seeds: (rows,) uint32.
            tokenizer: of the model.
            temperature: 0 takes the likeliest token.
            top_p: only the likeliest tokens of this probability are drawn from; None: all.
            room: how many tokens.

        Returns:
            (rows, room) int32 and (rows, room) bool.
        """
        ...


class OnPolicy(ABC):
    """How members make batches and learn of them; all functions are pure, of one member, and traced.

    Attributes:
        updates: optimizer steps of a training step.
        needs_base: whether `collect` asks for the base, of whose trained weights a copy is then kept.
    """

    updates: int
    needs_base: bool = False

    @abstractmethod
    def begin(self, key: jax.Array) -> Tree:
        """What a member keeps from step to step, before step 0. `key` follows from the member's seed."""

    @abstractmethod
    def collect(self, model: Any, kept: Tree, batch: dict[str, jax.Array], key: jax.Array, base: Callable[[], Any]) -> tuple[Tree, Tree]:
        """What the member keeps from here on, and what its updates learn of; nothing is differentiated.

        Args:
            model: the member's, as it is evaluated.
            kept: as the last step left it.
            batch: what the members have in common, with a micro axis.
            key: of the member and the step.
            base: gives the model that the members adapt, the adapter off; only where `needs_base`.
        """

    def figures(self, collected: Tree) -> dict[str, jax.Array]:
        """What of it is logged: name -> float32 scalar; nothing by default."""
        return {}

    @abstractmethod
    def part(self, collected: Tree, index: jax.Array) -> Tree:
        """What update `index` (int32 scalar, 0-based) of a step learns of."""

    @abstractmethod
    def loss(self, model: Any, part: Tree) -> jax.Array:
        """The mean loss on that, a float32 scalar."""

    @abstractmethod
    def evaluate(self, model: Any, batch: dict[str, jax.Array]) -> jax.Array:
        """Answers (n, ...) to a batch of the held-out examples, from which evaluators compute the metrics."""


def strong(tree: Tree) -> Tree:
    """The same arrays with dtypes of their own: what goes round in a compiled step has one type, wherever it came from."""
    return jax.tree.map(lambda a: jax.lax.convert_element_type(jnp.asarray(a), jnp.asarray(a).dtype), tree)


def clipped_surrogate(ratio: Any, advantage: Any, clip: float, clip_high: float | None = None) -> jax.Array:
    """min(r A, clip(r, 1 - e, 1 + e) A), which is to grow (arXiv:1707.06347, eq. 7, before the mean).

    With `clip_high`, the upper bound is 1 + `clip_high` (arXiv:2503.14476, eq. 10).
    """
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + (clip if clip_high is None else clip_high)) * advantage)


@dataclasses.dataclass(frozen=True)
class Minibatches:
    """A step's updates: `epochs` passes over what was collected, each in `count` parts and another order."""

    epochs: int
    count: int

    @property
    def updates(self) -> int:
        """Of all passes."""
        return self.epochs * self.count

    def draw(self, size: int, key: jax.Array) -> jax.Array:
        """(updates, size / count) int32: which of `size` things each update learns of. Once a step: sorting is slow on CPUs."""
        orders = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, self.epochs))
        return orders.reshape(self.updates, size // self.count)
