"""Layers of one shape, their weights stacked `(layers, ...)` and run by one `lax.scan`.

Compile time does not grow with depth, and a sharded base is one array a weight. Two rules keep the frozen base uncopied:
the scan runs over layer *indices* and the body indexes the stacked weights, and the body is a `jax.checkpoint` whose policy
never saves those slices (scanning over `w[s:]`, or saving the slices for the backward pass, copies the base).

A stack is a list of `Segment`s, runs of layers that share a module structure. A fresh stack has one. `split_at` starts a new
one that shares the weights below it, so that a caller may give the layers from there on another structure: what lies below is
then a computation of its own, with nothing in it that depends on what was changed above.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from ..parallel.constraints import by_rows, gathered, take_positions, weights_cut
from .cache import Cache, Kept, Memory
from .layers import AXES, OF_ALL_LAYERS, PER_SEGMENT

_SLICING = frozenset({"dynamic_slice", "slice", "squeeze", "gather", "convert_element_type", "transpose", "reshape", "sharding_constraint"})


def _all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in _SLICING


REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    "none": _all_but_slices,
    "dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Segment(nnx.Module):
    """Layers `start` to `stop` (exclusive) of a stack."""

    def __init__(self, block: nnx.Module, start: int, stop: int):
        self.block = block
        self.start = start
        self.stop = stop


class Stack(nnx.Module):
    """`depth` equal layers with stacked weights.

    Args:
        make_block: makes one layer from `nnx.Rngs`; the layer is called as `block(x, context, layer, gather)`, `layer` being its index.
        depth: how many layers.
        rngs: each layer is initialised with a key of its own.

    Attributes:
        remat: what each layer keeps for the backward pass, of `REMAT_POLICIES`.
        scan: whether the layers run as one loop. Otherwise each is compiled by itself, unless a mesh has cut their weights up: steps on
            CPUs, which then copy nothing between a loop's turns, take about a tenth less time.
    """

    def __init__(self, make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, *, rngs: nnx.Rngs):
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_block(nnx.Rngs(0))))
        states = jax.vmap(lambda key: nnx.state(make_block(nnx.Rngs(key))))(jax.random.split(rngs.params(), depth))
        block = nnx.merge(graphdef, states)
        for _, variable in nnx.iter_graph(block):
            if isinstance(variable, nnx.Variable) and variable.has_metadata(AXES):
                variable.set_metadata(AXES, ("layers", *variable.get_metadata(AXES)))
        self.segments = nnx.List([Segment(block, 0, depth)])
        self.depth = depth
        self.remat = "dots"
        self.scan = True

    def split_at(self, layer: int) -> Segment:
        """The segment that starts at `layer`, cut off from the one that held it; both share the stacked weights."""
        for i, segment in enumerate(self.segments):
            if segment.start == layer:
                return segment
            if segment.start < layer < segment.stop:
                # `nnx.clone(variables=False)` copies the modules and keeps the very same variables.
                upper = Segment(nnx.clone(segment.block, variables=False), layer, segment.stop)
                segment.stop = layer
                self.segments = nnx.List([*self.segments[: i + 1], upper, *self.segments[i + 1 :]])
                return upper
        raise ValueError(f"layer {layer} is outside 0..{self.depth - 1}")

    def __call__(
        self,
        x: jax.Array,
        context: Any,
        gather: jax.Array | None = None,
        after_first: Callable[[jax.Array], jax.Array] | None = None,
        trunk: jax.Array | None = None,
    ) -> jax.Array:
        """Runs all layers.

        Args:
            x: (rows, length, width), the input of layer 0.
            context: what every layer sees alike (masks, rotary angles); any pytree of arrays.
            gather: (n,) int32, positions of the flattened (rows * length) that are needed at the end. The top layer then
                does everything after its attention for these alone. (Not where weights are gathered layer by layer: a layer
                outside of the scan could be gathered early and kept to the end.)
            after_first: what the output of layer 0 goes through before layer 1; that layer is then run by itself.
            trunk: (rows, length, width), the output of `below`, computed before; the layers below the cut are not run then.

        Returns:
            (rows, length, width), or (n, width) with `gather`.
        """
        if weights_cut() and gather is not None:
            return take_positions(self(x, context, None, after_first, trunk), gather)
        lowest, *above = self.segments
        if above:
            x = self.below(x, context, after_first) if trunk is None else trunk
        for segment in above or [lowest]:
            top = segment.stop == self.depth and gather is not None
            stop = segment.stop - 1 if top else segment.stop
            if stop > segment.start:
                x = self._run(segment, x, context, segment.start, stop, None, after_first)
            if top:
                x = self._run(segment, x, context, stop, stop + 1, gather, after_first)
        return x

    def below(self, x: jax.Array, context: Any, after_first: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
        """(rows, length, width): the output of the layers below the lowest cut. Nothing above the cut is needed for it.

        Raises:
            ValueError: the stack is not cut.
        """
        if len(self.segments) == 1:
            raise ValueError("the model has no cut: all its layers are one segment")
        return self._run(self.segments[0], x, context, 0, self.segments[0].stop, None, after_first)

    def extend(self, x: jax.Array, context: Any, cache: Cache, *, first: bool) -> tuple[jax.Array, list[Kept]]:
        """Runs all layers on further tokens.

        Args:
            x, context: as for a call.
            cache: of the tokens before.
            first: that there are none.

        Returns:
            (rows, length, width), and what each segment keeps (`Cache.kept`), with the keys and values of the new tokens.
        """
        found, places = [], cache.places(x.shape[1])
        for segment, before in zip(self.segments, cache.kept, strict=True):

            def remember(kept: Kept, layer: Any, of: Segment = segment) -> Memory:
                own = None if of.stop - of.start == 1 else layer - of.start
                return Memory(kept, own, places, first, cache.rolling)

            x, after = self._layers(segment, x, context, segment.start, segment.stop, None, before, remember)
            found.append(after)
        return x, found

    def _run(
        self,
        segment: Segment,
        x: jax.Array,
        context: Any,
        start: int,
        stop: int,
        gather: jax.Array | None,
        after_first: Callable[[jax.Array], jax.Array] | None,
    ) -> jax.Array:
        if start == 0 and after_first is not None:
            x, start = after_first(self._layers(segment, x, context, 0, 1, None)[0]), 1
            if stop == 1:
                return take_positions(x, gather)
        return self._layers(segment, x, context, start, stop, gather)[0]

    def _layers(
        self,
        segment: Segment,
        x: jax.Array,
        context: Any,
        start: int,
        stop: int,
        gather: jax.Array | None,
        kept: Kept | None = None,
        remember: Callable[[Kept, Any], Memory] | None = None,
    ) -> tuple[jax.Array, Kept | None]:
        """A segment's layers `start` to `stop`.

        Args:
            kept: the segment's keys and values of the tokens before; handed from layer to layer and returned with what each adds.
            remember: from them and a layer's index to that layer's memory.
        """
        graphdef, own, common, shared = nnx.split(segment.block, _marked(PER_SEGMENT), _marked(OF_ALL_LAYERS), ..., graph=True)
        if (start, stop) != (segment.start, segment.stop):
            own = jax.tree.map(lambda a: a[start - segment.start : stop - segment.start], own)

        def body(carry: tuple[jax.Array, Kept | None], step: tuple[Any, Any]) -> tuple[tuple[jax.Array, Kept | None], None]:
            (x, kept), (index, own) = carry, step
            layer = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), shared)
            block = nnx.merge(graphdef, _at_hand(own), common, _at_hand(layer))
            memory = None if kept is None or remember is None else remember(kept, index)
            x = by_rows(block(by_rows(x), context, index, gather, *(() if memory is None else (memory,))))
            return (x, None if memory is None else memory.kept), None

        one_by_one = not (self.scan or weights_cut())
        # A loop keeps XLA from finding what is recomputed equal to what was computed first; layers one by one need to be told.
        body = jax.checkpoint(body, policy=REMAT_POLICIES[self.remat], prevent_cse=one_by_one)
        if one_by_one or stop - start == 1:
            carry = (x, kept)
            for layer in range(start, stop):
                carry, _ = body(carry, (layer, jax.tree.map(lambda a, place=layer - start: a[place], own)))
            return carry
        return jax.lax.scan(body, (x, kept), (jax.numpy.arange(start, stop), own))[0]


def stacks_of(model: nnx.Module) -> list[Stack]:
    """All stacks of a model."""
    return [m for _, m in nnx.iter_modules(model) if isinstance(m, Stack)]


def cut_of(model: nnx.Module) -> int:
    """How many layers `trunk` runs: those below the lowest cut of the model's stack; 0 where none is cut, or more than one stack is.

    A model with several stacks, or none, may say it itself, as `trunk_depth`; what holds another has the last word by saying 0.
    """
    said = [depth for _, m in nnx.iter_modules(model) if (depth := getattr(m, "trunk_depth", None)) is not None]
    if said:
        return min(said)
    cuts = [stack.segments[0].stop for stack in stacks_of(model) if len(stack.segments) > 1]
    return cuts[0] if len(cuts) == 1 else 0


def _marked(key: str) -> Callable[[Any, Any], bool]:
    """A filter for `nnx.split`: the variables with this metadata."""
    return lambda _, variable: bool(variable.get_metadata().get(key, False))


def _at_hand(state: Any) -> Any:
    """One layer's weights, gathered where a mesh has cut them up: here and not sooner, so that no device holds more than a layer."""

    def one(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata().get(AXES)
        return variable.replace(gathered(variable.get_value(), axes and axes[1:]))

    return jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
