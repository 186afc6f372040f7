"""What the members of an on-policy task collect and are evaluated on: steps and episodes of environments, or prompts of rows.

Both have plans with the face of a `BatchPlan`, whose batches hold only what the members have in common.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from .batching import DATA_ORDER, Batch, Examples
from .order import epoch_order


class Collected(ABC):
    """The size of what each member collects for itself in a training step.

    Attributes:
        said: what it is, for a person to read.
        given: keys of `training` that say something of it.
        rows: whether examples are rows of a source, which can be shown.
        cut: whether a batch can be cut over the devices of a mesh.
        room: tokens that are added to those of an example.
    """

    said: str
    given: frozenset[str] = frozenset()
    rows: bool = False
    cut: bool = False
    room: int

    @abstractmethod
    def plan(self, parts: Sequence[Examples], training: Mapping[str, Any], *, row_multiple: int = 1) -> EpisodePlan | PromptPlan:
        """The batches of a run.

        Args:
            parts: training and held-out examples, and test examples where there are any.
            training: the keys of the config's section.
            row_multiple: by how many devices rows are shared; 1 unless `cut`.

        Raises:
            InputError: a key will not do.
        """


@dataclasses.dataclass(frozen=True)
class Episodes(Collected):
    """Steps of environments.

    Attributes:
        environments: that each member steps side by side.
        length: steps of each environment before an update.
        evaluated: episodes of an evaluation.
        said: what they are, for a person to read.
    """

    environments: int
    length: int
    evaluated: int
    said: str
    room = 0

    def examples(self, score: Any) -> Examples:
        """The evaluated episodes as examples, each of its number alone; `score` as in `Examples`."""
        return Examples([np.array([i], np.int32) for i in range(self.evaluated)], [np.zeros(1, np.int32)] * self.evaluated, score=score)

    def plan(self, parts: Sequence[Examples], training: Mapping[str, Any], *, row_multiple: int = 1) -> EpisodePlan:
        """Of so many training steps."""
        return EpisodePlan(self, steps=training["steps"] + training["extend_steps"], seed=training["data_seed"])


class EpisodePlan:
    """The batches of a run whose members play.

    Args:
        episodes: their size.
        steps: training steps.
        seed: of the evaluated episodes, which are the same for all members and evaluations.

    Attributes:
        order: as `BatchPlan.order`.
        steps: training steps.
    """

    order = DATA_ORDER

    def __init__(self, episodes: Episodes, *, steps: int, seed: int):
        self.steps, self._episodes, self._seed = steps, episodes, seed

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `start` to `stop` (exclusive)."""
        return (self.batch(step) for step in range(start, stop))

    def batch(self, step: int) -> Batch:
        """`tokens`, `segment_ids`: (1, environments, length) int32, one for each step of an environment, and nothing to be read."""
        shape = (1, self._episodes.environments, self._episodes.length)
        return {"tokens": np.zeros(shape, np.int32), "segment_ids": np.ones(shape, np.int32)}

    def eval_batches(self, examples: Examples | None = None) -> list[Batch]:
        """One batch: `tokens`, (episodes, 3) int32, the upper and the lower half of the seed and the number of each episode."""
        count = self._episodes.evaluated
        halves = np.array([self._seed >> 32, self._seed & 0xFFFFFFFF], np.uint32).view(np.int32)
        tokens = np.concatenate([np.tile(halves, (count, 1)), np.arange(count, dtype=np.int32)[:, None]], axis=1)
        return [{"tokens": tokens, "segment_ids": np.ones_like(tokens), "target_weights": np.ones(count, np.float32)}]

    def eval_groups(self, examples: Examples | None = None) -> list[np.ndarray]:
        """All episodes, in order."""
        return [np.arange(self._episodes.evaluated)]

    @property
    def micro_batch(self) -> int:
        """Environments."""
        return self._episodes.environments

    @property
    def summary(self) -> dict[str, float]:
        """As of a `BatchPlan`: nothing is padded."""
        of = self._episodes
        steps = float(of.environments * of.length)
        shape = {"rows": of.environments, "length": of.length}
        return shape | {"tokens_per_step": steps, "padding_share": 0.0, "dynamic_padding_share": 0.0}


@dataclasses.dataclass(frozen=True)
class PromptRows(Collected):
    """Prompts, of each of which a member makes several completions.

    Attributes:
        completions: of a prompt, in a training step.
        parts: in so many equal parts a step's completions are cut.
        room: the largest number of tokens of a completion.
        evaluated: at most so many prompts of a part are completed at an evaluation.
        said: what they are, for a person to read.
    """

    completions: int
    parts: int
    room: int
    evaluated: int
    said: str
    given = frozenset({"batch_size", "epochs"})
    rows = cut = True

    def plan(self, parts: Sequence[Examples], training: Mapping[str, Any], *, row_multiple: int = 1) -> PromptPlan:
        """Of so many training steps, or passes over the prompts."""
        size = training["batch_size"]
        if size % row_multiple:
            raise InputError(f"training.batch_size: {size}, which {row_multiple} devices (mesh.data * mesh.fsdp) cannot share evenly.")
        if size * self.completions % self.parts:
            raise InputError(
                f"task.minibatches: {self.parts} must divide training.batch_size * task.completions ({size * self.completions})."
            )
        if size * self.completions // self.parts % row_multiple:
            raise InputError(
                f"task.minibatches: of {size * self.completions // self.parts} completions each, which {row_multiple} devices "
                "(mesh.data * mesh.fsdp) cannot share evenly."
            )
        options = {"steps": training["steps"], "epochs": training["epochs"], "extra_steps": training["extend_steps"]}
        return PromptPlan(parts, batch_size=size, evaluated=self.evaluated, seed=training["data_seed"], **options)


class PromptPlan:
    """The batches of a run whose members complete prompts: a row each, padded on the left.

    Args:
        parts: training and held-out examples, and test examples where there are any.
        batch_size: prompts of a training step.
        evaluated: as `PromptRows.evaluated`.
        seed: of the order.
        steps: training steps; or `epochs`, from which they follow.
        extra_steps: beyond those.

    Attributes:
        order: as `BatchPlan.order`.
        steps: training steps.
        length: of every row.

    Raises:
        InputError: fewer training prompts than `batch_size`.
    """

    order = DATA_ORDER

    def __init__(
        self,
        parts: Sequence[Examples],
        *,
        batch_size: int,
        evaluated: int,
        seed: int,
        steps: int | None,
        epochs: float | None,
        extra_steps: int = 0,
    ):
        self._train, self._held_out, *_ = parts
        count = len(self._train.tokens)
        if batch_size > count:
            raise InputError(f"training.batch_size: {batch_size}, but there are only {count} training examples.")
        self.micro_batch, self._evaluated, self._seed = batch_size, evaluated, seed
        self.steps_per_epoch = count // batch_size
        self.steps = (steps if steps is not None else max(1, round((epochs or 0) * self.steps_per_epoch))) + extra_steps
        longest = max(int(part.lengths.max()) for part in parts)
        self.length = -(-longest // 8) * 8

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps `start` to `stop` (exclusive)."""
        return (self.batch(step) for step in range(start, stop))

    def batch(self, step: int) -> Batch:
        """Of a 0-based step: `tokens`, `segment_ids` (1 of real tokens), (1, rows, length) int32, and `prompts`, (1, rows) int32: which of
        the training examples each row is."""
        epoch, within = divmod(int(step), self.steps_per_epoch)
        order = epoch_order(len(self._train.tokens), seed=self._seed, epoch=epoch)
        chosen = order[within * self.micro_batch : (within + 1) * self.micro_batch]
        return {name: array[None] for name, array in self._rows(self._train, chosen).items()}

    def eval_batches(self, examples: Examples | None = None) -> list[Batch]:
        """The held-out prompts (or those given), as many as are evaluated, in batches of one shape without a micro axis."""
        found = []
        for group in self.eval_groups(examples):
            filled = np.concatenate([group, np.repeat(group[:1], self.micro_batch - len(group))])
            weights = (np.arange(self.micro_batch) < len(group)).astype(np.float32)
            found.append(self._rows(examples or self._held_out, filled) | {"target_weights": weights})
        return found

    def eval_groups(self, examples: Examples | None = None) -> list[np.ndarray]:
        """Which examples are in each of `eval_batches`, in order."""
        count = min(len((examples or self._held_out).tokens), self._evaluated)
        return np.split(np.arange(count), range(self.micro_batch, count, self.micro_batch))

    @property
    def summary(self) -> dict[str, float]:
        """As of a `BatchPlan`, of the prompts alone: how long completions are is seen in training."""
        real = float(self._train.lengths.mean()) * self.micro_batch
        padding = 1 - real / (self.micro_batch * self.length)
        shape = {"rows": self.micro_batch, "length": self.length}
        return shape | {"tokens_per_step": real, "padding_share": padding, "dynamic_padding_share": padding}

    def _rows(self, examples: Examples, chosen: np.ndarray) -> Batch:
        tokens, mask = (np.zeros((len(chosen), self.length), np.int32) for _ in range(2))
        for row, index in enumerate(chosen.tolist()):
            own = examples.tokens[index]
            tokens[row, self.length - len(own) :], mask[row, self.length - len(own) :] = own, 1
        return {"tokens": tokens, "segment_ids": mask, "prompts": chosen.astype(np.int32)}
