"""Metrics: how each is computed, how it is written, and whether larger is better. This is the one place that says so.

A metric comes from the mean loss and the fraction of right predictions (`from_means`), from what a model answered at each target
(`from_answers`), from the texts that it generated (`from_texts`, `text_metrics.py`), or from the task's own scorer (`data/batching.py`),
which knows more of the rows; an evaluator then says the rest.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from ..config.doors import Door

# Of each row the texts that are right.
References = Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A metric.

    Attributes:
        name: its key in results.
        larger_is_better: the direction of every comparison.
        percent: whether it is a fraction, 0 to 1, written in percent.
        decimals: of the written figure, where it is not in percent.
        from_means: (mean loss, fraction of right predictions), (members,) float32 each -> (members,).
        from_answers: (answers, wanted) -> value. Both have an array for each example: what `TaskModel.answers` gave at its targets,
            in order, and its target ids or float values.
        from_texts: (texts, references) -> value. Both have an entry for each row: the text generated, and one or more that are right.
        signature: references -> how `from_texts` computes, in a line: a library's version and options.
    """

    name: str
    larger_is_better: bool
    percent: bool = False
    decimals: int = 4
    from_means: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    from_answers: Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], float] | None = None
    from_texts: Callable[[Sequence[str], References], float] | None = None
    signature: Callable[[References], str] | None = None

    def better(self, a: float, b: float) -> bool:
        """Whether `a` beats `b`; NaN beats nothing, and everything beats NaN."""
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return a > b if self.larger_is_better else a < b

    @property
    def sign(self) -> float:
        """1 where larger is better, else -1: `sign * value` is a score, and larger scores are better."""
        return 1.0 if self.larger_is_better else -1.0

    @property
    def heading(self) -> str:
        """Its name with its unit, for a column heading: figures are written without the unit."""
        return f"{self.name} (%)" if self.percent else self.name

    def format(self, value: float, *, signed: bool = False) -> str:
        """The figure as text, with as many decimals for a small difference as for the values it is between.

        >>> ACCURACY.format(0.8731), PERPLEXITY.format(-0.3, signed=True)
        ('87.3', '-0.30')
        """
        if math.isnan(value):
            return "n/a"
        sign = "+" if signed else ""
        if self.percent:
            return f"{100 * value:{sign}.1f}"
        return f"{value:{sign},.{0 if abs(value) >= 1000 else self.decimals}f}"


EVALUATORS: Door[Evaluator] = Door("metric", "lora_jax.tasks", "lora_jax.evaluators")


def register(evaluator: Evaluator) -> Evaluator:
    """Adds a metric under its name, and returns it.

    Raises:
        ValueError: another has this name.
    """
    return EVALUATORS.register(evaluator.name, evaluator)


def perplexity(loss: np.ndarray) -> np.ndarray:
    """e to the mean loss of a token; infinite where that is too large a number."""
    with np.errstate(over="ignore"):
        return np.exp(loss)


LOSS = register(Evaluator("loss", False, from_means=lambda loss, right: loss))
ACCURACY = register(Evaluator("accuracy", True, percent=True, from_means=lambda loss, right: right))
TOKEN_ACCURACY = register(Evaluator("token_accuracy", True, from_means=lambda loss, right: right))
PERPLEXITY = register(Evaluator("perplexity", False, decimals=2, from_means=lambda loss, right: perplexity(loss)))
KL = register(Evaluator("kl", False))  # from the objective: the divergence from the base
for _name in ("f1", "macro_f1", "precision", "recall", "exact_match"):
    register(Evaluator(_name, True, percent=True))
