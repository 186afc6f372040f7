"""What a task is (one file each beside this one)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx
from pydantic import Field

from ..config.doors import TASKS
from ..config.schema import TaskConfig, TaskSection
from ..data.batching import NO_TARGET
from ..data.episodes import Collected
from ..data.pairs import Shift
from ..data.prompts import Prompts
from ..errors import InputError
from ..models.add_head import add_head
from ..models.encoder_decoder import Base
from .data import Columns, Encoded, Prediction, Rows, Shared, TaskData, TaskMetrics, ToAnswer
from .objectives import OBJECTIVES, Objective
from .on_policy import Completer, OnPolicy

# What other files take from here, too.
__all__ = [
    "Base", "Columns", "Encoded", "HeadTaskConfig", "Prediction", "Rows", "Shared", "Task", "TaskData", "TaskMetrics", "ToAnswer",
    "objective_of", "one_or_all", "task_of", "task_section",
]  # fmt: skip


class HeadTaskConfig(TaskConfig):
    """The section of a task whose model bears a head over the base."""

    head: Literal["new", "loaded"] = Field(
        default="new", description="new: a head initialised by the member's seed. loaded: the checkpoint's own head and classes."
    )


class Task(ABC):
    """What is learned of rows of data.

    Attributes:
        name: as `task.kind` says it.
        section: its config section.
        head: the kind of head its models bear (`models/layers.py`); None where they bear none.
        objective: the name of its loss (`objectives.py`), where that follows from the task alone.
        targets: how many targets each example has; None where that differs.
        shared_keys: keys of the section that `shared` depends on, and examples do not.
        loss_keys: keys that neither depends on, but the loss.
        next_token: whether a target is the token that follows, where that follows from the task alone.
        by_row: whether a row's examples depend on that row alone, are tokens and targets, and nothing but these is known of them: they
            may then be made a part of the rows at a time, and kept in files.
        tokenized: whether its rows are read with the base's tokenizer; else `own_data` reads them.
    """

    name: str
    section: type[TaskSection]
    head: str | None = None
    objective: str = "cross_entropy"
    targets: int | None = None
    shared_keys: frozenset[str] = frozenset()
    loss_keys: frozenset[str] = frozenset()
    next_token: bool = False
    by_row: bool = False
    tokenized: bool = True

    @abstractmethod
    def columns(self, section: Any) -> Columns:
        """The columns it reads."""

    def read(self, section: Any, rows: Rows, key: str) -> Rows:
        """The rows with structured values parsed; `rows` itself by default.

        Args:
            key: the config key of the source, for messages.

        Raises:
            InputError: a row has another form.
        """
        return rows

    def classes(self, section: Any, rows: Rows, known: tuple[str, ...]) -> tuple[str, ...] | None:
        """Names of the classes, in order; None where there are none.

        Args:
            rows: the training source's.
            known: the classes of a head that was loaded; none of a new one.

        Raises:
            InputError: too few classes, or a row's label is none of those named.
        """
        return None

    def check_held_out(self, section: Any, rows: Rows, classes: tuple[str, ...] | None) -> None:
        """`InputError` where the rows of `task.eval_source` or `task.test_source` do not fit the classes."""
        return

    def class_tokens(self, section: Any, classes: tuple[str, ...] | None, tokenizer: Any, *, decoder: bool) -> np.ndarray | None:
        """(classes,) int32, the token of each class's word; None where classes are not words."""
        return None

    @abstractmethod
    def encode(self, section: Any, rows: Rows, tokenizer: Any, *, decoder: bool, classes: tuple[str, ...] | None) -> Encoded:
        """Rows as examples.

        Args:
            tokenizer: a transformers fast tokenizer.
            decoder: whether the base is a decoder.
            classes: as `classes` gave them.

        Raises:
            InputError: a row or `task.max_length` will not do.
        """

    def encode_pairs(self, section: Any, rows: Rows, tokenizer: Any, *, shift: Shift) -> Encoded:
        """Rows as examples of an encoder-decoder (`data/pairs.py`): what it reads, and what it is to write.

        Args:
            tokenizer: a transformers fast tokenizer.
            shift: how its decoder is given a target.

        Raises:
            InputError: the task has no such form, or a row or `task.max_length` will not do.
        """
        raise InputError(f"task.kind: '{self.name}' does not train encoder-decoders, and the model is one.")

    def decoded_rows(self, section: Any) -> int:
        """How many rows of each part are decoded when a model is evaluated; 0 where it is not evaluated by text that it generates."""
        return 0

    def prompts(self, section: Any, rows: Rows, tokenizer: Any) -> Prompts | None:
        """What a model goes on from, one prompt a row; None where it generates no text.

        Raises:
            InputError: a row will not do.
        """
        return None

    def source_prompts(self, section: Any, rows: Rows, tokenizer: Any) -> Prompts | None:
        """The same of an encoder-decoder: what it reads."""
        return None

    @abstractmethod
    def metrics(self, section: Any, classes: tuple[str, ...] | None) -> TaskMetrics:
        """What is computed of a member, and what members are compared by."""

    def stand_in(self, section: Any, column: str, row: Mapping[str, Any], classes: tuple[str, ...] | None) -> Any:
        """What stands in a column of `Columns.unknown` that rows to predict for lack; nothing is scored by it.

        Args:
            row: the row's other columns.
        """
        return ""

    def predictions(
        self, section: Any, rows: Rows, encoded: Encoded, answers: Sequence[np.ndarray | None], classes: tuple[str, ...] | None
    ) -> list[Prediction]:
        """What the model says of each row, where it generates no text. By default numbers: one example a row, its target ids and answers.

        Args:
            rows, encoded: as `encode` took and gave them.
            answers: for each example what the model answered at its targets, in order; None where it has none.
            classes: as `classes` gave them.
        """
        columns = self.columns(section)
        given = [rows.columns[name] for name in columns.names if name not in columns.unknown]
        made = []
        for i, (example, answer) in enumerate(zip(encoded.examples, answers, strict=True)):
            asked = given[0][i] if len(given) == 1 else [column[i] for column in given]
            wanted = example.targets[example.targets != NO_TARGET] if example.values is None else example.values
            made.append(Prediction(asked, None if answer is None else answer.tolist(), wanted.tolist()))
        return made

    def judged(self, section: Any, prompts: Prompts, texts: Sequence[str]) -> list[Prediction]:
        """The same, where it does. By default without scores."""
        found = zip(prompts.inputs, texts, prompts.references, strict=True)
        return [Prediction(asked, text, one_or_all(right)) for asked, text, right in found]

    def loss(self, section: Any) -> Objective:
        """The objective; by default the one that `objective` names."""
        return OBJECTIVES.get(self.objective, "task.kind")

    def predicts_next(self, section: Any) -> bool:
        """Whether a target is the token that follows."""
        return self.next_token

    def notes(self, section: Any, tokenizer: Any) -> list[str]:
        """What a run says of the tokenizer, or of what it presumes; nothing by default."""
        return []

    def check_base(self, section: Any, base: Base, source: str) -> None:
        """`InputError` where the base cannot do this task; `source` is `model.source`, for the message."""
        return

    def loaded_head(self, section: Any) -> str | None:
        """The kind of head that is loaded with the base; None where a new one, or none, is made."""
        return self.head if getattr(section, "head", "new") == "loaded" else None

    def named_classes(self, section: Any) -> tuple[str, ...] | None:
        """The classes that the config names, in order; None where it names none."""
        return None

    def needs_classes(self, section: Any, *, decoder: bool) -> bool:
        """Whether `model` needs to know the classes."""
        return False

    def model(self, section: Any, base: Base, classes: tuple[str, ...] | None, class_token_ids: np.ndarray | None = None) -> nnx.Module:
        """The base with what turns its hidden states into predictions: a `TaskModel` (`models/heads.py`).

        Args:
            classes: as `classes` gave them.
            class_token_ids: as `class_tokens` gave them; None where no data was read. The model then has the same parameters.
        """
        if self.head is None:
            raise TypeError(f"the task '{self.name}' names no head, and makes no model of its own")
        return add_head(base, self.head, len(classes or ()), rngs=nnx.Rngs(0))

    def own_data(self, section: Any, base: Any, known: tuple[str, ...]) -> TaskData:
        """The data of a task that is not `tokenized`.

        Args:
            base: that is adapted.
            known: the classes of a head that was loaded; none of a new one.

        Raises:
            InputError: the source or a row will not do.
        """
        raise TypeError(f"the task '{self.name}' reads its rows with a tokenizer")

    def rows_to_answer(self, section: Any, base: Any, source: str, classes: tuple[str, ...] | None) -> ToAnswer:
        """The rows of a source that a trained model is asked about, of a task that is not `tokenized`; they need not say what is right.

        Args:
            source: in the forms of `task.source`.
            classes: as `classes` gave them.

        Raises:
            InputError: the source or a row will not do, or the task answers nothing.
        """
        raise InputError(f"--source: the task '{self.name}' reads no rows.")

    def collected(self, section: Any) -> Collected | None:
        """What members collect of rows, where a task that reads rows is on-policy."""
        return None

    def on_policy(self, section: Any, data: TaskData | None = None, complete: Completer | None = None) -> OnPolicy | None:
        """How members make their own batches; None where they read those of the data.

        Args:
            data: of the task; None where only the number of updates is asked for.
            complete: writes on after prompts, for what members of a language model collect; None as `data`.
        """
        return None

    def shared(self, section: Any, base: Base, load: Callable[..., Any], data: TaskData) -> Shared | None:
        """What is computed once for all members; None where nothing is.

        Args:
            base: the model that the members adapt.
            load: `load(source, key="task....")` gives another base of the same dtype, on the same mesh, untransformed; with `head=...` a
                classifier. A source of None is the members' own.
            data: the examples.
        """
        return None


def one_or_all(texts: Sequence[str]) -> Any:
    """The only text, all of several as a list, None of none."""
    return texts[0] if len(texts) == 1 else list(texts) or None


def task_of(section: TaskSection) -> Task:
    """The task of a config section."""
    return TASKS.get(section.kind, "task.kind")


def objective_of(section: TaskSection, data: TaskData | None = None, complete: Completer | None = None) -> Objective | OnPolicy:
    """The loss of a config section's task, or how its members make batches and learn of them: of this data, where they need any."""
    return task_of(section).on_policy(section, data, complete) or task_of(section).loss(section)


def task_section(**values: Any) -> Any:
    """A task's section from its keys: what `task:` in a YAML file would be.

    Raises:
        InputError: there is no such kind.
        pydantic.ValidationError: a key or value will not do.
    """
    return TASKS.get(values.get("kind"), "task.kind").section.model_validate(values)
