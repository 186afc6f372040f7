"""A task's data: loaded, cut into training, held-out and test rows, tokenised. The same for all tasks."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config.schema import TaskConfig
from ..config.types import size_text
from ..data.batching import NO_TARGET, Examples
from ..data.columns import AT_ONCE, chained, like, row_names
from ..data.files import as_text
from ..data.pairs import Shift
from ..data.sources import (
    HELD_OUT,
    ROW,
    TEST,
    TRAINING,
    Table,
    Taken,
    check_tables,
    files_of,
    joined,
    load_rows,
)
from ..data.split import mixed_rows, sample_rows, split_rows
from ..data.store import FORMAT, KEPT_FROM, TokenFiles, Writer, file_digest
from ..errors import InputError, RunError
from ..weights.provenance import tokenizer_digest
from ..weights.tokenizer import check_text
from .base import Columns, Encoded, Rows, Task, TaskData, task_of


def prepare(
    section: TaskConfig,
    tokenizer: Any,
    *,
    decoder: bool,
    known: tuple[str, ...] = (),
    shift: Shift | None = None,
    store: TokenFiles | None = None,
) -> TaskData:
    """Loads, splits and tokenises a task's data, or finds the tokens that an earlier run has kept.

    Args:
        section: the config section.
        tokenizer: a transformers fast tokenizer.
        decoder: whether the base is a decoder.
        known: the classes of a head that was loaded, in order; none of a new one.
        shift: how an encoder-decoder is given its targets; None where the base is none.
        store: where tokens are kept, as `task.token_cache` says; None keeps none.

    Raises:
        InputError: the source, a column, a label or the tokenizer will not do; the message says which row.
    """
    task = task_of(section)
    key = None if store is None else _kept_as(task, section, tokenizer, (decoder, known, shift))

    def make(writer: Writer | None) -> TaskData:
        return _make(task, section, tokenizer, decoder, known, shift, writer)

    return make(None) if store is None or key is None else _through_files(task, section, tokenizer, store, key, make)


def _make(
    task: Task, section: TaskConfig, tokenizer: Any, decoder: bool, known: tuple[str, ...], shift: Shift | None, writer: Writer | None
) -> TaskData:
    parts, tables = split(task, section, functools.partial(_load, task, section, None if writer is None else writer.folder))
    training = parts[0]
    classes = task.classes(section, training.rows, known)
    for part in parts[1:]:
        if part.key != training.key:
            task.check_held_out(section, part.rows, classes)
    class_token_ids = task.class_tokens(section, classes, tokenizer, decoder=decoder)

    said: list[str] = []

    def examples(part: Part) -> tuple[Examples, Taken]:
        def encode(at: np.ndarray) -> Encoded:
            rows = part.rows.take(at)
            if shift is not None:
                return task.encode_pairs(section, rows, tokenizer, shift=shift)
            return task.encode(section, rows, tokenizer, decoder=decoder, classes=classes)

        some = part.rows.take(part.at[: task.decoded_rows(section)])
        if writer is None:
            pieces = [encode(part.at)]
        else:
            pieces = (encode(part.at[start : start + AT_ONCE]) for start in range(0, len(part.at), AT_ONCE))
        counted, kept, encoded = Counter[str](), [], Encoded([])
        for encoded in pieces:
            own = [e for e in encoded.examples if (e.targets != NO_TARGET).any()]
            counted.update(kept=len(own), left_out=len(encoded.examples) - len(own), turns_left_out=encoded.turns_left_out)
            counted.update(cut=sum(e.cut for e in own), ends_cut=sum(e.end_cut for e in own))
            if writer is None:
                kept = own
            elif own:
                fed = [e.decoder_tokens for e in own if e.decoder_tokens is not None]
                columns = {"tokens": [e.tokens for e in own], "targets": [e.targets for e in own], "decoder_tokens": fed}
                writer.add({f"{part.name}.{name}": arrays for name, arrays in columns.items()})
        asked = task.prompts if shift is None else task.source_prompts
        prompts = asked(section, some, tokenizer) if len(some) else None
        said.extend(f"{part.name}: {note}" for note in encoded.notes)
        if not counted["kept"]:
            raise InputError(f"{part.key}: no example has anything to predict within task.max_length = {section.max_length} tokens.")
        beside = 0 if part is not training else sum(len(other.at) for other in parts[1:] if other.key == training.key)
        taken = Taken(
            part.name,
            part.rows.source,
            len(part.rows),
            len(part.at),
            section.max_length,
            dict(tables[part.key].dropped) if part is training or part.key != training.key else {},
            left_out=counted["left_out"],
            cut=counted["cut"],
            ends_cut=counted["ends_cut"],
            turns_left_out=counted["turns_left_out"],
            others=part.others,
            sampled=len(part.at) < len(part.rows) - beside,
        )
        return Examples.of(kept, encoded.scorer and encoded.scorer(kept), prompts), taken

    made = [examples(part) for part in parts]
    every, taken = [one[0] for one in made], tuple(one[1] for one in made)
    mixed = [note for part in parts for note in part.notes]
    notes = [n for n in dict.fromkeys([*(table.note for table in tables.values()), *mixed, *said, *task.notes(section, tokenizer)]) if n]
    metrics = task.metrics(section, classes)
    test = every[2] if len(every) > 2 else None
    more = {"tokenizer": tokenizer, "collected": task.collected(section)}
    return TaskData(every[0], every[1], metrics, classes, class_token_ids, task.targets == 1, taken, tuple(notes), test, **more)


def _kept_as(task: Task, section: TaskConfig, tokenizer: Any, more: Any) -> str | None:
    """What the tokens of a section's rows are kept as: a digest of the files' content, the tokenizer and all that tokens follow from.

    Returns:
        None where they are not kept: the config or the task says so, rows are of the hub, or (with `auto`) they are few.

    Raises:
        InputError: a source is not there, or `task.token_cache` is `on` and they cannot be kept.
    """
    sources = [(one.source, "task.sources", TRAINING) for one in section.sources] or [(section.source, "task.source", TRAINING)]
    sources += [(section.eval_source, "task.eval_source", HELD_OUT), (section.test_source, "task.test_source", TEST)]
    there = [(source, key, splits) for source, key, splits in sources if source is not None]
    why = "" if task.by_row else f"the rows of task.kind '{task.name}' are more than tokens"
    why = why or ("rows of the hub have a cache of their own" if any(source.startswith("hf://") for source, *_ in there) else "")
    if section.token_cache == "off" or (why and section.token_cache == "auto"):
        return None
    if why:
        raise InputError(f"task.token_cache: on, but {why}.")
    files = [file for source, key, splits in there for file in files_of(source, key, splits)]
    if section.token_cache == "auto" and sum(file.stat().st_size for file in files) < KEPT_FROM:
        return None
    said = (FORMAT, importlib.metadata.version("lora-jax"), task.name, section.model_dump_json(exclude={"token_cache"}), more)
    facts = (*said, tokenizer_digest(tokenizer), file_digest(files))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _through_files(
    task: Task, section: TaskConfig, tokenizer: Any, store: TokenFiles, key: str, make: Callable[[Writer], TaskData]
) -> TaskData:
    """The data with its tokens in files: those of an entry that is there, or of one that is made."""
    found = store.open(key)
    if found is None:
        try:
            with store.write(key) as writer:
                data = make(writer)
                taken = [dataclasses.asdict(part) | {"dropped": [[*pair, n] for pair, n in part.dropped.items()]} for part in data.taken]
                writer.facts |= {"taken": taken, "notes": list(data.notes)}
        except OSError as error:
            raise RunError(f"the tokens cannot be kept in {store.folder} ({error}). Set task.token_cache=off to do without.") from None
        found = store.open(key)
        if found is None:
            raise RunError(f"{store.folder}: the tokens that were just written cannot be read.")
    facts, columns = found
    taken = [Taken(**part | {"dropped": {(column, value): n for column, value, n in part["dropped"]}}) for part in facts["taken"]]
    parts = [
        Examples(columns[f"{part.part}.tokens"], columns[f"{part.part}.targets"], decoder_tokens=columns.get(f"{part.part}.decoder_tokens"))
        for part in taken
    ]
    size = sum(column.whole.nbytes for column in columns.values())
    notes = (*facts["notes"], f"tokens: {size_text(size)} in {store.folder / key}, mapped into memory.")
    metrics, test = task.metrics(section, None), parts[2] if len(parts) > 2 else None
    return TaskData(parts[0], parts[1], metrics, None, None, task.targets == 1, tuple(taken), notes, test, tokenizer)


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
class Part:
    """Rows that are trained on, held out, or kept for the test.

    Attributes:
        name: as `Taken.part`.
        rows: all rows of its source.
        at: indices of its own.
        key: the config key of the source.
        others: how many of its own are in an earlier part, too.
        notes: what else is to be known of them.
    """

    name: str
    rows: Rows
    at: np.ndarray
    key: str
    others: int = 0
    notes: tuple[str, ...] = ()


# The rows and the table of a source, its config key, the names of the split wanted of it, and what its columns are called here.
Loader = Callable[[str, str, tuple[str, ...], Mapping[str, str]], tuple[Rows, Table]]


def split(task: Task, section: TaskConfig, load: Loader) -> tuple[list[Part], dict[str, Table]]:
    """Training, held-out and, where the section has them, test rows; and the tables they are of, by config key."""
    columns, seed = task.columns(section), section.split_seed
    rows, tables, origin = {}, {}, np.array([], np.int64)
    sources = {"task.source": (section.source, TRAINING), "task.eval_source": (section.eval_source, HELD_OUT)}
    for key, (source, splits) in (sources | {"task.test_source": (section.test_source, TEST)}).items():
        if key == "task.source" and section.sources:
            rows[key], tables[key], origin = _mixture(section, load)
        elif source is not None:
            rows[key], tables[key] = load(source, key, splits, section.columns)
    for name in columns.any_of:
        if not any(name in table.columns for table in tables.values()):
            raise InputError(f"task: no source has a column '{name}', only {', '.join(n for n in columns.any_of if n != name)}.")
    first = rows["task.source"]
    texts = {key: _inputs(columns, some) for key, some in rows.items()}
    cut_off = section.eval_size if section.eval_source is None else 0
    test_size = section.test_size or 0 if section.test_source is None else 0
    assert cut_off != "all" and test_size != "all"
    weights = [one.weight for one in section.sources if one.weight is not None]
    train_size = None if weights else section.train_size
    if cut_off or test_size:
        options = {"held_out": cut_off, "test": test_size, "train": train_size, "seed": seed}
        train_at, held_at, test_at = split_rows(texts["task.source"], **options)
    else:
        train_at = sample_rows(len(first), size=train_size, seed=seed)
        held_at = test_at = np.array([], np.int64)
    check_tables(tables, section.drop)

    seen = texts["task.source"][train_at]
    notes = ()
    if weights:
        train_at = mixed_rows(train_at, origin, weights, size=section.train_size, seed=seed)
        shares = np.bincount(origin[train_at], minlength=len(weights))
        notes = tuple(f"training: {n:,} rows of {one.source}" for n, one in zip(shares.tolist(), section.sources, strict=True))
    parts = [Part("training", first, train_at, "task.source", notes=notes)]
    wanted = [("held-out", "task.eval_source", section.eval_size, held_at), ("test", "task.test_source", section.test_size, test_at)]
    for name, key, size, at in wanted:
        if key not in rows:
            key = "task.source"
        else:
            at = sample_rows(len(rows[key]), size=None if size == "all" else size, seed=seed)
        if len(at):
            own = texts[key][at]
            parts.append(Part(name, rows[key], at, key, int(np.isin(own, seen).sum())))
            seen = np.concatenate([seen, own])
    return parts, tables


def _mixture(section: TaskConfig, load: Loader) -> tuple[Rows, Table, np.ndarray]:
    """The rows of all of `task.sources`, one after the other, and of which source each is."""
    found = []
    for one in section.sources:
        renamed = {**section.columns, **one.columns}
        found.append(load(one.source, "task.sources", TRAINING, renamed))
    rows, tables = [own for own, _ in found], [table for _, table in found]
    for own, one in zip(rows, section.sources, strict=True):
        if own.columns.keys() != rows[0].columns.keys():
            unlike = next(iter(own.columns.keys() ^ rows[0].columns.keys()))
            raise InputError(f"task.sources: '{unlike}' is not in both {rows[0].source} and {one.source}.")
    files = [file for table in tables for file in table.files]
    if twice := next((file for file in files if files.count(file) > 1), None):
        raise InputError(f"task.sources: {twice} is read twice; give it a larger weight.")
    columns_of = {name: chained([own.columns[name] for own in rows]) for name in rows[0].columns}
    numbers, origin = np.concatenate([own.numbers for own in rows]), np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    return Rows(" + ".join(own.source for own in rows), columns_of, numbers), joined(tables), origin


def _load(
    task: Task, section: TaskConfig, folder: Path | None, source: str, key: str, splits: tuple[str, ...], renamed: Mapping[str, str]
) -> tuple[Rows, Table]:
    columns = task.columns(section)
    options = {
        "drop": section.drop,
        "renamed": renamed,
        "splits": splits,
        "any_of": columns.any_of,
        "named_by": _named_by(section, columns),
        "folder": folder,
    }
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
    found = {name: like(table[name]) for name in there}
    for name, column in found.items():
        column.extend(read(name, int(n), value) for n, value in zip(numbers, table[name], strict=True))
    return task.read(section, Rows(source, found, numbers), key)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(inner)


def _inputs(columns: Columns, rows: Rows) -> np.ndarray:
    """What makes two rows copies of one another: the names of their columns that are no targets."""
    return row_names([values for name, values in rows.columns.items() if name not in columns.targets])
