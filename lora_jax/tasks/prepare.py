"""Tasks: text to tokens, and at each position the id to be predicted there, if any."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..config.schema import TaskConfig
from ..data.examples import NO_TARGET, Example, Examples, Scorer
from ..data.sources import HELD_OUT, ROW, TRAINING, load_rows
from ..data.split import sample_rows, split_rows
from ..errors import InputError, hint
from .chat import encode_chat
from .question_answering import answer_scorer, encode_questions, question_of
from .token_classification import encode_words, has_entities, word_scorer, words_of


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's data.

    Attributes:
        train, held_out: the examples.
        classes: class names in order (of texts or tokens), else None.
        class_token_ids: (classes,) int32, the token of each class's word (a decoder's classification), else None.
        per_example: whether each example has exactly one target (classification).
        metric: what models are compared by; larger is better unless it is `loss`.
        dropped: rows left out because nothing is to be predicted within `max_length` tokens of them.
    """

    train: Examples
    held_out: Examples
    classes: tuple[str, ...] | None
    class_token_ids: np.ndarray | None
    per_example: bool
    metric: str = "loss"
    dropped: int = 0


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The columns of a source as lists, checked, and the number each row has in its file."""

    source: str
    columns: dict[str, list[Any]]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, chosen: np.ndarray) -> _Rows:
        return _Rows(self.source, {name: [values[i] for i in chosen] for name, values in self.columns.items()}, self.numbers[chosen])


def prepare(task: TaskConfig, tokenizer: Any, *, decoder: bool, known: tuple[str, ...] = ()) -> TaskData:
    """Loads, splits and tokenises a task's data.

    Args:
        task: the config section.
        tokenizer: a transformers fast tokenizer.
        decoder: whether the base is a decoder (classifies by label words) or an encoder (by a head on the first token).
        known: the classes of a head that was loaded, in order; none of a new one. `task.labels` calls them something else.

    Raises:
        InputError: the source, a column, a label or the tokenizer will not do; the message says which row.
    """
    rows = _load(task, task.source, "task.source", TRAINING)
    if task.eval_source is None:
        train_at, held_at = split_rows(_inputs(task, rows), held_out=task.eval_size, train=task.train_size, seed=task.split_seed)
        held_rows = rows
    else:
        held_rows = _load(task, task.eval_source, "task.eval_source", HELD_OUT)
        train_at = sample_rows(len(rows), size=task.train_size, seed=task.split_seed)
        held_at = sample_rows(len(held_rows), size=task.eval_size, seed=task.split_seed)
    classes = _classes(task, rows, known) if task.label is not None else None
    if classes is not None and task.eval_source is not None:
        _check_labels(held_rows, str(task.label), classes)
    words = _label_words(task, classes, tokenizer) if classes is not None and task.kind == "classification" and decoder else None
    encode = _encoder_of(task, tokenizer, classes, decoder)
    dropped = 0

    def examples(chosen: _Rows, key: str) -> Examples:
        nonlocal dropped
        made, scorer = encode(chosen)
        kept = [e for e in made if (e.targets != NO_TARGET).any()]
        dropped += len(made) - len(kept)
        if not kept:
            raise InputError(f"{key}: no example has anything to predict within task.max_length = {task.max_length} tokens.")
        types = [e.types for e in kept if e.types is not None]
        return Examples([e.tokens for e in kept], [e.targets for e in kept], types or None, scorer and scorer(kept))

    train = examples(rows.take(train_at), "task.source")
    held_out = examples(held_rows.take(held_at), "task.eval_source" if task.eval_source else "task.source")
    return TaskData(train, held_out, classes, words, task.kind == "classification", _metric(task, classes), dropped)


def _metric(task: TaskConfig, classes: tuple[str, ...] | None) -> str:
    if classes is None:
        return "f1" if task.kind == "question_answering" else "loss"
    return "f1" if task.kind == "token_classification" and has_entities(classes) else "accuracy"


def _load(task: TaskConfig, source: str, key: str, splits: tuple[str, ...]) -> _Rows:
    """Reads the task's columns; `InputError` for a row where one of them is missing or not text."""
    named = (task.text, task.label, task.prompt, task.response, task.messages, task.question, task.context, task.answers)
    names = [c for c in named if c is not None]
    structured = (task.messages, task.answers, *((task.text, task.label) if task.kind == "token_classification" else ()))
    table = load_rows(source, key=key, columns=names, drop=task.drop, splits=splits)
    rows = _Rows(source, {name: list(table[name][:]) for name in names}, np.array(table[ROW][:]))
    for name in names:
        for number, value in zip(rows.numbers, rows.columns[name], strict=True):
            if value is None or (name == task.label and value == ""):
                raise InputError(f"{key}: row {number} of {source} has no '{name}'.")
            if isinstance(value, list | dict) and name not in structured:
                raise InputError(f"{key}: row {number} of {source}: '{name}' is a {type(value).__name__}, not a text.")
    return _read(task, rows, key)


def _read(task: TaskConfig, rows: _Rows, key: str) -> _Rows:
    """The rows with words and labels as lists, and answers as `Question`s; `InputError` for a row that will not do."""
    where = [f"{key}: row {number} of {rows.source}" for number in rows.numbers]
    columns = rows.columns
    if task.kind == "token_classification":
        text, label = str(task.text), str(task.label)
        pairs = [words_of(*row) for row in zip(columns[text], columns[label], where, strict=True)]
        return dataclasses.replace(rows, columns={text: [w for w, _ in pairs], label: [named for _, named in pairs]})
    if task.kind == "question_answering":
        question, context, answers = str(task.question), str(task.context), str(task.answers)
        asked = [question_of(*row) for row in zip(columns[question], columns[context], columns[answers], where, strict=True)]
        return dataclasses.replace(rows, columns=columns | {answers: asked})
    return rows


def _inputs(task: TaskConfig, rows: _Rows) -> list[str]:
    """What makes two rows the same: all but the label; of questions, the text they are about."""
    inputs = [v for n, v in rows.columns.items() if n not in (task.label, task.question, task.answers)]
    return ["\x1f".join(map(str, values)) for values in zip(*inputs, strict=True)]


def _classes(task: TaskConfig, rows: _Rows, known: tuple[str, ...]) -> tuple[str, ...]:
    assert task.label is not None
    if task.labels is not None and known and len(known) != len(task.labels):
        raise InputError(f"task.labels: {len(task.labels)} classes; the model's head has {len(known)}: {', '.join(known)}.")
    if task.labels is None and not known:
        found = {label for _, label in _labels(rows, task.label)}
        # Numbers in the order of numbers: 2 before 10.
        classes = tuple(sorted(found, key=int if all(f.isdecimal() for f in found) else None))
    else:
        classes = tuple(task.labels or known)
        if len(set(classes)) < len(classes):
            raise InputError("task.labels: a class is named twice.")
        _check_labels(rows, task.label, classes)
    if len(classes) < 2:
        raise InputError(
            f"task.label: the column '{task.label}' has one value only ({', '.join(classes)}); classification needs two classes."
        )
    return classes


def _check_labels(rows: _Rows, column: str, classes: tuple[str, ...]) -> None:
    """`InputError` for a label that is no class."""
    known = set(classes)
    for number, label in _labels(rows, column):
        if label not in known:
            raise InputError(
                f"task.labels: row {number} of {rows.source} has the label '{label}'. {hint(label, classes)} Classes: {', '.join(classes)}."
            )


def _labels(rows: _Rows, column: str) -> list[tuple[int, str]]:
    """Every label, with its row's number: one a row, or one a word."""
    columns = zip(rows.numbers, rows.columns[column], strict=True)
    return [(int(number), str(label)) for number, value in columns for label in (value if isinstance(value, list) else [value])]


# Rows -> examples, and what makes a scorer of those that are kept.
Encoder = Callable[[_Rows], tuple[list[Example], Callable[[list[Example]], Scorer] | None]]


def _encoder_of(task: TaskConfig, tokenizer: Any, classes: tuple[str, ...] | None, decoder: bool) -> Encoder:
    """What turns rows into examples."""
    if task.kind == "token_classification":
        assert classes is not None
        return lambda rows: (
            encode_words(
                list(zip(rows.columns[str(task.text)], rows.columns[str(task.label)], strict=True)), tokenizer, classes, task.max_length
            ),
            lambda kept: word_scorer(kept, classes),
        )
    if task.kind == "question_answering":
        return lambda rows: _questions(rows, task, tokenizer)
    texts = _encoder_of_texts(task, tokenizer, classes, decoder)
    return lambda rows: ([Example(tokens, targets) for tokens, targets in texts(rows.columns, rows.numbers)], None)


def _questions(rows: _Rows, task: TaskConfig, tokenizer: Any) -> tuple[list[Example], Callable[[list[Example]], Scorer]]:
    asked = rows.columns[str(task.answers)]
    made, windows = encode_questions(asked, rows.numbers.tolist(), tokenizer, max_length=task.max_length, stride=task.stride)
    return made, lambda _: answer_scorer(asked, windows, task.max_answer)


TextEncoder = Callable[[dict[str, list[Any]], np.ndarray], list[tuple[np.ndarray, np.ndarray]]]


def _encoder_of_texts(task: TaskConfig, tokenizer: Any, classes: tuple[str, ...] | None, decoder: bool) -> TextEncoder:
    """What turns columns, and the rows' numbers, into (tokens, targets)."""
    start = _start(tokenizer) if decoder else []
    if task.kind == "distillation":
        return lambda columns, _: _every_token(columns, task, tokenizer, start, decoder)
    if classes is not None:
        return lambda columns, _: _classification(columns, task, tokenizer, classes, decoder)
    if task.text is not None:
        return lambda columns, _: [
            # A blank text teaches nothing, not even where it ends.
            _next_token([*start, *_with_end(ids, tokenizer)][: task.max_length] if ids else [])
            for ids in _plain(tokenizer, columns[str(task.text)])
        ]
    if task.messages is not None:
        return lambda columns, numbers: [
            _shifted(*encode_chat(m, tokenizer, int(n)), task.max_length) for m, n in zip(columns[str(task.messages)], numbers, strict=True)
        ]
    return lambda columns, _: _prompt_response(columns, task, tokenizer)


def _classification(
    columns: dict[str, list[Any]], task: TaskConfig, tokenizer: Any, classes: tuple[str, ...], decoder: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    texts, labels = [str(t) for t in columns[str(task.text)]], [str(v) for v in columns[str(task.label)]]
    if decoder:
        before, _, after = task.template.partition("{text}")
        head, tail = (_plain(tokenizer, [part])[0] if part else [] for part in (before, after))
        head = [*_start(tokenizer), *head]
        room = task.max_length - len(head) - len(tail)
        if room < 1:
            raise InputError(
                f"task.max_length: {task.max_length} leaves no room for text beside the template's {len(head) + len(tail)} tokens."
            )
        encoded = [[*head, *ids[:room], *tail] for ids in _plain(tokenizer, texts)]
    else:
        encoded = _with_special(tokenizer, texts, task)
    made = []
    for ids, label in zip(encoded, labels, strict=True):
        targets = np.full(len(ids), NO_TARGET, np.int32)
        if ids:  # an empty text may have no token at all, and is then left out
            targets[-1 if decoder else 0] = classes.index(label)
        made.append((np.array(ids, np.int32), targets))
    return made


def _every_token(
    columns: dict[str, list[Any]], task: TaskConfig, tokenizer: Any, start: list[int], decoder: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A target at each token; what it is to be, the teacher knows, and the id (0) says nothing."""
    texts = [str(t) for t in columns[str(task.text)]]
    if decoder:
        encoded = [[*start, *ids][: task.max_length] if ids else [] for ids in _plain(tokenizer, texts)]
    else:
        encoded = _with_special(tokenizer, texts, task)
    return [(np.array(ids, np.int32), np.zeros(len(ids), np.int32)) for ids in encoded]


def _with_special(tokenizer: Any, texts: list[str], task: TaskConfig) -> list[list[int]]:
    """Token ids of an encoder's texts, cut to `max_length` with the special tokens."""
    # Asked for no more than its special tokens, the tokenizer cuts nothing.
    if task.max_length <= tokenizer.num_special_tokens_to_add():
        raise InputError(f"task.max_length: {task.max_length} leaves no room for text beside the special tokens.")
    return tokenizer(texts, truncation=True, max_length=task.max_length, padding=False)["input_ids"]


def _plain(tokenizer: Any, texts: Sequence[Any]) -> list[list[int]]:
    return tokenizer([str(t) for t in texts], add_special_tokens=False, padding=False)["input_ids"]


def _start(tokenizer: Any) -> list[int]:
    """The token a decoder's texts begin with, where the tokenizer says there is one; the model was trained with it."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []


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
        asked = [*_start(tokenizer), *prompt]
        made.append(_shifted([*asked, *answer], [False] * len(asked) + [True] * len(answer), task.max_length))
    return made


def _label_words(task: TaskConfig, classes: tuple[str, ...], tokenizer: Any) -> np.ndarray:
    """The first token of each class's word, as it goes on after the template."""
    words = task.label_words or list(classes)
    if len(words) != len(classes):
        raise InputError(f"task.label_words: {len(words)} words for {len(classes)} classes ({', '.join(classes)}).")
    space = "" if task.template.endswith((" ", "\n")) else " "
    # After the template's last words, not alone: some tokenizers put a space before every text, and would give all words the token
    # of that space.
    tail = task.template.rpartition("{text}")[2] or "a"
    before = _plain(tokenizer, [tail])[0]

    def first_token(word: str) -> int | None:
        together, alone = _plain(tokenizer, [tail + space + word, space + word])
        fits = together[: len(before)] == before and len(together) > len(before)
        return together[len(before)] if fits else next(iter(alone), None)

    first = [first_token(w) if w.strip() else None for w in words]
    for i, token in enumerate(first):
        if token is None:
            raise InputError(f"task.label_words: the word of class '{classes[i]}' is empty.")
        if token in first[:i]:
            other = words[first.index(token)]
            raise InputError(
                f"task.label_words: '{words[i]}' and '{other}' begin with the same token; give words that differ from the start."
            )
    return np.array(first, np.int32)
