"""Models as the programs of decoding take them: what several share is there once, and on a CPU each layer is a view.

On a CPU a model is decoded unstacked: each layer is a segment of its own, with weights that are views of the stacked arrays. A scan over
stacked weights would copy each layer's slice before it multiplies, which doubles the memory traffic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..models.encoder_decoder import Generative
from ..models.layers import OF_ALL_LAYERS, PER_SEGMENT
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
        if variable.get_metadata().get(OF_ALL_LAYERS, False):
            return variable
        own = variable.get_metadata().get(PER_SEGMENT, False)
        sliced = variable.replace(views.of(variable.get_value(), layer - segment.start if own else layer))
        sliced.set_metadata(PER_SEGMENT, True)
        return sliced

    state = jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    # A block split anew: that its variables are the segment's own is part of its structure.
    block = nnx.merge(graphdef, state)
    for _, variable in nnx.iter_graph(block):
        if isinstance(variable, nnx.Variable) and not variable.get_metadata().get(OF_ALL_LAYERS, False):
            variable.set_metadata(PER_SEGMENT, True)
    return Segment(block, layer, layer + 1)


def _slice(array: jax.Array, index: int) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array[index : index + 1]
    return jax.device_put(np.asarray(array)[index : index + 1], array.sharding, may_alias=True)


@dataclasses.dataclass(frozen=True)
class ModelArrays:
    """The arrays of models of one structure, as a program takes them.

    Attributes:
        graphdef: their structure.
        layers: how many layers each segment of the stack has.
        own: arrays in which the models differ, (models, ...); nothing where there is one model.
        shared: all others.
    """

    graphdef: nnx.GraphDef[Any]
    layers: tuple[int, ...]
    own: Any
    shared: Any


def arrays_of(models: Sequence[Generative]) -> ModelArrays:
    """The models' arrays: those that are not the same array in all of them are stacked, the others are there once."""
    split = [nnx.split(m, graph=True) for m in models]
    graphdef, layers = split[0][0], tuple(s.stop - s.start for s in models[0].layers.segments)
    if any(g != graphdef for g, _ in split[1:]):
        raise ValueError("models that are decoded together must have one structure, as the members of a pack have")
    flat = [dict(nnx.to_flat_state(state)) for _, state in split]
    own, shared = [], []
    for path, variable in flat[0].items():
        arrays = [f[path].get_value() for f in flat]
        if all(a is arrays[0] for a in arrays):
            shared.append((path, variable))
        else:
            own.append((path, variable.replace(jnp.stack(arrays))))
    return ModelArrays(graphdef, layers, nnx.from_flat_state(own), nnx.from_flat_state(shared))
