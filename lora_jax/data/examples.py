"""What a task makes of its rows: tokens, and what is to be predicted at some of their positions."""

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
        targets: (length,) int32, the token, class or place to be predicted at that position, or -1. Where values are to be predicted,
            any other number marks the positions.
        types: (length,) int32, 1 in the second text of a pair; None where there is one text.
        values: (targets, width) float32, what is to be predicted at each position with a target, in order; None where ids are.
    """

    tokens: np.ndarray
    targets: np.ndarray
    types: np.ndarray | None = None
    values: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples.

    Attributes:
        tokens: a (length,) int32 array for each.
        targets: a (length,) int32 array for each: the token or class to be predicted at that position, or -1.
        types: a (length,) int32 array for each, 1 in the second text of a pair; None where no example is one.
        score: the task's own metrics; None where evaluators compute all.
        values: a (targets, width) float32 array for each; None where ids are predicted.
    """

    tokens: list[np.ndarray]
    targets: list[np.ndarray]
    types: list[np.ndarray] | None = None
    score: Scorer | None = None
    values: list[np.ndarray] | None = None

    @classmethod
    def of(cls, examples: Sequence[Example], score: Scorer | None = None) -> Examples:
        """Those of a list, all with types (or values) or all without."""
        types = [e.types for e in examples if e.types is not None]
        values = [e.values for e in examples if e.values is not None]
        return cls([e.tokens for e in examples], [e.targets for e in examples], types or None, score, values or None)

    def wanted(self, index: int) -> np.ndarray:
        """What is to be predicted at an example's targets, in order: (targets,) int32 ids, or (targets, width) float32 values."""
        targets = self.targets[index]
        return targets[targets != NO_TARGET] if self.values is None else self.values[index]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens of each."""
        return np.array([len(t) for t in self.tokens], np.int64)

    @functools.cached_property
    def target_counts(self) -> np.ndarray:
        """(n,) int64 positions of each that have a target."""
        return np.array([int((t != NO_TARGET).sum()) for t in self.targets], np.int64)
