"""The shared prefix: what comes before the lowest adapted layer is the same for all members of a pack, and computed once a batch.

It is a program of its own, and the training step takes its result as part of the batch. So it is computed once however the members
are run (side by side, one after the other), nothing below it is differentiated, and it may come from elsewhere, with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from ..adapters.partition import Arrays, Partition
from ..models.heads import TaskModel
from ..models.stack import cut_of
from ..parallel.batches import row_sharding
from ..parallel.program import Program
from .step import Batch
from .trunk_store import PrefixStore

HostBatch = Mapping[str, np.ndarray]


def prefix_depth(part: Partition, micro: Mapping[str, Any]) -> int:
    """How many layers at the bottom of a pack are the same for all its members; 0 where none is.

    That no member's arrays are used below the cut is read off the traced computation: adapters on the embedding, trained biases and
    norms of lower layers, or full training leave nothing to share. (Nor does a cut at layer 0: an embedding is looked up as fast as
    it is kept.)

    Args:
        part: of the pack.
        micro: one micro-batch, of arrays or shapes.
    """
    depth = cut_of(part.merge(part.trainable, part.settings, part.frozen, training=True))
    if not depth:
        return 0
    jaxpr = trace_prefix(part, micro)
    _, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return 0 if any(used[: len(jax.tree.leaves((part.trainable, part.settings)))]) else depth


def trace_prefix(part: Partition, micro: Mapping[str, Any]) -> ClosedJaxpr:
    """What enters the lowest cut of a pack's model, as JAX traces it. Arguments: the members' arrays, one micro-batch, the base."""
    own = (part.trainable, part.settings)
    return jax.make_jaxpr(lambda own, micro, frozen: _run(part, own, frozen, micro, None))(own, micro, part.frozen)


class Prefix:
    """The shared prefix of packs that are cut at the same layer.

    Args:
        part: of one of them.
        depth: `prefix_depth` of it.
        data_seed: of the base's own dropout.
        mesh: where the arrays lie.

    Attributes:
        stores: what is kept of it (`prefix_cache.py`), for training steps and for evaluations.
        asked_to_keep: whether it was seen to that something is.
    """

    def __init__(self, part: Partition, depth: int, data_seed: int, mesh: Mesh):
        self.depth = depth
        self.stores: tuple[PrefixStore, PrefixStore] | None = None
        self.asked_to_keep = False
        self._mesh = mesh
        self._frozen = part.frozen
        own = (part.trainable, part.settings)  # the model is made with them, and the program drops them: it makes no use of them

        def of_step(frozen: Arrays, batch: Batch, step: jax.Array) -> jax.Array:
            noise = jax.random.fold_in(jax.random.key(data_seed), step)
            micros = (jnp.arange(batch["tokens"].shape[0]), batch)
            return jax.lax.map(lambda m: _run(part, own, frozen, m[1], jax.random.fold_in(noise, m[0])), micros)

        def of_held_out(frozen: Arrays, batch: Batch) -> jax.Array:
            return _run(part, own, frozen, batch, None)

        # Compiled as XLA would by itself: `compiling.py`'s options make a row's last bits depend on its place, and no cache can be.
        self._step = Program(of_step, "prefix", mesh=mesh, results=row_sharding(mesh, 1))
        self._held_out = Program(of_held_out, "held-out prefix", mesh=mesh, results=row_sharding(mesh, 0))

    def of_step(self, step: int, batch: Batch, host: HostBatch | None = None) -> jax.Array:
        """(micro-batches, rows, length, width): what enters layer `depth` in training step `step`, dropout of the base included.

        Args:
            step: 0-based.
            batch: on the mesh.
            host: the same on the host, to be looked up in what is kept.
        """
        kept = self._kept(0, host)
        return self._step(self._frozen, batch, jnp.int32(step)) if kept is None else kept

    def of_held_out(self, batch: Batch, host: HostBatch | None = None) -> jax.Array:
        """(rows, length, width): what enters layer `depth` in an evaluation; arguments as in `of_step`."""
        kept = self._kept(1, host)
        return self._held_out(self._frozen, batch) if kept is None else kept

    def _kept(self, which: int, host: HostBatch | None) -> jax.Array | None:
        kept = self.stores[which].get(host) if self.stores is not None and host is not None else None
        return None if kept is None else jax.device_put(kept, row_sharding(self._mesh, 1 - which))

    def layout(self, batch: Batch) -> jax.ShapeDtypeStruct:
        """Shape and dtype of `of_step`; nothing is compiled."""
        return jax.eval_shape(self._step.traces.function, self._frozen, batch, jnp.int32(0))

    @property
    def compiled(self) -> int:
        """How many programs were compiled so far."""
        return self._step.traces.count + self._held_out.traces.count


def _run(part: Partition, own: tuple[Arrays, Arrays], frozen: Arrays, micro: Batch, noise: jax.Array | None) -> jax.Array:
    model = cast(TaskModel, part.merge(*own, frozen, training=noise is not None))
    return model.trunk(micro, noise)
