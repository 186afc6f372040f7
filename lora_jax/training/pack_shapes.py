"""A pack of so many members that is not there: what its programs compute and what memory they take, compiled but never run."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from ..adapters.inject import inject_structure
from ..adapters.partition import Partition, partition, update_mask
from ..adapters.placement import member_shardings
from ..adapters.spec import Structure, resolve, unite
from ..config.schema import Config
from ..parallel.batches import place_batch, row_sharding
from .flops import count_flops
from .memory import program_bytes
from .optimizer import hyper_of
from .pack_choice import told_mode
from .pack_mode import VMAP
from .prefix import prefix_depth, trace_prefix
from .setup import Setup
from .step import Batch, MemberFixed, PackPrograms, Program, eval_step, init_member, train_step


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
        self.structure: Structure = unite(setup.model, specs)
        self._setup, self._config = setup, configs[0]
        self._mode = told_mode(configs[0]) or VMAP  # the mode that needs most stands for one that is yet to be chosen
        self.part: Partition = partition(inject_structure(setup.model, self.structure))
        own = MemberFixed(hyper_of(configs[0], setup.steps), self.part.settings, update_mask(self.part, specs[0], self.structure))
        self._fixed = own
        self._micro = {name: array[0] for name, array in setup.plan.batch(0).items()}

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
        step = functools.partial(train_step, self.part)
        return count_flops(jax.make_jaxpr(step)(state, self._fixed, self.part.frozen, batch, jnp.int32(0), jax.random.key(0)))

    @functools.cached_property
    def shared_flops(self) -> int:
        """Of what is computed once in an optimizer step, however many members there are."""
        return 0 if self._prefix is None else count_flops(self._prefix) * self._setup.plan.batch(0)["tokens"].shape[0]

    @functools.cached_property
    def evaluation_flops(self) -> tuple[int, int]:
        """Of one evaluation: (one member's, what is computed once for all)."""
        held_out = self._setup.plan.eval_batches()
        step = functools.partial(eval_step, self.part)
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
        programs = PackPrograms(part, self._config.training.data_seed, setup.mesh, self._mode)
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
        if self._setup.teacher is not None:
            wanted = self._setup.teacher.shape({name: placed[name] for name in batch}, micro=row_axis == 1)
            placed["target_values"] = jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=row_sharding(self._setup.mesh, row_axis))
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
