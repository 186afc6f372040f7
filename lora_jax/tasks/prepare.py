"""What all tasks share of their data: loading, splitting, tokenising; and how texts become tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config.schema import TaskConfig
from ..data.examples import NO_TARGET, Examples
from ..data.sources import HELD_OUT, ROW, TRAINING, load_rows
from ..data.split import sample_rows, split_rows
from ..errors import InputError
from .base import Columns, Rows, Task, TaskData, task_of


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
    rows = _load(task, section, columns, section.source, "task.source", TRAINING)
    if section.eval_source is None:
        texts = _inputs(columns, rows)
        train_at, held_at = split_rows(texts, held_out=section.eval_size, train=section.train_size, seed=section.split_seed)
        held_rows, held_key = rows, "task.source"
    else:
        held_key = "task.eval_source"
        held_rows = _load(task, section, columns, section.eval_source, held_key, HELD_OUT)
        train_at = sample_rows(len(rows), size=section.train_size, seed=section.split_seed)
        held_at = sample_rows(len(held_rows), size=section.eval_size, seed=section.split_seed)
    classes = task.classes(section, rows, known)
    if section.eval_source is not None:
        task.check_held_out(section, held_rows, classes)
    class_token_ids = task.class_tokens(section, classes, tokenizer, decoder=decoder)
    dropped = 0

    def examples(chosen: Rows, key: str) -> Examples:
        nonlocal dropped
        encoded = task.encode(section, chosen, tokenizer, decoder=decoder, classes=classes)
        kept = [e for e in encoded.examples if (e.targets != NO_TARGET).any()]
        dropped += len(encoded.examples) - len(kept)
        if not kept:
            raise InputError(f"{key}: no example has anything to predict within task.max_length = {section.max_length} tokens.")
        return Examples.of(kept, encoded.scorer and encoded.scorer(kept))

    train = examples(rows.take(train_at), "task.source")
    held_out = examples(held_rows.take(held_at), held_key)
    return TaskData(train, held_out, task.metrics(section, classes), classes, class_token_ids, task.targets == 1, dropped)


def _load(task: Task, section: TaskConfig, columns: Columns, source: str, key: str, splits: tuple[str, ...]) -> Rows:
    """Reads the task's columns; `InputError` for a row where one of them is missing or not text."""
    table = load_rows(source, key=key, columns=list(columns.names), drop=section.drop, splits=splits)
    rows = Rows(source, {name: list(table[name][:]) for name in columns.names}, np.array(table[ROW][:]))
    for name in columns.names:
        for number, value in zip(rows.numbers, rows.columns[name], strict=True):
            if value is None or (name in columns.nonempty and value == ""):
                raise InputError(f"{key}: row {number} of {source} has no '{name}'.")
            if isinstance(value, list | dict) and name not in columns.structured:
                raise InputError(f"{key}: row {number} of {source}: '{name}' is a {type(value).__name__}, not a text.")
    return task.read(section, rows, key)


def _inputs(columns: Columns, rows: Rows) -> list[str]:
    """What makes two rows copies of one another: all columns that are no targets."""
    inputs = [v for n, v in rows.columns.items() if n not in columns.targets]
    return ["\x1f".join(map(str, values)) for values in zip(*inputs, strict=True)]


def plain_ids(tokenizer: Any, texts: Sequence[Any]) -> list[list[int]]:
    """Token ids of texts without special tokens."""
    return tokenizer([str(t) for t in texts], add_special_tokens=False, padding=False)["input_ids"]


def start_ids(tokenizer: Any) -> list[int]:
    """The token a decoder's texts begin with, where the tokenizer says there is one; the model was trained with it."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


def encoder_ids(tokenizer: Any, texts: Sequence[Any], max_length: int) -> list[list[int]]:
    """Token ids of an encoder's texts, cut to `max_length` with the special tokens.

    Raises:
        InputError: the special tokens alone take as many.
    """
    # Asked for no more than its special tokens, the tokenizer cuts nothing.
    if max_length <= tokenizer.num_special_tokens_to_add():
        raise InputError(f"task.max_length: {max_length} leaves no room for text beside the special tokens.")
    return tokenizer([str(t) for t in texts], truncation=True, max_length=max_length, padding=False)["input_ids"]
