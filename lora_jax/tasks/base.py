"""What a task is (one file each beside this one), and what all tasks share of their data: loading, splitting, tokenising."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from pydantic import Field

from ..config.doors import TASKS
from ..config.schema import TaskConfig
from ..data.batching import NO_TARGET, Example, Examples, Scorer
from ..data.files import as_text
from ..data.sources import HELD_OUT, ROW, TRAINING, Table, Taken, check_tables, load_rows, sample_rows, split_rows
from ..errors import InputError
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from ..models.heads import add_head
from ..weights.tokenizer import check_text
from .objectives import OBJECTIVES, Objective

Base = Encoder | Decoder


class HeadTaskConfig(TaskConfig):
    """The section of a task whose model bears a head over the base."""

    head: Literal["new", "loaded"] = Field(
        default="new", description="new: a head initialised by the member's seed. loaded: the checkpoint's own head and classes."
    )


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns a task reads.

    Attributes:
        names: all of them, in order.
        targets: those that say what is to be predicted. Rows that are equal in all others are copies of one another, and stay on one
            side of the split.
        structured: those whose values may be lists or mappings; the others are read as text.
        nonempty: those that may not hold an empty text.
    """

    names: tuple[str, ...]
    targets: tuple[str, ...] = ()
    structured: tuple[str, ...] = ()
    nonempty: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rows:
    """The columns of a source as lists, checked.

    Attributes:
        source: where they were read, for messages.
        columns: name -> a value for each row.
        numbers: (rows,) int, the number each row has in its file.
    """

    source: str
    columns: Mapping[str, list[Any]]
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
    """

    examples: list[Example]
    scorer: Callable[[list[Example]], Scorer] | None = None
    turns_left_out: int = 0


@dataclasses.dataclass(frozen=True)
class TaskMetrics:
    """Names of evaluators (`evaluators.py`).

    Attributes:
        held_out: computed at each evaluation, in this order. `loss` is the mean of the objective.
        selection: what the best step of a member, and the winners of a rung, are chosen by.
        reported: what reports compare members by; `selection` by default.
        training: computed from the loss and the fraction of right predictions of training steps, for the curves.
    """

    held_out: tuple[str, ...]
    selection: str
    reported: str = ""
    training: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reported", self.reported or self.selection)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What is computed once a batch for all members of a pack.

    Attributes:
        name: of the array in the batch, which the objective reads. It is no name that batches have already.
        model: what it is computed with; its weights lie on the mesh, and nothing of it trains.
        function: (model, micro-batch) -> (targets, ...), pure; compiled.
    """

    name: str
    model: nnx.Module
    function: Callable[[Any, dict[str, jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's data.

    Attributes:
        train, held_out: the examples.
        metrics: what is computed of a member, and what members are compared by.
        classes: class names in order (of texts or tokens), else None.
        class_token_ids: (classes,) int32, the token of each class's word where classes are words of the vocabulary, else None.
        per_example: whether each example has exactly one target.
        taken: what became of the training rows, and of the held-out ones.
        notes: what else of the data is to be known.
    """

    train: Examples
    held_out: Examples
    metrics: TaskMetrics
    classes: tuple[str, ...] | None = None
    class_token_ids: np.ndarray | None = None
    per_example: bool = False
    taken: tuple[Taken, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def dropped(self) -> int:
        """Rows left out because nothing is to be predicted within `max_length` tokens of them."""
        return sum(part.left_out for part in self.taken)

    def lines(self) -> list[str]:
        """Which rows are used, and all that was left out, cut or taken in place of something else, for a person to read."""
        return [*(line for part in self.taken for line in part.lines()), *self.notes]


class Task(ABC):
    """What is learned of rows of data.

    Attributes:
        name: as `task.kind` says it.
        section: its config section.
        head: the kind of head its models bear (`models/layers.py`); None where they bear none.
        objective: the name of its loss (`objectives.py`).
        targets: how many targets each example has; None where that differs.
        shared_keys: keys of the section that `shared` depends on, and examples do not.
        next_token: whether a target is the token that follows.
    """

    name: str
    section: type[TaskConfig]
    head: str | None = None
    objective: str = "cross_entropy"
    targets: int | None = None
    shared_keys: frozenset[str] = frozenset()
    next_token: bool = False

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
        """`InputError` where the rows of `task.eval_source` do not fit the classes."""
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

    @abstractmethod
    def metrics(self, section: Any, classes: tuple[str, ...] | None) -> TaskMetrics:
        """What is computed of a member, and what members are compared by."""

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

    def shared(self, section: Any, base: Base, load: Callable[..., Any]) -> Shared | None:
        """What is computed once a batch for all members; None where nothing is.

        Args:
            base: the model that the members adapt.
            load: `load(source, key="task....")` gives another base of the same dtype, on the same mesh.
        """
        return None


def task_of(section: TaskConfig) -> Task:
    """The task of a config section."""
    return TASKS.get(section.kind, "task.kind")


def objective_of(section: TaskConfig) -> Objective:
    """The loss of a config section's task."""
    return OBJECTIVES.get(task_of(section).objective, "task.kind")


def task_section(**values: Any) -> Any:
    """A task's section from its keys: what `task:` in a YAML file would be.

    Raises:
        InputError: there is no such kind.
        pydantic.ValidationError: a key or value will not do.
    """
    return TASKS.get(values.get("kind"), "task.kind").section.model_validate(values)


def prepare(section: TaskConfig, tokenizer: Any, *, decoder: bool, known: tuple[str, ...] = ()) -> TaskData:
    """Loads, splits and tokenises a task's data.

    Args:
        section: the config section.
        tokenizer: a transformers fast tokenizer.
        decoder: whether the base is a decoder.
        known: the classes of a head that was loaded, in order; none of a new one.

    Raises:
        InputError: the source, a column, a label or the tokenizer will not do; the message says which row.
    """
    task = task_of(section)
    columns = task.columns(section)
    rows, table = _load(task, section, columns, section.source, "task.source", TRAINING)
    texts = _inputs(columns, rows)
    if section.eval_source is None:
        assert section.eval_size != "all"
        train_at, held_at = split_rows(texts, held_out=section.eval_size, train=section.train_size, seed=section.split_seed)
        held_rows, held_key, held_table, others = rows, "task.source", table, 0
        check_tables([table], section.drop)
    else:
        held_key, size = "task.eval_source", None if section.eval_size == "all" else section.eval_size
        held_rows, held_table = _load(task, section, columns, section.eval_source, held_key, HELD_OUT)
        check_tables([table, held_table], section.drop)
        train_at = sample_rows(len(rows), size=section.train_size, seed=section.split_seed)
        held_at = sample_rows(len(held_rows), size=size, seed=section.split_seed)
        trained = {texts[i] for i in train_at}
        others = sum(text in trained for text in _inputs(columns, held_rows.take(held_at)))
    classes = task.classes(section, rows, known)
    if section.eval_source is not None:
        task.check_held_out(section, held_rows, classes)
    class_token_ids = task.class_tokens(section, classes, tokenizer, decoder=decoder)

    def examples(part: str, source: Rows, at: np.ndarray, key: str, dropped: dict[tuple[str, str], int]) -> tuple[Examples, Taken]:
        encoded = task.encode(section, source.take(at), tokenizer, decoder=decoder, classes=classes)
        kept = [e for e in encoded.examples if (e.targets != NO_TARGET).any()]
        if not kept:
            raise InputError(f"{key}: no example has anything to predict within task.max_length = {section.max_length} tokens.")
        taken = Taken(
            part,
            source.source,
            len(source),
            len(at),
            section.max_length,
            dropped,
            left_out=len(encoded.examples) - len(kept),
            cut=sum(e.cut for e in kept),
            ends_cut=sum(e.end_cut for e in kept),
            turns_left_out=encoded.turns_left_out,
            others=others if part == "held-out" else 0,
            sampled=len(at) < (len(source) if part == "held-out" or held_table is not table else len(source) - len(held_at)),
        )
        return Examples.of(kept, encoded.scorer and encoded.scorer(kept)), taken

    train, of_train = examples("training", rows, train_at, "task.source", dict(table.dropped))
    own = {} if held_table is table else dict(held_table.dropped)
    held_out, of_held = examples("held-out", held_rows, held_at, held_key, own)
    notes = [n for n in dict.fromkeys([table.note, held_table.note, *task.notes(section, tokenizer)]) if n]
    metrics = task.metrics(section, classes)
    return TaskData(train, held_out, metrics, classes, class_token_ids, task.targets == 1, (of_train, of_held), tuple(notes))


def _load(task: Task, section: TaskConfig, columns: Columns, source: str, key: str, splits: tuple[str, ...]) -> tuple[Rows, Table]:
    """Reads the task's columns, as text but for structured values; `InputError` for a row where one is missing or not text."""
    table = load_rows(source, key=key, columns=list(columns.names), drop=section.drop, splits=splits)
    numbers = np.array(table[ROW])

    def read(name: str, number: int, value: Any) -> Any:
        if isinstance(value, list | dict) and name in columns.structured:
            for text in _texts_in(value):
                check_text(text, f"{key}: row {number} of {source}: '{name}'")
            return value
        text = as_text(value)
        if value is None or (name in columns.nonempty and text == ""):
            raise InputError(f"{key}: row {number} of {source} has no '{name}'.")
        if text is None:
            what = "bytes that are not UTF-8" if isinstance(value, bytes) else f"a {type(value).__name__}"
            raise InputError(f"{key}: row {number} of {source}: '{name}' is {what}, not a text.")
        return check_text(text, f"{key}: row {number} of {source}: '{name}'")

    found = {name: [read(name, int(n), value) for n, value in zip(numbers, table[name], strict=True)] for name in columns.names}
    return task.read(section, Rows(source, found, numbers), key), table


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(inner)


def _inputs(columns: Columns, rows: Rows) -> list[str]:
    """What makes two rows copies of one another: all columns that are no targets."""
    inputs = [v for n, v in rows.columns.items() if n not in columns.targets]
    return ["\x1f".join(map(str, values)) for values in zip(*inputs, strict=True)]
