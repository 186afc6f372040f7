"""What a task says of its data: its columns, its rows, the examples made of them, and what is computed of a member."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from ..data.batching import BatchPlan, Example, Examples, Scorer
from ..data.episodes import Collected
from ..data.sources import Taken


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns a task reads.

    Attributes:
        names: all of them, in order.
        targets: those that say what is to be predicted. Rows that are equal in all others are copies of one another, and stay on one
            side of the split.
        structured: those whose values may be lists or mappings; the others are read as text.
        nonempty: those that may not hold an empty text.
        any_of: those of which a source has at least one, and a row too: what a row lacks is None until `Task.read`.
        unknown: those that rows to predict for need not have; `targets` by default.
    """

    names: tuple[str, ...]
    targets: tuple[str, ...] = ()
    structured: tuple[str, ...] = ()
    nonempty: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "unknown", self.unknown or self.targets)


@dataclasses.dataclass(frozen=True)
class Rows:
    """The columns of a source, checked.

    Attributes:
        source: where they were read, for messages.
        columns: name -> a value for each row.
        numbers: (rows,) int, the number each row has in its file.
    """

    source: str
    columns: Mapping[str, Sequence[Any]]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, chosen: np.ndarray) -> Rows:
        """The rows at these indices."""
        return Rows(self.source, {name: [values[i] for i in chosen] for name, values in self.columns.items()}, self.numbers[chosen])


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Rows as examples.

    Attributes:
        examples: any number for each row.
        scorer: makes the task's own metrics from the examples that are kept; None where evaluators compute them.
        turns_left_out: turns of an assistant that are in no example.
        notes: what else became of the rows, for a person to read.
    """

    examples: list[Example]
    scorer: Callable[[list[Example]], Scorer] | None = None
    turns_left_out: int = 0
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model says of a row, as JSON values.

    Attributes:
        input: what it was given.
        output: what it says; None where nothing of the row could be given to it.
        reference: what is right; None where that is not known.
        score: of the output, larger is better; None where nothing scores it.
    """

    input: Any
    output: Any
    reference: Any = None
    score: float | None = None


@dataclasses.dataclass(frozen=True)
class TaskMetrics:
    """Names of evaluators (`evaluators.py`).

    Attributes:
        held_out: computed at each evaluation, in this order. `loss` is the mean of the objective.
        selection: what the best step of a member, and the winners of a rung, are chosen by.
        reported: what reports compare members by; `selection` by default.
        training: computed from the loss and the fraction of right predictions of training steps, for the curves.
        tables: no evaluators, but arrays that the task's scorer gives beside them. They are recorded, and nothing is compared by them.
    """

    held_out: tuple[str, ...]
    selection: str
    reported: str = ""
    training: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reported", self.reported or self.selection)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What is computed once for all members of a pack.

    Attributes:
        name: of the array in the batch, which the objective reads. It is no name that batches have already.
        model: what it is computed with; its weights lie on the mesh, and nothing of it trains.
        function: (model, micro-batch) -> (targets, ...), pure; compiled.
        once: computed once an example, before the first step; else once a batch. The array is then
            (targets,) float32, or (targets, numbers), and its name begins with `target_`.
        numbers: how many are kept of each target; None: one, and no axis for it.
        held_out: whether evaluations have it too.
        disk_gb: how large the files of what is computed once an example may be, below `tracking.dir`; 0: none is written.
        facts: what the numbers follow from beside the model and the examples, as text.
    """

    name: str
    model: nnx.Module
    function: Callable[[Any, dict[str, jax.Array]], jax.Array]
    once: bool = False
    numbers: int | None = None
    held_out: bool = True
    disk_gb: float = 0.0
    facts: str = ""


@dataclasses.dataclass(frozen=True)
class ToAnswer:
    """Rows that a trained model is asked about.

    Attributes:
        numbers: (rows,) the number each has in its source.
        labelled: whether they say what is right.
        examples: of those that can be asked about, in the order of the rows.
        batches: makes their batches, as `TaskData.batches`.
        predictions: of the answers at each example's targets, in order, the prediction of each row.
    """

    numbers: np.ndarray
    labelled: bool
    examples: Any
    batches: Any
    predictions: Callable[[list[np.ndarray]], list[Prediction]]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's data.

    Attributes:
        train, held_out: the examples.
        test: those that nothing is chosen by; None where the section has no test rows.
        metrics: what is computed of a member, and what members are compared by.
        classes: class names in order (of texts or tokens), else None.
        class_token_ids: (classes,) int32, the token of each class's word where classes are words of the vocabulary, else None.
        per_example: whether each example has exactly one target.
        taken: what became of the training rows, of the held-out ones, and of the test rows.
        notes: what else of the data is to be known.
        tokenizer: makes texts of what is decoded.
        collected: what the members of an on-policy task collect and are evaluated on; None where they read batches.
        batches: makes the batches of a run; it is called, and gives them, as `BatchPlan` does. `Examples` has the face of its examples.
    """

    train: Examples
    held_out: Examples
    metrics: TaskMetrics
    classes: tuple[str, ...] | None = None
    class_token_ids: np.ndarray | None = None
    per_example: bool = False
    taken: tuple[Taken, ...] = ()
    notes: tuple[str, ...] = ()
    test: Examples | None = None
    tokenizer: Any = None
    collected: Collected | None = None
    batches: Any = BatchPlan

    @property
    def parts(self) -> tuple[Examples, ...]:
        """All examples: training, held-out, and test where there are some."""
        return (self.train, self.held_out, *(() if self.test is None else (self.test,)))

    @property
    def dropped(self) -> int:
        """Rows left out because nothing is to be predicted within `max_length` tokens of them."""
        return sum(part.left_out for part in self.taken)

    def lines(self) -> list[str]:
        """Which rows are used, and all that was left out, cut or taken in place of something else, for a person to read."""
        return [*(line for part in self.taken for line in part.lines()), *self.notes]
