"""Hidden states: the members learn to give those of a frozen teacher, which are computed once a batch for all of them.

The teacher may be pruned, quantised, larger or otherwise trained; it has the members' vocabulary and width. The loss is the mean squared
error over the numbers of each token's last hidden state.
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
from ..data.batching import Example
from ..data.tokens import encoder_texts, plain_ids, start_ids, with_start
from ..errors import InputError
from ..models.encoder_decoder import EncoderDecoder
from ..models.heads import HiddenStates, TaskModel
from ..models.vision import VisionBase
from .base import Base, Columns, Encoded, Rows, Shared, Task, TaskMetrics
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
        """The base's hidden states."""
        if isinstance(base, VisionBase):
            raise InputError(f"task.kind: '{self.name}' reads texts, but the model is one over images.")
        return HiddenStates(base)

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

    def shared(self, section: DistillationConfig, base: Base, load: Callable[..., Any]) -> Shared:
        """The teacher's hidden state at each target.

        Raises:
            InputError: the teacher has another vocabulary or width than the members.
        """
        teacher = load(section.teacher, key="task.teacher")
        _check_teacher(teacher, base, section.teacher)
        return Shared(TEACHER_STATES, HiddenStates(teacher), lambda model, batch: model.features(batch))


TASKS.register("distillation", Distillation())


def _check_teacher(teacher: Base, student: Base, source: str) -> None:
    if isinstance(teacher, EncoderDecoder):
        raise InputError(f"task.teacher: {source} is an encoder-decoder, which has no hidden states of a text alone.")
    for what, of in (
        ("a vocabulary of {} tokens", lambda m: m.config.vocab),
        ("hidden states of {} numbers", lambda m: m.config.block.width),
    ):
        theirs, ours = of(teacher), of(student)
        if theirs != ours:
            raise InputError(f"task.teacher: {source} has {what.format(theirs)}, and the model has {what.format(ours)}.")
