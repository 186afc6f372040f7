"""What an on-policy task trains and is evaluated on, in place of rows: steps of environments, and episodes by number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from .batching import DATA_ORDER, Batch, Examples


@dataclasses.dataclass(frozen=True)
class Episodes:
    """The size of what each member collects for itself.

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

    def examples(self, score: Any) -> Examples:
        """The evaluated episodes as examples, each of its number alone; `score` as in `Examples`."""
        return Examples([np.array([i], np.int32) for i in range(self.evaluated)], [np.zeros(1, np.int32)] * self.evaluated, score=score)


class EpisodePlan:
    """The batches of a run whose members make their own, with the face of a `BatchPlan`: they hold only what members have in common.

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
