"""What a pack costs before it exists: memory, as its programs are compiled over shapes, and arithmetic, as they are traced.

XLA's own count of FLOPs takes the body of a scan once, so they are counted on the trace.
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
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..adapters.inject import inject_layout
from ..adapters.layout import Layout, ResolvedAdapter
from ..adapters.partition import ORIGINAL, Partition, member_shardings, own_shapes, partition, trainable_spec, update_mask
from ..config.schema import Config
from ..parallel.constraints import place_batch, row_sharding
from ..parallel.mesh import parameter_sharding
from ..parallel.program import program_bytes
from ..tasks.objectives import Objective
from ..tasks.on_policy import OnPolicy
from ..training.optimizer import hyper_of
from ..training.setup import Setup
from ..training.step import Batch, MemberFixed, MemberState, eval_step, init_member, train_step
from ..training.trunk import trace_trunk, trunk_depth
from .execution import VMAP, PackPrograms, configured_mode


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
class Placement:
    """Where one parameter lies. `bytes` are those on one device; of a trained one, of all members that lie there."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    trained: bool
    bytes: int


@dataclasses.dataclass(frozen=True)
class MemoryLine:
    """The memory of a pack of any size, from those of two sizes.

    It is a straight line between them and beyond. Beyond the larger one, state and activations grow at least in proportion to the
    members: XLA lays out the few buffers of a small pack more tightly than those of a large one.

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
        """The memory of a pack of so many members."""
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
    """The programs of members that share a structure, for any number of them. No array is made, and the base may be shapes itself.

    Args:
        setup: what they share.
        configs: the members whose structure it is (padded ranks, sites, lowest layer); alike in what is static.
    """

    def __init__(self, setup: Setup, configs: Sequence[Config]):
        self.structure: Layout = setup.layout(configs)
        self._setup, self._config, self.mesh = setup, configs[0], setup.mesh
        self._mode = configured_mode(configs[0]) or VMAP  # the mode that needs most stands for one that is yet to be chosen
        self._objective = setup.objective(configs[0])
        self.part, self._fixed = _abstract(setup, self.structure, configs[0], setup.spec(configs[0]), self._objective)
        self._micro = {name: array[0] for name, array in setup.plan.batch(0).items()}

    @functools.cached_property
    def depth(self) -> int:
        """How many layers are computed once for all members."""
        return 0 if isinstance(self._objective, OnPolicy) else trunk_depth(self.part, self._micro)

    @functools.cached_property
    def _trunk(self) -> ClosedJaxpr | None:
        return trace_trunk(self.part, self._micro) if self.depth else None

    @functools.cached_property
    def _step(self) -> ClosedJaxpr:
        """One member's training step, as JAX traces it."""
        batch = self._batch(self._setup.plan.batch(0), 1)
        step = functools.partial(train_step, self.part, self._objective)
        return jax.make_jaxpr(step)(self._member, self._fixed, self.part.frozen, batch, jnp.int32(0), jax.random.key(0))

    @functools.cached_property
    def _evaluation(self) -> ClosedJaxpr:
        """One member's evaluation of one batch."""
        batch = self._batch(self._setup.plan.eval_batches()[0], 0)
        step = functools.partial(eval_step, self.part, self._objective)
        return jax.make_jaxpr(step)(self.part.trainable, self.part.settings, self.part.frozen, batch)

    @functools.cached_property
    def _member(self) -> MemberState:
        return jax.eval_shape(lambda t, f: init_member(self.part, t, f, self._objective), self.part.trainable, self._fixed)

    @functools.cached_property
    def member_flops(self) -> int:
        """Of one member in one optimizer step, its padding included."""
        return count_flops(self._step)

    @functools.cached_property
    def shared_flops(self) -> int:
        """Of what is computed once in an optimizer step, however many members there are."""
        return 0 if self._trunk is None else count_flops(self._trunk) * self._setup.plan.batch(0)["segment_ids"].shape[0]

    @functools.cached_property
    def evaluation_flops(self) -> tuple[int, int]:
        """Of one evaluation on the held-out rows: (one member's, what is computed once for all)."""
        batches = len(self._setup.plan.eval_batches())
        shared = 0 if self._trunk is None else count_flops(self._trunk)
        return count_flops(self._evaluation) * batches, shared * batches

    def upper_bound(self, members: int) -> int:
        """Bytes on one device that a pack of so many members does not exceed, from the trace alone: nothing is compiled.

        Every intermediate result of every member counts as if it were held to the end, and on one device.
        """
        own = _bytes((self._member, self._fixed, self.part.trainable)) + max(count_bytes(self._step), count_bytes(self._evaluation))
        shared = _bytes(self._batch(self._setup.plan.batch(0), 1))
        return _bytes(self.part.frozen) + shared + own * -(-members // self._setup.mesh.shape["sweep"])

    def placements(self, members: int) -> list[Placement]:
        """Where every parameter lies while so many members train: the base's, then the trained ones."""
        mesh, part = self._setup.mesh, self.part
        on_device = -(-members // mesh.shape["sweep"])
        found = [(name, a, _base_sharding(part, name, mesh), False, 1) for name, a in part.frozen.items()]
        found += [(name, a, NamedSharding(mesh, trainable_spec(part, name, mesh)), True, on_device) for name, a in part.trainable.items()]
        return [
            Placement(name, a.shape, str(a.dtype), sharding.spec, trained, count * _leaf_bytes(_laid(a, sharding)))
            for name, a, sharding, trained, count in found
        ]

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
        state, fixed = self._members(members)
        batch, held_out = self._batch(setup.plan.batch(0), 1), self._batch(setup.plan.eval_batches()[0], 0)
        train = program_bytes(self.compiled_step(members)) or 0
        evaluate = program_bytes(self._programs.evaluate.lower(state.trainable, fixed.settings, part.frozen, held_out).compile()) or 0
        base, own = _bytes(part.frozen), _bytes((state, fixed))
        shared = _bytes(batch)
        # An evaluation needs less in the way of arguments; what it needs beside them counts where training has gone already.
        needed = max(train - base - own - shared, evaluate - base - _bytes((state.trainable, fixed.settings)) - _bytes(held_out))
        return PackMemory(base, shared, own + _bytes(state.trainable), max(0, needed))

    def compiled_step(self, members: int) -> Any:
        """The training step of so many members, compiled (`jax.stages.Compiled`), to look at: nothing is run or placed."""
        batch = self._batch(self._setup.plan.batch(0), 1)
        arguments = (*self._members(members), self.part.frozen, batch, jax.ShapeDtypeStruct((), jnp.int32))
        return self._programs.train.lower(*arguments).compile()

    @property
    def _programs(self) -> PackPrograms:
        return PackPrograms(self.part, self._config.training.data_seed, self._setup.mesh, self._mode, objective=self._objective)

    def _members(self, count: int) -> tuple[MemberState, MemberFixed]:
        """Of so many members, as shapes."""
        stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *np.shape(a)), a.dtype), (self.part.trainable, self._fixed))
        state = jax.eval_shape(jax.vmap(lambda t, f: init_member(self.part, t, f, self._objective)), *stacked)
        return self._placed((state, stacked[1]))

    def _placed(self, tree: Any) -> Any:
        return jax.tree.map(_laid, tree, member_shardings(self.part, self._setup.mesh, tree))

    def _batch(self, batch: dict[str, np.ndarray], row_axis: int) -> Batch:
        placed: dict[str, Any] = place_batch(self._setup.mesh, batch, row_axis=row_axis)
        if self._trunk is not None:
            entering = self._trunk.out_avals[0]
            shape = (*batch["segment_ids"].shape[:row_axis], *entering.shape)
            placed["trunk"] = jax.ShapeDtypeStruct(shape, entering.dtype, sharding=row_sharding(self._setup.mesh, row_axis))
        if (shared := self._setup.shared) is not None and (row_axis == 1 or shared.held_out):
            placed[shared.name] = shared.shape({name: placed[name] for name in batch}, micro=row_axis == 1)
        return placed


def _abstract(
    setup: Setup, structure: Layout, config: Config, spec: ResolvedAdapter, objective: Objective | OnPolicy
) -> tuple[Partition, MemberFixed]:
    """The adapted model in parts and one member's fixed arrays, all as shapes; the base's with where they lie."""
    found: list[Partition] = []

    def build(model: nnx.Module) -> tuple[Any, Any, Any, MemberFixed]:
        part = partition(inject_layout(model, structure))
        if isinstance(objective, OnPolicy) and objective.needs_base:
            part = part.with_originals()
        found.append(part)
        hyper = hyper_of(config, setup.steps, lambda: own_shapes(part, spec, structure))
        fixed = MemberFixed(hyper, part.settings, update_mask(part, spec, structure))
        return part.trainable, part.settings, part.frozen, fixed

    trainable, settings, frozen, fixed = nnx.eval_shape(build, setup.model)
    (part,) = found
    frozen = {name: _laid(a, _base_sharding(part, name, setup.mesh)) for name, a in frozen.items()}
    return dataclasses.replace(part, trainable=trainable, settings=settings, frozen=frozen), fixed


def _base_sharding(part: Partition, name: str, mesh: Mesh) -> NamedSharding:
    array = part.frozen[name]
    return parameter_sharding(mesh, array.shape, part.axes.get(name.removeprefix(ORIGINAL), (None,) * array.ndim))


def _laid(array: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


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


def count_bytes(traced: ClosedJaxpr) -> int:
    """Bytes of all intermediate results of a traced computation, those in a loop's body once.

    Numbers of fewer than four bytes count as four: a device that cannot multiply them computes with those.

    >>> count_bytes(jax.make_jaxpr(lambda x: (x + 1) * 2)(jnp.ones(3)))
    24
    """
    jaxpr = traced.jaxpr
    return _sizes(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _sizes(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        total += sum(_value_bytes(v.aval) for v in equation.outvars)
        inner = [_sizes(one) for one in _inner(equation.params)]
        branches = [_sizes(branch.jaxpr) for branch in equation.params.get("branches", ())]
        total += sum(inner) + max(branches, default=0)
        if equation.primitive.name == "scan":  # each round takes a slice of what is scanned over
            total += sum(_value_bytes(v.aval) for v in equation.params["jaxpr"].jaxpr.invars)
    return total


def _value_bytes(value: Any) -> int:
    size = math.prod(getattr(value, "shape", ()))
    dtype = getattr(value, "dtype", np.dtype(np.int32))
    return size * (16 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else max(4, dtype.itemsize))


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
