"""Hidden states: the members learn to give those of a frozen teacher, which are computed once a batch for all of them.

The teacher may be pruned, quantised, larger or otherwise trained; it has the members' vocabulary. Where it has another width, each member
trains a linear layer from its own hidden states to the teacher's (`projection`). The loss is the mean squared error over the numbers of
each token's last hidden state. How a teacher's logits are met beside a task's own loss: `teachers.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from ..config.doors import TASKS
from ..config.schema import SOURCE, TaskConfig
from ..config.types import PositiveInt
from ..data.batching import Example
from ..data.tokens import encoder_texts, plain_ids, start_ids, with_start
from ..errors import InputError
from ..models.encoder_decoder import EncoderDecoder
from ..models.heads import HiddenStates, ProjectedStates, TaskModel
from ..models.vision import VisionBase
from .base import Base, Columns, Encoded, Rows, Shared, Task, TaskData, TaskMetrics
from .objectives import OBJECTIVES, summed_squared_error

# The array of a batch that holds the teacher's states, (targets, width).
TEACHER_STATES = "teacher_states"


class DistillationConfig(TaskConfig):
    kind: Literal["distillation"] = Field(default="distillation", description="A teacher's last hidden states.")
    text: str = Field(description="Text column.")
    teacher: str = Field(
        description=(
            "The model whose last hidden states are to be met at each token (forms as model.source); of the same vocabulary and width. "
            "The loss is the mean squared error."
        ),
        json_schema_extra=SOURCE,
    )
    projection: PositiveInt | None = Field(
        default=None, description="The teacher's width, where it is another: a linear layer to it is trained with each member."
    )


def distillation_loss(model: TaskModel, features: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Squared error of the model's states and the teacher's, each token's the mean over its numbers."""
    return summed_squared_error(model.readout()(features), batch[TEACHER_STATES], batch["target_weights"]), jnp.float32(0)


OBJECTIVES.register("distillation", distillation_loss)


class Distillation(Task):
    """A teacher's last hidden states."""

    name, section, objective, shared_keys = "distillation", DistillationConfig, "distillation", frozenset({"teacher"})

    def columns(self, section: DistillationConfig) -> Columns:
        """Texts."""
        return Columns((section.text,))

    def metrics(self, section: DistillationConfig, classes: tuple[str, ...] | None) -> TaskMetrics:
        """The loss alone: nothing is right or wrong."""
        return TaskMetrics(("loss",), "loss")

    def model(
        self, section: DistillationConfig, base: Base, classes: tuple[str, ...] | None, class_token_ids: np.ndarray | None = None
    ) -> nnx.Module:
        """The base's hidden states, or what a linear layer makes of them."""
        if isinstance(base, VisionBase):
            raise InputError(f"task.kind: '{self.name}' reads texts, but the model is one over images.")
        return HiddenStates(base) if section.projection is None else ProjectedStates(base, section.projection, rngs=nnx.Rngs(0))

    def encode(self, section: DistillationConfig, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None) -> Encoded:
        """A target at each token. Its id (0) says nothing: the teacher knows what it is to be."""
        texts = rows.columns[section.text]
        if decoder:
            start = start_ids(tokenizer)
            whole = [with_start(ids, start) if ids else [] for ids in plain_ids(tokenizer, texts)]
            encoded = [(ids[: section.max_length], len(ids) > section.max_length) for ids in whole]
        else:
            encoded = encoder_texts(tokenizer, texts, section.max_length)
        made = [(np.array(ids, np.int32), cut) for ids, cut in encoded]
        return Encoded([Example(ids, np.zeros(len(ids), np.int32), cut=cut, end_cut=cut) for ids, cut in made])

    def shared(self, section: DistillationConfig, base: Base, load: Callable[..., Any], data: TaskData) -> Shared:
        """The teacher's hidden state at each target.

        Raises:
            InputError: the teacher has another vocabulary or width than the members.
        """
        teacher = load(section.teacher, key="task.teacher")
        _check_teacher(teacher, base, section)
        return Shared(TEACHER_STATES, HiddenStates(teacher), lambda model, batch: model.features(batch))


TASKS.register("distillation", Distillation())


def _check_teacher(teacher: Base, student: Base, section: DistillationConfig) -> None:
    source = section.teacher
    if isinstance(teacher, EncoderDecoder):
        raise InputError(f"task.teacher: {source} is an encoder-decoder, which has no hidden states of a text alone.")
    width = teacher.config.block.width
    if section.projection is not None and section.projection != width:
        raise InputError(f"task.projection: {section.projection}, but the hidden states of {source} have {width} numbers.")
    theirs, ours = teacher.config.vocab, student.config.vocab
    if theirs != ours:
        raise InputError(f"task.teacher: {source} has a vocabulary of {theirs} tokens, and the model has a vocabulary of {ours} tokens.")
    own = student.config.block.width
    if section.projection is None and width != own:
        raise InputError(
            f"task.teacher: {source} has hidden states of {width} numbers, and the model has hidden states of {own} numbers. "
            f"task.projection: {width} trains a layer from one to the other."
        )
