"""What a task makes of its rows: tokens, and at each position the id to be predicted there, if any."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

NO_TARGET = -1

# What was answered at each example's targets, in order -> metric -> value.
Scorer = Callable[[Sequence[np.ndarray]], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        tokens: (length,) int32.
        targets: (length,) int32, the token, class or place to be predicted at that position, or -1.
        types: (length,) int32, 1 in the second text of a pair; None where there is one text.
    """

    tokens: np.ndarray
    targets: np.ndarray
    types: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples.

    Attributes:
        tokens: a (length,) int32 array for each.
        targets: a (length,) int32 array for each: the token or class to be predicted at that position, or -1.
        types: a (length,) int32 array for each, 1 in the second text of a pair; None where no example is one.
        score: the task's own metrics; None where loss and right predictions say all.
    """

    tokens: list[np.ndarray]
    targets: list[np.ndarray]
    types: list[np.ndarray] | None = None
    score: Scorer | None = None

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens of each."""
        return np.array([len(t) for t in self.tokens], np.int64)

    @functools.cached_property
    def target_counts(self) -> np.ndarray:
        """(n,) int64 positions of each that have a target."""
        return np.array([int((t != NO_TARGET).sum()) for t in self.targets], np.int64)
