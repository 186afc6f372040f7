"""Distillation of logits: a teacher's distribution is met beside what the task itself wants (Hinton et al., arXiv:1503.02531).

The loss of a target is alpha T^2 KL(teacher || member) + (1 - alpha) cross-entropy, both distributions softened by the temperature T. The
teacher is asked once an example, before the first step; members are evaluated by the task's own loss, without it. A task whose objective
is cross-entropy has a teacher by being `Taught`, with a key `distill` in its section.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from ..config.schema import SOURCE
from ..config.types import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from ..errors import InputError, warn
from ..models.encoder_decoder import EncoderDecoder
from ..models.heads import TaskModel
from ..weights.tokenizer import load_tokenizer
from .base import Base, Shared, Task, TaskData
from .objectives import CHUNK_FLOATS, Means, Objective, cross_entropy, summed_distillation, taught

# The array of a batch that holds what is kept of the teacher's logits, (targets, numbers).
TEACHER = "target_teacher"


class DistillConfig(Section):
    teacher: str | None = Field(
        default=None,
        description=(
            "The teacher (forms as model.source), with the members' tokens and classes. Default: the members' own base without "
            "model.transforms. What is equal in both lies in memory once."
        ),
        json_schema_extra=SOURCE,
    )
    temperature: PositiveFloat = Field(default=2.0, description="T, by which both logits are divided.")
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="Weight of T^2 times the divergence; 1 - alpha is that of the task's own loss."
    )
    top_k: PositiveInt | None = Field(
        default=None,
        description=(
            "So many of the likeliest classes (or tokens) of the teacher are kept of each target, and the rest as one more. Default: 64 "
            "of a vocabulary, all of a task's classes."
        ),
    )
    disk_gb: NonNegativeFloat = Field(
        default=0.0,
        description="How large the files of the teacher's outputs may become, in .teacher-cache below tracking.dir; 0: none is written.",
    )

    @model_validator(mode="after")
    def _some(self) -> DistillConfig:
        if self.alpha == 0:
            raise ValueError("'alpha' is 0: the teacher would have no part in the loss")
        return self


TOP_K = 64


@dataclasses.dataclass(frozen=True)
class TaughtLoss:
    """The objective: see the module. What it also says of a step: `task_loss`, the cross-entropy, and `teacher_kl`, the divergence."""

    temperature: float
    alpha: float

    held_out: ClassVar[Objective] = staticmethod(cross_entropy)

    def __call__(self, model: TaskModel, features: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, Means]:
        weights = batch["target_weights"]
        columns = (batch["target_ids"], weights, batch[TEACHER])
        options = {"temperature": self.temperature, "alpha": self.alpha}
        loss, correct, plain, apart = summed_distillation(model.readout(), features, *columns, **options)
        total = weights.sum()
        return loss, correct, {"task_loss": (plain, total), "teacher_kl": (apart, total)}


class Taught(Task):
    """A task that may have a teacher."""

    shared_keys = frozenset({"distill"})

    def teacher_head(self, section: Any, base: Base) -> str | None:
        """The kind of head that the teacher is loaded with; None where it answers without one."""
        return None

    @abstractmethod
    def teacher_model(self, section: Any, teacher: Any, data: TaskData) -> Any:
        """The teacher as a `TaskModel` whose logits are of the task's classes, in their order; `InputError` where it cannot be one."""

    def loss(self, section: Any) -> Objective:
        """Cross-entropy, or the mix."""
        own: DistillConfig | None = section.distill
        return super().loss(section) if own is None else TaughtLoss(own.temperature, own.alpha)

    def shared(self, section: Any, base: Base, load: Callable[..., Any], data: TaskData) -> Shared | None:
        """What is kept of the teacher's logits at each target.

        Raises:
            InputError: the teacher has other tokens or classes.
        """
        own: DistillConfig | None = section.distill
        if own is None:
            return None
        key = "task.distill.teacher"
        if isinstance(base, EncoderDecoder):
            raise InputError("task.distill: an encoder-decoder is not taught by logits here.")
        head = self.teacher_head(section, base)
        if own.teacher is None and head is not None and self.loaded_head(section) is None:
            raise InputError(f"{key}: missing. The members' heads are new (task.head), so their base says nothing of the classes.")
        teacher = load(own.teacher, key=key, head=head)
        inner = teacher if head is None else teacher.base
        if own.teacher is not None:
            _check_tokens(inner, base, own.teacher, data)
        model = self.teacher_model(section, teacher, data)
        answers = len(data.classes) if data.classes is not None else base.config.vocab
        top = own.top_k or (TOP_K if data.classes is None else None)
        top = None if top is None or top >= answers else top

        def of_targets(model: Any, batch: dict[str, jax.Array]) -> jax.Array:
            read, features = model.readout(), model.features(batch)

            def one(x: jax.Array) -> jax.Array:
                return taught(read(x[None]).astype(jnp.float32) / own.temperature, top)[0]

            rows = max(1, CHUNK_FLOATS // base.config.vocab)
            return jax.lax.map(one, features, batch_size=min(rows, features.shape[0]))

        numbers = answers if top is None else 2 * top + 1
        words = None if data.class_token_ids is None else data.class_token_ids.tolist()
        facts = repr((own.temperature, top, data.classes, words))
        options = {"numbers": numbers, "held_out": False, "disk_gb": own.disk_gb, "facts": facts}
        return Shared(TEACHER, model, of_targets, once=True, **options)


def _check_tokens(teacher: Any, base: Base, source: str, data: TaskData) -> None:
    """`InputError` where a teacher reads other tokens than the members."""
    theirs, ours = teacher.config.vocab, base.config.vocab
    if theirs != ours:
        raise InputError(f"task.distill.teacher: {source} has a vocabulary of {theirs} tokens, and the model has one of {ours}.")
    longest = max(examples.longest_text for examples in data.parts)
    if teacher.config.longest is not None and longest > teacher.config.longest:
        raise InputError(f"task.max_length: examples of {longest} tokens, but the teacher has {teacher.config.longest} positions.")
    try:
        tokenizer = load_tokenizer(source, key="task.distill.teacher")
    except InputError:
        return warn(f"task.distill.teacher: {source} has no tokenizer that could be compared; its tokens are taken to be the model's.")
    if data.tokenizer is not None and tokenizer.get_vocab() != data.tokenizer.get_vocab():
        raise InputError(f"task.distill.teacher: {source} has other tokens than the model, so that it cannot read the same examples.")
