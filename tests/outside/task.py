"""A task: a number for each text, with the Huber loss, compared by the mean absolute error."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from lora_jax import register_task
from lora_jax.config.schema import TaskConfig
from lora_jax.data.batching import NO_TARGET, Example
from lora_jax.data.tokens import encoder_ids
from lora_jax.models.heads import SequenceClassifier
from lora_jax.tasks.base import Columns, Encoded, Task, TaskMetrics
from lora_jax.tasks.evaluators import EVALUATORS, Evaluator
from lora_jax.tasks.objectives import OBJECTIVES


class RatingConfig(TaskConfig):
    kind: Literal["outside-rating"] = Field(description="A number for each text.")
    text: str
    value: str


class Rater(SequenceClassifier):
    def answers(self, features):
        return self.readout()(features)


class Rating(Task):
    name, section, objective, targets = "outside-rating", RatingConfig, "huber", 1

    def columns(self, section):
        return Columns((section.text, section.value), targets=(section.value,))

    def metrics(self, section, classes):
        return TaskMetrics(("loss", "absolute_error"), "absolute_error")

    def model(self, section, base, classes, class_token_ids=None):
        return Rater(base, 1, rngs=nnx.Rngs(0))

    def encode(self, section, rows, tokenizer, *, decoder, classes):
        ids, values = encoder_ids(tokenizer, rows.columns[section.text], section.max_length), rows.columns[section.value]
        first = [np.where(np.arange(len(i)) == 0, 0, NO_TARGET).astype(np.int32) for i in ids]
        numbers = [np.array([[float(v)]], np.float32) for v in values]
        return Encoded([Example(np.array(i, np.int32), t, values=n) for i, t, n in zip(ids, first, numbers, strict=True)])


def huber(model, features, batch):
    error = jnp.abs(model.readout()(features) - batch["target_values"])[:, 0]
    return jnp.sum(batch["target_weights"] * jnp.where(error < 1, error**2 / 2, error - 0.5)), jnp.float32(0)


OBJECTIVES.register("huber", huber)
EVALUATORS.register(
    "absolute_error", Evaluator("absolute_error", False, from_answers=lambda a, w: float(np.abs(np.stack(a) - np.stack(w)).mean()))
)
register_task("outside-rating", Rating())
