"""A task's data: loaded, cut into training, held-out and test rows, tokenised. The same for all tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..config.schema import TaskConfig
from ..data.batching import NO_TARGET, Examples
from ..data.files import as_text
from ..data.pairs import Shift
from ..data.sources import HELD_OUT, ROW, TEST, TRAINING, Table, Taken, check_tables, load_rows, sample_rows, split_rows
from ..errors import InputError
from ..weights.tokenizer import check_text
from .base import Columns, Rows, Task, TaskData, task_of


def prepare(section: TaskConfig, tokenizer: Any, *, decoder: bool, known: tuple[str, ...] = (), shift: Shift | None = None) -> TaskData:
    """Loads, splits and tokenises a task's data.

    Args:
        section: the config section.
        tokenizer: a transformers fast tokenizer.
        decoder: whether the base is a decoder.
        known: the classes of a head that was loaded, in order; none of a new one.
        shift: how an encoder-decoder is given its targets; None where the base is none.

    Raises:
        InputError: the source, a column, a label or the tokenizer will not do; the message says which row.
    """
    task = task_of(section)
    parts, tables = _split(task, section)
    training = parts[0]
    classes = task.classes(section, training.rows, known)
    for part in parts[1:]:
        if part.key != training.key:
            task.check_held_out(section, part.rows, classes)
    class_token_ids = task.class_tokens(section, classes, tokenizer, decoder=decoder)

    said: list[str] = []

    def examples(part: _Part) -> tuple[Examples, Taken]:
        rows, some = part.rows.take(part.at), part.rows.take(part.at[: task.decoded_rows(section)])
        if shift is not None:
            encoded = task.encode_pairs(section, rows, tokenizer, shift=shift)
        else:
            encoded = task.encode(section, rows, tokenizer, decoder=decoder, classes=classes)
        asked = task.prompts if shift is None else task.source_prompts
        prompts = asked(section, some, tokenizer) if len(some) else None
        said.extend(f"{part.name}: {note}" for note in encoded.notes)
        kept = [e for e in encoded.examples if (e.targets != NO_TARGET).any()]
        if not kept:
            raise InputError(f"{part.key}: no example has anything to predict within task.max_length = {section.max_length} tokens.")
        beside = 0 if part is not training else sum(len(other.at) for other in parts[1:] if other.key == training.key)
        taken = Taken(
            part.name,
            part.rows.source,
            len(part.rows),
            len(part.at),
            section.max_length,
            dict(tables[part.key].dropped) if part is training or part.key != training.key else {},
            left_out=len(encoded.examples) - len(kept),
            cut=sum(e.cut for e in kept),
            ends_cut=sum(e.end_cut for e in kept),
            turns_left_out=encoded.turns_left_out,
            others=part.others,
            sampled=len(part.at) < len(part.rows) - beside,
        )
        return Examples.of(kept, encoded.scorer and encoded.scorer(kept), prompts), taken

    made = [examples(part) for part in parts]
    every, taken = [one[0] for one in made], tuple(one[1] for one in made)
    notes = [n for n in dict.fromkeys([*(table.note for table in tables.values()), *said, *task.notes(section, tokenizer)]) if n]
    metrics = task.metrics(section, classes)
    test = every[2] if len(every) > 2 else None
    more = {"tokenizer": tokenizer, "collected": task.collected(section)}
    return TaskData(every[0], every[1], metrics, classes, class_token_ids, task.targets == 1, taken, tuple(notes), test, **more)


def rows_to_predict(task: Task, section: TaskConfig, source: str, classes: tuple[str, ...] | None) -> tuple[Rows, bool]:
    """All rows of a source that need not say what is right, and whether they do; `task.drop` drops none of them.

    Args:
        source: forms as `task.source`.
        classes: as `Task.classes` gave them.

    Raises:
        InputError: the source or a row will not do.
    """
    columns, key = task.columns(section), "--source"
    options = {"splits": TEST + HELD_OUT, "optional": columns.unknown, "named_by": _named_by(section, columns)}
    table = load_rows(source, key=key, columns=list(columns.names), **options)
    missing = [name for name in columns.unknown if name not in table.columns]
    labelled = not missing or any(name in table.columns for name in columns.any_of)
    rows = [dict(zip(table.columns, values, strict=True)) for values in zip(*table.columns.values(), strict=True)]
    for name in () if labelled else [name for name in missing if name not in columns.any_of]:
        table.columns[name] = [task.stand_in(section, name, row, classes) for row in rows]
    found = _read(task, section, columns, source, key, table)
    if labelled:
        task.check_held_out(section, found, classes)
    return found, labelled


@dataclasses.dataclass(frozen=True)
class _Part:
    """Rows that are trained on, held out, or kept for the test.

    Attributes:
        name: as `Taken.part`.
        rows: all rows of its source.
        at: indices of its own.
        key: the config key of the source.
        others: how many of its own are in an earlier part, too.
    """

    name: str
    rows: Rows
    at: np.ndarray
    key: str
    others: int = 0


def _split(task: Task, section: TaskConfig) -> tuple[list[_Part], dict[str, Table]]:
    """Training, held-out and, where the section has them, test rows; and the tables they are of, by config key."""
    columns, seed = task.columns(section), section.split_seed
    rows, tables = {}, {}
    sources = {"task.source": (section.source, TRAINING), "task.eval_source": (section.eval_source, HELD_OUT)}
    for key, (source, splits) in (sources | {"task.test_source": (section.test_source, TEST)}).items():
        if source is not None:
            rows[key], tables[key] = _load(task, section, columns, source, key, splits)
    for name in columns.any_of:
        if not any(name in table.columns for table in tables.values()):
            raise InputError(f"task: no source has a column '{name}', only {', '.join(n for n in columns.any_of if n != name)}.")
    first = rows["task.source"]
    texts = {key: _inputs(columns, some) for key, some in rows.items()}
    cut_off = section.eval_size if section.eval_source is None else 0
    test_size = section.test_size or 0 if section.test_source is None else 0
    assert cut_off != "all" and test_size != "all"
    if cut_off or test_size:
        options = {"held_out": cut_off, "test": test_size, "train": section.train_size, "seed": seed}
        train_at, held_at, test_at = split_rows(texts["task.source"], **options)
    else:
        train_at = sample_rows(len(first), size=section.train_size, seed=seed)
        held_at = test_at = np.array([], np.int64)
    check_tables(tables, section.drop)

    seen = {texts["task.source"][i] for i in train_at}
    parts = [_Part("training", first, train_at, "task.source")]
    wanted = [("held-out", "task.eval_source", section.eval_size, held_at), ("test", "task.test_source", section.test_size, test_at)]
    for name, key, size, at in wanted:
        if key not in rows:
            key = "task.source"
        else:
            at = sample_rows(len(rows[key]), size=None if size == "all" else size, seed=seed)
        if len(at):
            own = [texts[key][i] for i in at]
            parts.append(_Part(name, rows[key], at, key, sum(text in seen for text in own)))
            seen.update(own)
    return parts, tables


def _load(task: Task, section: TaskConfig, columns: Columns, source: str, key: str, splits: tuple[str, ...]) -> tuple[Rows, Table]:
    options = {"drop": section.drop, "splits": splits, "any_of": columns.any_of, "named_by": _named_by(section, columns)}
    table = load_rows(source, key=key, columns=list(columns.names), **options)
    return _read(task, section, columns, source, key, table), table


def _named_by(section: TaskConfig, columns: Columns) -> dict[str, str]:
    """Column -> the key of the section that names it."""
    named = [(column, name) for name, value in section for column in (value if isinstance(value, list) else [value])]
    return {column: f"task.{name}" for column, name in named if isinstance(column, str) and column in columns.names}


def _read(task: Task, section: TaskConfig, columns: Columns, source: str, key: str, table: Table) -> Rows:
    """The task's columns, as text but for structured values; `InputError` for a row where one is missing or not text."""
    numbers = np.array(table[ROW])

    def read(name: str, number: int, value: Any) -> Any:
        if isinstance(value, list | dict) and name in columns.structured:
            for text in _texts_in(value):
                check_text(text, f"{key}: row {number} of {source}: '{name}'")
            return value
        if value is None and name in columns.any_of:
            return None
        text = as_text(value)
        if value is None or (name in columns.nonempty and text == ""):
            raise InputError(f"{key}: row {number} of {source} has no '{name}'.")
        if text is None:
            what = "bytes that are not UTF-8" if isinstance(value, bytes) else f"a {type(value).__name__}"
            raise InputError(f"{key}: row {number} of {source}: '{name}' is {what}, not a text.")
        return check_text(text, f"{key}: row {number} of {source}: '{name}'")

    there = [name for name in columns.names if name in table.columns]
    found = {name: [read(name, int(n), value) for n, value in zip(numbers, table[name], strict=True)] for name in there}
    return task.read(section, Rows(source, found, numbers), key)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(inner)


def _inputs(columns: Columns, rows: Rows) -> list[str]:
    """What makes two rows copies of one another: all columns that are no targets."""
    inputs = [v for n, v in rows.columns.items() if n not in columns.targets]
    return ["\x1f".join(map(str, values)) for values in zip(*inputs, strict=True)]
