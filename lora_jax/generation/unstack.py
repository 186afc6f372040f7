"""Unstacked models: each layer in a segment of its own, with weights that are views of the stacked arrays. For decoding on a CPU.

A decoding step reads every weight once and computes little. A scan over stacked weights copies each layer's slice before it multiplies,
which doubles the memory traffic; a program for a few rows is small enough to be unrolled layer by layer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..models.layers import PER_SEGMENT
from ..models.stack import Segment, Stack


class SliceCache:
    """Slices of arrays along their first axis; one and the same array gives one and the same slice."""

    def __init__(self) -> None:
        self._slices: dict[tuple[int, int], tuple[jax.Array, jax.Array]] = {}

    def of(self, array: jax.Array, index: int) -> jax.Array:
        """`array[index : index + 1]`, sharing its memory where that lies on one CPU device (and each slice is aligned)."""
        found = self._slices.get((id(array), index))
        if found is None:
            # The array is kept beside its slice, so that its id stays its own.
            found = self._slices[id(array), index] = array, _slice(array, index)
        return found[1]


def unstacked(model: nnx.Module, views: SliceCache) -> Any:
    """The model with a segment for each layer; `model` is left as it was.

    Args:
        views: of models that share arrays, the same, so that they share the slices too.
    """
    graphdef, state = nnx.split(model, graph=True)
    model = nnx.merge(graphdef, jax.tree.map(lambda a: a, state))
    for _, stack in nnx.iter_modules(model):
        if isinstance(stack, Stack):
            stack.segments = nnx.List([_layer(s, i, views) for s in stack.segments for i in range(s.start, s.stop)])
    return model


def on_devices(model: nnx.Module) -> Any:
    """The model with arrays that lie in host memory put on the default device; `model` is left as it was."""
    graphdef, state = nnx.split(model, graph=True)
    return nnx.merge(graphdef, jax.tree.map(lambda a: a if isinstance(a, jax.Array) else jnp.asarray(a), state))


def on_one_cpu(model: nnx.Module) -> bool:
    """Whether all the model's arrays lie on one CPU device, where layers can be run from views."""
    arrays = [a for a in jax.tree.leaves(nnx.state(model)) if isinstance(a, jax.Array)]
    devices = {d for a in arrays for d in a.devices()}
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"


def _layer(segment: Segment, layer: int, views: SliceCache) -> Segment:
    graphdef, state = nnx.split(segment.block, graph=True)

    def one(variable: nnx.Variable) -> nnx.Variable:
        own = variable.get_metadata().get(PER_SEGMENT, False)
        sliced = variable.replace(views.of(variable.get_value(), layer - segment.start if own else layer))
        sliced.set_metadata(PER_SEGMENT, True)
        return sliced

    state = jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    # A block split anew: that its variables are the segment's own is part of its structure.
    block = nnx.merge(graphdef, state)
    for _, variable in nnx.iter_graph(block):
        if isinstance(variable, nnx.Variable):
            variable.set_metadata(PER_SEGMENT, True)
    return Segment(block, layer, layer + 1)


def _slice(array: jax.Array, index: int) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array[index : index + 1]
    return jax.device_put(np.asarray(array)[index : index + 1], array.sharding, may_alias=True)
