"""What an optimizer is. Each has one file beside this one, or in a package of its own (`register_optimizer`, an entry point
`lora_jax.optimizers`).

An optimizer says how the arrays of one label are updated (`group`). The rest is common to all of them and stands in
`training/optimizer.py`: clipping, the schedule, the ratios of the learning rate, what a method makes of the gradients. All its numbers are
traced, so that the members of a pack may differ in them; members with different optimizers train in different packs.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...adapters.layout import Layout
from ...adapters.partition import Arrays, Partition
from ...config.doors import OPTIMIZERS
from ...config.schema import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Group:
    """The arrays of one label, and one member's numbers for them.

    Attributes:
        part: what trains.
        learning_rate: 0-based step -> learning rate of these arrays.
        weight_decay: scalar.
        decayed: a tree of arrays by name -> a tree of bool, whether weight decay pulls on them: not on norms and biases.
        numbers: the keys of the optimizer's own section, by name; scalars.
        shapes: name of a method's array -> its shape in the layers of this member alone, (layers, axes) or (axes,) float32, 0 where a
            layer is not adapted. Given where the optimizer asks for it (`Optimizer.shaped`).
    """

    part: Partition
    learning_rate: Callable[[jax.typing.ArrayLike], jax.Array]
    weight_decay: jax.Array
    decayed: Callable[[Any], Any]
    numbers: Mapping[str, jax.Array]
    shapes: Mapping[str, jax.Array]

    def axes(self, name: str, array: jax.Array) -> int:
        """How many of an array's last axes one layer has; those before them are stacked layers."""
        if (own := self.part.parameters.get(name)) is not None:
            return len(own.parameter.shape)
        return array.ndim - (self.part.axes.get(name, ())[:1] == ("layers",))

    def shape(self, name: str, array: jax.Array) -> jax.Array:
        """The last axes' sizes without padding, (layers, axes) or (axes,) float32; 0 where a layer is not adapted."""
        if name in self.shapes:
            return self.shapes[name]
        count = self.axes(name, array)
        sizes = jnp.array(array.shape[array.ndim - count :], jnp.float32)
        return jnp.broadcast_to(sizes, (*array.shape[: array.ndim - count], count))


class Optimizer(ABC):
    """An optimizer; an instance is registered under its name.

    Attributes:
        name: as `optimizer.kind` says it.
        section: its config section, with a field `kind` of type `Literal[name]`.
        shaped: whether it asks for `Group.shapes`.
    """

    name: str
    section: type[OptimizerConfig]
    shaped: bool = False

    def __init_subclass__(cls) -> None:
        # A member's numbers bear their optimizer with them, as what is the same for all members of a pack.
        jax.tree_util.register_static(cls)

    def __repr__(self) -> str:
        return f"<optimizer {self.name}>"

    def numbers(self, section: Any) -> dict[str, np.float32]:
        """The keys of the section that are its own, as traced numbers; true is 1."""
        own = type(section).model_fields.keys() - OptimizerConfig.model_fields.keys()
        return {name: np.float32(getattr(section, name)) for name in sorted(own)}

    def check(self, layout: Layout) -> None:
        """Refuses a member that the optimizer cannot train.

        Args:
            layout: of the member alone.

        Raises:
            InputError: names the key, and what would do.
        """
        return

    @abstractmethod
    def group(self, of: Group) -> optax.GradientTransformation:
        """How the arrays of one label are updated; trees are dicts by name, in which arrays of other labels are masked."""

    def preconditioned(self, gradients: Arrays, trainable: Arrays, part: Partition, numbers: Mapping[str, jax.Array]) -> Arrays:
        """The gradients, clipped, that the groups get."""
        return gradients

    def averaged(self, state: Any, trainable: Arrays) -> Arrays:
        """The arrays of one label that a member is evaluated and saved with, where they are others than those that train.

        Args:
            state: of the group.
            trainable: its arrays.
        """
        return trainable

    @property
    def averages(self) -> bool:
        """Whether `averaged` does anything."""
        return type(self).averaged is not Optimizer.averaged


def optimizer_of(section: OptimizerConfig) -> Optimizer:
    """The optimizer of a section.

    Raises:
        InputError: there is none of this name.
    """
    return OPTIMIZERS.get(section.kind, "optimizer.kind")


register_optimizer = OPTIMIZERS.register
