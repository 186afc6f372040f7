"""What a task computes once for all members of a pack (`Task.shared`): anew for each batch, or once an example before the first step."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ..data.examples import spans
from ..models.heads import Classifier
from ..parallel.constraints import in_order, place_batch, row_sharding, targets_by_rows
from ..parallel.mesh import replicated, to_host
from ..parallel.program import Program, compiler_options
from ..tasks.base import Shared
from .step import Batch

HostBatch = dict[str, np.ndarray]


class SharedProgram:
    """What a task computes for all members, compiled.

    What is computed once an example is kept by the tokens of its texts. It is computed in batches that are always the same: for training
    in those of one pass over the run's examples, for evaluations in their own. So a resumed run has the same bits.

    Args:
        shared: what is computed.
        mesh: where the batches are placed.

    Attributes:
        name: of the result in the batch.
        held_out: whether evaluations have it.
        disk_gb, facts, numbers: as in `Shared`.
        asked_to_keep: whether it was seen to that a file keeps it (`trunk_cache.keep_shared`).
        model: the model that computes it.
        once: whether it is computed once an example.
    """

    def __init__(self, shared: Shared, mesh: Mesh):
        self.name, self.model, self.once = shared.name, shared.model, shared.once
        self.held_out, self.disk_gb, self.numbers, self.facts = shared.held_out, shared.disk_gb, shared.numbers, shared.facts
        self.asked_to_keep = False
        self._mesh, self._function = mesh, shared.function
        self._known: tuple[Known, Known] = ({}, {})  # of training, and of evaluations
        if self.once and not self.name.startswith("target_"):
            raise ValueError(f"what is kept of each target is named target_..., not {self.name}")

    @functools.cached_property
    def _parts(self) -> tuple[Any, nnx.State]:
        graphdef, state = nnx.split(self.model, graph=True)
        return graphdef, state

    def _of_micro(self, state: nnx.State, micro: Batch) -> jax.Array:
        rows = targets_by_rows(micro)
        found = self._function(nnx.merge(self._parts[0], state), rows)
        return in_order(rows, found, micro["target_index"].shape[0]) if self.once else found

    @functools.cached_property
    def _step(self) -> Program:
        def of_step(state: nnx.State, batch: Batch) -> jax.Array:
            return jax.lax.map(lambda micro: self._of_micro(state, micro), batch)

        return Program(of_step, self.name, mesh=self._mesh, results=row_sharding(self._mesh, 1), options=compiler_options())

    @functools.cached_property
    def _held_out(self) -> Program:
        results = replicated(self._mesh) if self.once else row_sharding(self._mesh, 0)
        return Program(self._of_micro, f"held-out {self.name}", mesh=self._mesh, results=results, options=compiler_options())

    def of_step(self, batch: Batch, host: HostBatch, pass_over: Iterable[HostBatch]) -> jax.Array:
        """(micro-batches, targets, ...) of a training batch. What is computed once an example is in the order of the batch's targets, all
        else in that of the training step's (`targets_by_rows`).

        Args:
            batch: on the mesh.
            host: the same on the host.
            pass_over: batches without a micro axis that hold every example of the run; they are made when they are needed.
        """
        if not self.once:
            return self._step(self._parts[1], batch)
        return self._placed(values_of(self.known_of(pass_over), host), 1)

    def known_of(self, batches: Iterable[HostBatch], *, held_out: bool = False) -> Known:
        """What is computed once of each of the run's examples, or of the held-out ones; on first use it is.

        Args:
            batches: without a micro axis, that hold all of them; of held-out ones those of an evaluation.
        """
        known = self._known[held_out]
        if not known:
            for one in batches:
                self._learn(known, one)
        return known

    def of_held_out(self, batch: Batch, host: HostBatch) -> jax.Array:
        """(targets, ...): the same for a batch without a micro axis."""
        if not self.once:
            return self._held_out(self._parts[1], batch)
        known = self._known[1]
        values = values_of(known, host)
        if np.isnan(values).any():
            self._learn(known, host)
            values = values_of(known, host)
        return self._placed(values, 0)

    def use(self, known: Known, *, held_out: bool = False) -> None:
        """Takes what was computed of the run's examples, or of the held-out ones, before."""
        self._known[held_out].update(known)

    def shape(self, batch: Batch, *, micro: bool) -> jax.ShapeDtypeStruct:
        """The shape of what `of_step` (if `micro`) or `of_held_out` returns, and where it lies; nothing is computed."""
        if self.once:
            tail = () if self.numbers is None else (self.numbers,)
            return jax.ShapeDtypeStruct((*batch["target_weights"].shape, *tail), np.float32, sharding=replicated(self._mesh))
        found = (self._step if micro else self._held_out).lower(self._parts[1], batch).out_info
        return jax.ShapeDtypeStruct(found.shape, found.dtype, sharding=row_sharding(self._mesh, int(micro)))

    def _learn(self, known: Known, batch: HostBatch) -> None:
        placed = place_batch(self._mesh, batch, row_axis=0)
        keep_values(known, batch, to_host(self._held_out(self._parts[1], placed)))

    def _placed(self, values: np.ndarray, row_axis: int) -> jax.Array:
        return place_batch(self._mesh, {self.name: values}, row_axis=row_axis)[self.name]


# A text's tokens as bytes -> (length, ...) float32, what is kept of each target; NaN at what was no target so far. One text may have
# other targets in another example: a prompt and its answer may be cut elsewhere.
Known = dict[bytes, np.ndarray]


def keep_values(known: Known, batch: Mapping[str, np.ndarray], values: np.ndarray) -> None:
    """Keeps what was computed of a batch's targets.

    Args:
        known: what is kept so far; in place.
        batch: without a micro axis.
        values: (targets, ...) float32, in the order of the batch.
    """
    real, tail = batch["target_weights"] > 0, values.shape[1:]
    flat = np.full((batch["tokens"].size, *tail), np.nan, np.float32)
    flat[batch["target_index"][real]] = values[real]
    for start, stop, name in spans(batch):
        old = known.setdefault(name, np.full((stop - start, *tail), np.nan, np.float32))
        np.copyto(old, flat[start:stop], where=np.isnan(old))


def values_of(known: Known, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """What is kept of a batch's targets, (..., targets, ...) float32: NaN of those that nothing is known of, 0 of filler."""
    tail = next(iter(known.values())).shape[1:] if known else ()
    flat = np.full((batch["tokens"].size, *tail), np.nan, np.float32)
    for start, stop, name in spans(batch):
        if name in known:
            flat[start:stop] = known[name]
    index = batch["target_index"]
    micros = index.size // index.shape[-1]
    each = flat.reshape(micros, -1, *tail)
    found = each[np.arange(micros)[:, None], index.reshape(micros, -1)].reshape(*index.shape, *tail)
    return np.where((batch["target_weights"] > 0).reshape(*index.shape, *[1] * len(tail)), found, np.float32(0))


def one_copy(model: nnx.Module, of: nnx.Module) -> nnx.Module:
    """The model with the other's arrays where both hold equal ones, so that they lie in memory once; in place."""

    def arrays(model: nnx.Module) -> dict[tuple[Any, ...], nnx.Variable]:
        base = model.base if isinstance(model, Classifier) else model
        return {path: v for path, v in nnx.iter_graph(base) if isinstance(v, nnx.Param)}

    held = arrays(of)
    for path, variable in arrays(model).items():
        other = held.get(path)
        alike = other is not None and (other.shape, other.dtype) == (variable.shape, variable.dtype)
        if other is not None and alike and bool(jnp.array_equal(variable[...], other[...])):
            variable.set_value(other[...])
    return model
