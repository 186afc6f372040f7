"""Tasks: text to tokens, and at each position the id to be predicted there, if any."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..config.errors import InputError, hint
from ..config.schema import TaskConfig
from .chat import encode_chat
from .sources import load_rows
from .split import sample_rows, split_rows

NO_TARGET = -1


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised examples.

    Attributes:
        tokens: a (length,) int32 array for each.
        targets: a (length,) int32 array for each: the token or class to be predicted at that position, or -1.
    """

    tokens: list[np.ndarray]
    targets: list[np.ndarray]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """(n,) int64 tokens of each."""
        return np.array([len(t) for t in self.tokens], np.int64)

    @functools.cached_property
    def target_counts(self) -> np.ndarray:
        """(n,) int64 positions of each that have a target."""
        return np.array([int((t != NO_TARGET).sum()) for t in self.targets], np.int64)


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's data.

    Attributes:
        train, held_out: the examples.
        classes: class names in order (classification), else None.
        class_token_ids: (classes,) int32, the token of each class's word (a decoder's classification), else None.
        per_example: whether each example has exactly one target (classification).
    """

    train: Examples
    held_out: Examples
    classes: tuple[str, ...] | None
    class_token_ids: np.ndarray | None
    per_example: bool


def prepare(task: TaskConfig, tokenizer: Any, *, decoder: bool) -> TaskData:
    """Loads, splits and tokenises a task's data.

    Args:
        task: the config section.
        tokenizer: a transformers fast tokenizer.
        decoder: whether the base is a decoder (classifies by label words) or an encoder (by a head on the first token).

    Raises:
        InputError: the source, a column, a label or the tokenizer will not do; the message says which row.
    """
    columns = [c for c in (task.text, task.label, task.prompt, task.response, task.messages) if c is not None]
    rows = load_rows(task.source, key="task.source", columns=columns, drop=task.drop)
    if task.eval_source is None:
        texts = [repr([rows[c][i] for c in columns if c != task.label]) for i in range(rows.num_rows)] if task.messages else _joined(rows, task, columns)
        train_at, held_at = split_rows(texts, held_out=task.eval_size, train=task.train_size, seed=task.split_seed)
        held_rows = rows
    else:
        held_rows = load_rows(task.eval_source, key="task.eval_source", columns=columns, drop=task.drop)
        train_at = sample_rows(rows.num_rows, size=task.train_size, seed=task.split_seed)
        held_at = sample_rows(held_rows.num_rows, size=task.eval_size, seed=task.split_seed)
    classes = _classes(task, rows) if task.kind == "classification" else None
    if classes is not None and task.eval_source is not None:
        _check_labels([str(v) for v in held_rows[str(task.label)]], classes, task.eval_source)
    words = _label_words(task, classes, tokenizer) if classes is not None and decoder else None
    encode = _encoder_of(task, tokenizer, classes, decoder)

    def examples(source: Any, chosen: np.ndarray, key: str) -> Examples:
        picked = {c: source.select(chosen)[c] for c in columns}
        made = encode({c: list(v) for c, v in picked.items()}, chosen)
        kept = [(t, y) for t, y in made if (y != NO_TARGET).any()]
        if not kept:
            raise InputError(f"{key}: no example has anything to predict within task.max_length = {task.max_length} tokens.")
        return Examples([t for t, _ in kept], [y for _, y in kept])

    return TaskData(
        examples(rows, train_at, "task.source"),
        examples(held_rows, held_at, "task.eval_source" if task.eval_source else "task.source"),
        classes,
        words,
        task.kind == "classification",
    )


def _joined(rows: Any, task: TaskConfig, columns: Sequence[str]) -> list[str]:
    return ["\x1f".join(map(str, values)) for values in zip(*(rows[c] for c in columns if c != task.label), strict=True)]


def _classes(task: TaskConfig, rows: Any) -> tuple[str, ...]:
    assert task.label is not None
    found = [str(v) for v in rows[task.label]]
    if task.labels is None:
        classes = tuple(sorted(set(found)))
    else:
        classes = tuple(task.labels)
        if len(set(classes)) < len(classes):
            raise InputError("task.labels: a class is named twice.")
        _check_labels(found, classes, task.source)
    if len(classes) < 2:
        raise InputError(f"task.label: the column '{task.label}' has one value only ({', '.join(classes)}); classification needs two classes.")
    return classes


def _check_labels(found: Sequence[str], classes: tuple[str, ...], source: str) -> None:
    """`InputError` for a label that is no class. Rows are counted from 1, without those that `task.drop` leaves out."""
    for number, label in enumerate(found, 1):
        if label not in classes:
            raise InputError(f"task.labels: row {number} of {source} has the label '{label}'. {hint(label, classes)} Classes: {', '.join(classes)}.")


Encoder = Callable[[dict[str, list[Any]], np.ndarray], list[tuple[np.ndarray, np.ndarray]]]


def _encoder_of(task: TaskConfig, tokenizer: Any, classes: tuple[str, ...] | None, decoder: bool) -> Encoder:
    """What turns columns into (tokens, targets)."""
    if classes is not None:
        return lambda columns, at: _classification(columns, task, tokenizer, classes, decoder)
    if task.text is not None:
        return lambda columns, at: [_next_token(_with_end(ids, tokenizer)[: task.max_length]) for ids in _plain(tokenizer, columns[str(task.text)])]
    if task.messages is not None:
        return lambda columns, at: [
            _shifted(*encode_chat(m, tokenizer, int(n)), task.max_length) for m, n in zip(columns[str(task.messages)], at, strict=True)
        ]
    return lambda columns, at: _prompt_response(columns, task, tokenizer)


def _classification(columns: dict[str, list[Any]], task: TaskConfig, tokenizer: Any, classes: tuple[str, ...], decoder: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    texts, labels = [str(t) for t in columns[str(task.text)]], [str(v) for v in columns[str(task.label)]]
    if decoder:
        before, _, after = task.template.partition("{text}")
        head, tail = (_plain(tokenizer, [part])[0] if part else [] for part in (before, after))
        room = task.max_length - len(head) - len(tail)
        if room < 1:
            raise InputError(f"task.max_length: {task.max_length} leaves no room for text beside the template's {len(head) + len(tail)} tokens.")
        encoded = [[*head, *ids[:room], *tail] for ids in _plain(tokenizer, texts)]
    else:
        encoded = tokenizer(texts, truncation=True, max_length=task.max_length, padding=False)["input_ids"]
    made = []
    for ids, label in zip(encoded, labels, strict=True):
        targets = np.full(len(ids), NO_TARGET, np.int32)
        if ids:  # an empty text may have no token at all, and is then left out
            targets[-1 if decoder else 0] = classes.index(label)
        made.append((np.array(ids, np.int32), targets))
    return made


def _plain(tokenizer: Any, texts: Sequence[Any]) -> list[list[int]]:
    return tokenizer([str(t) for t in texts], add_special_tokens=False, padding=False)["input_ids"]


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    return [*ids, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ids


def _next_token(ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return _shifted(ids, [True] * len(ids), len(ids))


def _shifted(ids: Sequence[int], wanted: Sequence[bool], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens cut to `length`, and as target of each the next token where that one is wanted."""
    tokens = np.array(ids[:length], np.int32)
    targets = np.full(len(tokens), NO_TARGET, np.int32)
    targets[:-1] = np.where(np.array(wanted[:length], bool)[1:], tokens[1:], NO_TARGET)
    return tokens, targets


def _prompt_response(columns: dict[str, list[Any]], task: TaskConfig, tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    prompts, responses = _plain(tokenizer, columns[str(task.prompt)]), _plain(tokenizer, columns[str(task.response)])
    made = []
    for prompt, response in zip(prompts, responses, strict=True):
        answer = _with_end(response, tokenizer)
        made.append(_shifted([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), task.max_length))
    return made


def _label_words(task: TaskConfig, classes: tuple[str, ...], tokenizer: Any) -> np.ndarray:
    """The first token of each class's word, as it goes on after the template."""
    words = task.label_words or list(classes)
    if len(words) != len(classes):
        raise InputError(f"task.label_words: {len(words)} words for {len(classes)} classes ({', '.join(classes)}).")
    spaced = [w if task.template.endswith((" ", "\n")) else f" {w}" for w in words]
    first = [ids[0] if ids else None for ids in _plain(tokenizer, spaced)]
    for i, token in enumerate(first):
        if token is None:
            raise InputError(f"task.label_words: the word of class '{classes[i]}' is empty.")
        if token in first[:i]:
            other = words[first.index(token)]
            raise InputError(f"task.label_words: '{words[i]}' and '{other}' begin with the same token; give words that differ from the start.")
    return np.array(first, np.int32)
