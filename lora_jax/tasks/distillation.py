"""The teacher of a distillation: a frozen model whose hidden states the members are to meet, computed once a batch for all of them."""

from __future__ import annotations

import jax
from flax import nnx
from jax.sharding import Mesh

from ..errors import InputError
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.heads import HiddenStates
from ..parallel.batches import row_sharding, targets_by_rows
from ..parallel.program import Program, compiler_options

Batch = dict[str, jax.Array]


class Teacher:
    """A model that makes targets of batches.

    Args:
        model: the teacher, its weights where they belong on the mesh.
        mesh: where the batches lie.
    """

    def __init__(self, model: HiddenStates, mesh: Mesh):
        graphdef, self._state = nnx.split(model, graph=True)

        def of_micro(state: nnx.State, micro: Batch) -> jax.Array:
            return nnx.merge(graphdef, state).features(targets_by_rows(micro))

        def of_step(state: nnx.State, batch: Batch) -> jax.Array:
            return jax.lax.map(lambda micro: of_micro(state, micro), batch)

        self._step = Program(of_step, "teacher", mesh=mesh, results=row_sharding(mesh, 1), options=compiler_options())
        self._held_out = Program(of_micro, "held-out teacher", mesh=mesh, results=row_sharding(mesh, 0), options=compiler_options())

    def of_step(self, batch: Batch) -> jax.Array:
        """(micro-batches, targets, width): the last hidden state at each target of a training batch, in the order of the training step
        (`targets_by_rows`)."""
        return self._step(self._state, batch)

    def of_held_out(self, batch: Batch) -> jax.Array:
        """(targets, width): the same of a batch without a micro axis."""
        return self._held_out(self._state, batch)

    def shape(self, batch: Batch, *, micro: bool) -> jax.ShapeDtypeStruct:
        """Of what `of_step` (`micro`) or `of_held_out` gives; nothing is computed."""
        return (self._step if micro else self._held_out).lower(self._state, batch).out_info


def check_teacher(teacher: Encoder | Decoder, student: Encoder | Decoder, source: str) -> None:
    """`InputError` unless the two have the same vocabulary and width, so that one's states can be compared with the other's."""
    for what, of in (
        ("a vocabulary of {} tokens", lambda m: m.config.vocab),
        ("hidden states of {} numbers", lambda m: m.config.block.width),
    ):
        theirs, ours = of(teacher), of(student)
        if theirs != ours:
            raise InputError(f"task.teacher: {source} has {what.format(theirs)}, and the model has {what.format(ours)}.")
