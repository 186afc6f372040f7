"""A pack of so many members that is not there: what its programs compute and what memory they take, compiled but never run.

Arithmetic of a computation, counted on what JAX traces of it: XLA's own count takes the body of a scan once.

How fast the devices at hand multiply matrices.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from ..adapters.inject import inject_layout
from ..adapters.layout import Layout, resolve, unite
from ..adapters.partition import Partition, member_shardings, partition, update_mask
from ..config.schema import Config
from ..parallel.batches import place_batch, row_sharding
from ..parallel.program import Program, program_bytes
from ..tasks.base import objective_of
from ..training.optimizer import hyper_of
from ..training.setup import Setup
from ..training.step import Batch, MemberFixed, eval_step, init_member, train_step
from ..training.trunk import prefix_depth, trace_prefix
from .execution import VMAP, PackPrograms, told_mode


@dataclasses.dataclass(frozen=True)
class PackMemory:
    """Bytes on one device while a pack trains, as compiled.

    Attributes:
        base: the frozen weights, once.
        shared: what else there is once: the batch, what is computed from it for all members.
        state: of the members: trained arrays, the optimizer's moments, settings, and a copy of the best trained arrays so far.
        activations: what the fuller of the two programs, training and evaluation, needs beside all that.
    """

    base: int
    shared: int
    state: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.shared + self.state + self.activations


@dataclasses.dataclass(frozen=True)
class MemoryLine:
    """The memory of a pack of any size, from those of two sizes.

    Between them and beyond on a straight line; but what comes with the members (state, activations) never falls behind them beyond
    the larger: XLA lays out the few buffers of a small pack more tightly than those of a large one.

    Attributes:
        small, large: (members, their memory), compiled.
        unit: members of a pack are rounded up to it: the mesh's `sweep` axis.
        width: how many a device runs at a time, where that is not all of them: more have no more activations.
    """

    small: tuple[int, PackMemory]
    large: tuple[int, PackMemory]
    unit: int = 1
    width: int | None = None

    def at(self, members: int) -> PackMemory:
        """What a pack of so many takes."""
        count = -(-members // self.unit) * self.unit
        (low, a), (high, b) = self.small, self.large

        def one(x: int, y: int, count: int) -> int:
            slope = 0.0 if high == low else (y - x) / (high - low)
            return round(y + (count - high) * (slope if count <= high else min(slope, y / high)))

        base, shared, state, _ = (one(x, y, count) for x, y in zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True))
        at_once = count if self.width is None else min(count, max(high, self.width * self.unit))
        return PackMemory(base, shared, state, one(a.activations, b.activations, at_once))

    def fitting(self, limit: int, most: int) -> int:
        """The largest pack of at most `most` members that `limit` bytes hold; 0 where one is too much."""
        return bisect.bisect_right(range(1, most + 1), limit, key=lambda members: self.at(members).total)


class PackShapes:
    """The programs of members that share a structure, for any number of them.

    Args:
        setup: what they share.
        configs: the members whose structure it is (padded ranks, sites, lowest layer); alike in what is static.
    """

    def __init__(self, setup: Setup, configs: Sequence[Config]):
        specs = [resolve(setup.model, c.adapter) for c in configs]
        self.structure: Layout = unite(setup.model, specs)
        self._setup, self._config = setup, configs[0]
        self._mode = told_mode(configs[0]) or VMAP  # the mode that needs most stands for one that is yet to be chosen
        self.part: Partition = partition(inject_layout(setup.model, self.structure))
        own = MemberFixed(hyper_of(configs[0], setup.steps), self.part.settings, update_mask(self.part, specs[0], self.structure))
        self._fixed = own
        self._micro = {name: array[0] for name, array in setup.plan.batch(0).items()}
        self._objective = objective_of(configs[0].task)

    @functools.cached_property
    def depth(self) -> int:
        """How many layers are computed once for all members."""
        return prefix_depth(self.part, self._micro)

    @functools.cached_property
    def _prefix(self) -> ClosedJaxpr | None:
        return trace_prefix(self.part, self._micro) if self.depth else None

    @functools.cached_property
    def member_flops(self) -> int:
        """Of one member in one optimizer step, its padding included."""
        batch = self._batch(self._setup.plan.batch(0), 1)
        state = jax.eval_shape(lambda t, f: init_member(self.part, t, f), self.part.trainable, self._fixed)
        step = functools.partial(train_step, self.part, self._objective)
        return count_flops(jax.make_jaxpr(step)(state, self._fixed, self.part.frozen, batch, jnp.int32(0), jax.random.key(0)))

    @functools.cached_property
    def shared_flops(self) -> int:
        """Of what is computed once in an optimizer step, however many members there are."""
        return 0 if self._prefix is None else count_flops(self._prefix) * self._setup.plan.batch(0)["tokens"].shape[0]

    @functools.cached_property
    def evaluation_flops(self) -> tuple[int, int]:
        """Of one evaluation: (one member's, what is computed once for all)."""
        held_out = self._setup.plan.eval_batches()
        step = functools.partial(eval_step, self.part, self._objective)
        batch = self._batch(held_out[0], 0)
        own = count_flops(jax.make_jaxpr(step)(self.part.trainable, self.part.settings, self.part.frozen, batch))
        shared = 0 if self._prefix is None else count_flops(self._prefix)
        return own * len(held_out), shared * len(held_out)

    def memory_line(self, most: int) -> MemoryLine:
        """Compiles the smallest pack and a small one, to tell the memory of packs of up to `most` members.

        Eight are laid out as any larger pack is; four need not be, and are up to a tenth smaller for each member.
        """
        unit = self._setup.mesh.shape["sweep"]
        large = unit * max(1, min(8, most // unit))
        small = self.memory(unit)
        return MemoryLine((unit, small), (large, small if large == unit else self.memory(large)), unit, self._mode.width)

    def memory(self, members: int) -> PackMemory:
        """Compiles the training and the evaluation of so many members, and asks what they take; nothing is run or placed."""
        setup, part = self._setup, self.part
        stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((members, *np.shape(a)), a.dtype), (part.trainable, self._fixed))
        state = jax.eval_shape(jax.vmap(lambda t, f: init_member(part, t, f)), *stacked)
        state, fixed = self._laid((state, stacked[1]))
        programs = PackPrograms(part, self._config.training.data_seed, setup.mesh, self._mode, objective=self._objective)
        batch, held_out = self._batch(setup.plan.batch(0), 1), self._batch(setup.plan.eval_batches()[0], 0)
        train = _memory_of(programs.train, state, fixed, part.frozen, batch, jax.ShapeDtypeStruct((), jnp.int32))
        evaluate = _memory_of(programs.evaluate, state.trainable, fixed.settings, part.frozen, held_out)
        base, own = _bytes(part.frozen), _bytes((state, fixed))
        shared = _bytes(batch)
        # An evaluation needs less in the way of arguments; what it needs beside them counts where training has gone already.
        needed = max(train - base - own - shared, evaluate - base - _bytes((state.trainable, fixed.settings)) - _bytes(held_out))
        return PackMemory(base, shared, own + _bytes(state.trainable), max(0, needed))

    def _laid(self, tree: Any) -> Any:
        layouts = member_shardings(self.part, self._setup.mesh, tree)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, layouts)

    def _batch(self, batch: dict[str, np.ndarray], row_axis: int) -> Batch:
        placed: dict[str, Any] = place_batch(self._setup.mesh, batch, row_axis=row_axis)
        if self._prefix is not None:
            entering = self._prefix.out_avals[0]
            shape = (*batch["tokens"].shape[:row_axis], *entering.shape)
            placed["prefix"] = jax.ShapeDtypeStruct(shape, entering.dtype, sharding=row_sharding(self._setup.mesh, row_axis))
        if (shared := self._setup.shared) is not None:
            wanted = shared.shape({name: placed[name] for name in batch}, micro=row_axis == 1)
            placed[shared.name] = jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=row_sharding(self._setup.mesh, row_axis))
        return placed


def _memory_of(program: Program, *args: Any) -> int:
    return program_bytes(program.lower(*args).compile()) or 0


def _bytes(tree: Any) -> int:
    """Of arrays or shapes, on one device."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = np.shape(leaf) if sharding is None else sharding.shard_shape(leaf.shape)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # some 32-bit words, by the kind of key
        return 4 * jax.eval_shape(jax.random.key_data, leaf).size
    return math.prod(shape) * leaf.dtype.itemsize


def count_flops(traced: ClosedJaxpr) -> int:
    """Additions and multiplications of the matrix products and convolutions in a traced computation, those in loops as often as they run.

    What no result depends on is not counted, as XLA drops it. All else (norms, activations, softmax, the optimizer) is left out: it is
    a few percent where matrices are of useful size.

    >>> count_flops(jax.make_jaxpr(jnp.matmul)(jnp.ones((2, 3)), jnp.ones((3, 5))))
    60
    """
    jaxpr = traced.jaxpr
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        elif name == "ragged_dot_general":  # each row with one group's weights, whatever the compiler makes of it
            numbers = equation.params["ragged_dot_dimension_numbers"]
            (_, contracted), (_, batched) = numbers.dot_dimension_numbers
            rows, weights = (v.aval.shape for v in equation.invars[:2])
            known = {*contracted, *batched, *numbers.rhs_group_dimensions}
            total += 2 * math.prod(rows) * math.prod(size for i, size in enumerate(weights) if i not in known)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // kernel[outputs]
        elif name == "scan":
            total += equation.params["length"] * _count(equation.params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in equation.params["branches"])
        else:
            total += sum(_count(inner) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The computations that an equation calls (`jit`, `checkpoint`, `custom_vjp`, ...), each once."""
    for value in params.values():
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def matmul_rate(rows: int, width: int, hidden: int, dtype: str = "float32", *, seconds: float = 0.5) -> float:
    """FLOP/s of one device at products of the sizes of a layer's: (rows, width) by (width, hidden) and back, in turn.

    The best of as many runs as fit into `seconds` (at least three): what the device can do, not what else it is doing.

    Args:
        rows, width, hidden: of the matrices.
        dtype: of them.
        seconds: how long to measure; compiling comes on top.
    """
    turns = max(1, round(2e9 / (4 * rows * width * hidden)))

    @jax.jit
    def products(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, turns, lambda _, x: (x @ up) @ down, x)

    # Zeros stay zeros: no product overflows, and matrix units take no notice.
    args = [jnp.zeros(shape, dtype) for shape in ((rows, width), (width, hidden), (hidden, width))]
    products(*args).block_until_ready()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        products(*args).block_until_ready()
        times.append(time.perf_counter() - began)
    return turns * 4 * rows * width * hidden / min(times)
