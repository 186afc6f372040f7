"""Rows from a file, a folder or the hub, and which of them are held out. No dataset scripts; no network for what is local."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, hint
from ..weights.load import hub_or_cache, hub_reason, resolve
from .columns import chained, new_column
from .files import KINDS, Columns, Pieces, as_text, hub_column, kind_of, read_pieces

# What a split is called in file names and on the hub; the first that is there is taken.
TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
TEST = ("test",)  # no other: those are there to choose by
# Column added to all rows: the 1-based number a row had before any was dropped, for messages.
ROW = "#row"


@dataclass(frozen=True)
class Table:
    """Rows, a column after the other.

    Attributes:
        columns: name -> values, `ROW` among them.
        dropped: (column, value) of `task.drop` -> rows that were left out for it.
        values: column of `task.drop` -> the values it has.
        files: what was read: files, or the split of a hub data set.
        note: what was read in place of the split asked for; "" where that was there.
    """

    columns: dict[str, Any]
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    values: dict[str, set[str]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    note: str = ""

    def __getitem__(self, column: str) -> Any:
        return self.columns[column]

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.columns[ROW])


def load_rows(
    source: str,
    *,
    key: str,
    columns: list[str],
    drop: dict[str, list[str]] | None = None,
    splits: tuple[str, ...] = TRAINING,
    named_by: Mapping[str, str] | None = None,
    any_of: Sequence[str] = (),
    optional: Sequence[str] = (),
    renamed: Mapping[str, str] | None = None,
    as_files: bool = False,
    folder: Path | None = None,
) -> Table:
    """The rows of a source, without those that `drop` names.

    Args:
        source: a .csv, .tsv, .jsonl, .json, .parquet or .txt file (also .gz, .bz2), a folder of such files, `package://...`, or
            `hf://org/name[@revision][:config[/split]]`.
        key: the config key the source came from, for messages.
        columns: columns that must be there, and the only ones kept; a .txt file has one, `text`.
        drop: column -> values; rows with one of them are left out. Values compare as the text that the file has.
        splits: names, best first, of the split wanted of a folder or hub data set that has several.
        named_by: column -> the config key that names it, for messages.
        any_of: of these columns one has to be there; those that are not are not in the table.
        optional: columns of which none has to be there.
        renamed: what the source calls a column -> what it is called here.
        as_files: whether images of the hub stay the files they are, and classes are given by their names.
        folder: where the rows are kept in files of this process; None keeps them in memory.

    Raises:
        InputError: nothing is there, it cannot be read, it has no rows, or a column is missing.
    """
    drop, note = drop or {}, ""
    wanted = list(dict.fromkeys([*columns, *drop]))
    theirs = {new: old for old, new in (renamed or {}).items()}
    asked = list(dict.fromkeys(theirs.get(name, name) for name in wanted))
    if source.startswith("hf://"):
        names, found, split, named = _from_hub(source, key, splits, asked, as_files=as_files)
        read = (f"{source.removesuffix(f'/{split}') if named else source}, {split}",)
        pieces = iter([(names, found)])
        if split not in splits and not named:
            note = f"{key}: {source} has no {splits[0]} split; '{split}' was taken."
    else:
        files = files_of(source, key, splits)
        pieces = _of_files(files, asked, key)
        read = tuple(str(file.resolve()) for file in files)
    names, count, numbers = list[str](), 0, [np.array([], np.int64)]
    table = {name: new_column(folder) for name in dict.fromkeys(columns)}
    dropped, present = Counter[tuple[str, str]](), {column: set[str]() for column in drop}
    for known, piece in pieces:
        names, own = known, {(renamed or {}).get(name, name): values for name, values in piece.items()}
        kept = np.ones(len(next(iter(own.values()), [])), bool)
        for column, values in drop.items():
            for row, value in enumerate(map(as_text, own.get(column, []))):
                if value in values:
                    kept[row] = False
                    dropped[column, str(value)] += 1
                if value is not None:
                    present[column].add(value)
        chosen = np.flatnonzero(kept)
        for name in table.keys() & own.keys():
            table[name].extend(own[name] if kept.all() else [own[name][i] for i in chosen.tolist()])
        numbers.append(count + chosen + 1)
        count += len(kept)
    names = _renamed(source, renamed or {}, names)
    found = {name for name in wanted if name in names}
    if not count and found:
        raise InputError(f"{key}: {source} has no rows.")
    if any_of and not any(column in found for column in any_of):
        some = f"no column '{any_of[0]}'" if len(any_of) == 1 else f"none of the columns {', '.join(map(repr, any_of))}"
        where = (named_by or {}).get(any_of[0], "task")
        raise InputError(f"{where}: {source} has {some}. {hint(any_of[0], names)} Columns: {', '.join(names)}.")
    for column in wanted:
        if column not in found and column not in (*any_of, *optional):
            where = (named_by or {}).get(column, "task") if column in columns else "task.drop"
            raise InputError(f"{where}: {source} has no column '{column}'. {hint(column, names)} Columns: {', '.join(names)}.")
    at = np.concatenate(numbers)
    if not len(at):
        raise InputError(f"task.drop: drops every row of {source}.")
    rows: dict[str, Any] = {name: values for name, values in table.items() if name in found}
    rows[ROW] = at.tolist() if folder is None else at
    by_column = Counter({pair: dropped[pair] for column in drop for pair in dropped if pair[0] == column})
    return Table(rows, by_column, present, read, note)


def files_of(source: str, key: str, splits: tuple[str, ...]) -> list[Path]:
    """The files of a source that is none of the hub: of a folder those of the first split that is there.

    Raises:
        InputError: nothing is there.
    """
    path = resolve(source, key=key)
    return _files_in(path, key, splits) if path.is_dir() else [path]


def _renamed(source: str, renamed: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """The new names of all columns; `InputError` where there is no such column, or another has the new name."""
    for old, new in renamed.items():
        if old not in names:
            raise InputError(f"task.columns: {source} has no column '{old}'. {hint(old, names)} Columns: {', '.join(names)}.")
        if new in names and new not in renamed:
            raise InputError(f"task.columns: {source} has a column '{new}' beside '{old}', which is to be called so.")
    return [renamed.get(name, name) for name in names]


def joined(tables: Sequence[Table]) -> Table:
    """The rows of several sources, one after the other, which have the same columns."""
    dropped, values = Counter[tuple[str, str]](), dict[str, set[str]]()
    for table in tables:
        dropped.update(table.dropped)
        for column, present in table.values.items():
            values.setdefault(column, set()).update(present)
    columns = {name: chained([table[name] for table in tables]) for name in tables[0].columns if name != ROW}
    columns[ROW] = list(itertools.chain.from_iterable(table[ROW] for table in tables))
    note = "\n".join(table.note for table in tables if table.note)
    return Table(columns, dropped, values, tuple(file for table in tables for file in table.files), note)


def check_tables(tables: Mapping[str, Table], drop: dict[str, list[str]]) -> None:
    """`InputError` where a value of `task.drop` is in none of the tables, or two were read from the same file.

    Args:
        tables: config key of each source -> its rows.
        drop: `task.drop`.
    """
    for column, values in drop.items():
        present = set().union(*(table.values[column] for table in tables.values()))
        for value in values:
            if value not in present:
                near = hint(value, present) or f"Values: {', '.join(sorted(present)[:10])}."
                raise InputError(f"task.drop: no row has '{value}' in the column '{column}'. {near}")
    for first, second in itertools.combinations(tables, 2):
        both = set(tables[first].files) & set(tables[second].files)
        if not both:
            continue
        if first == "task.eval_source":
            raise InputError(f"{second}: {min(both)} is also in {first}, by which rates and steps are chosen, so it cannot test them.")
        size = second.replace("source", "size")
        raise InputError(
            f"{second}: {min(both)} is also in {first}, which is trained on, so it cannot be held out. Without {second}, {size} of its "
            "rows are held out."
        )


@dataclass(frozen=True)
class Taken:
    """What became of the rows of a source.

    Attributes:
        part: `training`, `held-out` or `test`.
        source: where they were read.
        rows: how many there are, but for those of `task.drop`.
        used: how many were taken.
        max_length: `task.max_length`.
        dropped: (column, value) of `task.drop` -> rows left out for it.
        left_out: examples left out because nothing is to be predicted within `max_length` tokens of them.
        cut: examples cut to `max_length`, of those that were kept.
        ends_cut: those of them that lost something to be predicted: the end.
        turns_left_out: turns of an assistant that the chat template does not show.
        others: held-out rows that are among the training rows too; test rows that are among the training or held-out rows.
        sampled: whether they were drawn of more.
    """

    part: str
    source: str
    rows: int
    used: int
    max_length: int
    dropped: dict[tuple[str, str], int] = field(default_factory=dict)
    left_out: int = 0
    cut: int = 0
    ends_cut: int = 0
    turns_left_out: int = 0
    others: int = 0
    sampled: bool = False

    def lines(self) -> list[str]:
        """For a person to read."""
        some = f"all {self.rows:,}" if self.used == self.rows else f"{self.used:,} of {self.rows:,}"
        head = f"{self.part}: {some} rows of {self.source}" + (", sampled" if self.sampled else "")
        said = [f"{count:,} more dropped ({column}: {value})" for (column, value), count in self.dropped.items()]
        if self.left_out:
            said.append(f"{self.left_out:,} left out (nothing to predict within task.max_length = {self.max_length} tokens)")
        if self.cut:
            ends = f", {self.ends_cut:,} of them without their end" if self.ends_cut else ""
            said.append(f"{self.cut:,} cut to task.max_length = {self.max_length} tokens{ends}")
        if self.turns_left_out:
            said.append(f"{self.turns_left_out:,} turns of the assistant left out (the chat template does not show them)")
        if self.others:
            said.append(f"{self.others:,} are among the training{' or held-out' if self.part == 'test' else ''} rows too")
        return ["; ".join([head, *said])]


def _split_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Split -> the names that have it as a word: `data/train-00.parquet` is of `train`."""
    words = {n: set(re.split(r"[^a-z]+", n.lower())) for n in names}
    return {s: found for s in (*TRAINING, *HELD_OUT) if (found := [n for n, w in words.items() if s in w])}


def _files_in(folder: Path, key: str, splits: tuple[str, ...]) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.is_file() and kind_of(f) is not None)
    if not files:
        raise InputError(f"{key}: the folder {folder} holds no data file ({', '.join(KINDS)}, also .gz, .bz2).")
    # Training rows must not come from a file that says it is for testing.
    by_split = _split_names(f.name for f in files)
    if by_split:
        chosen = next((by_split[s] for s in splits if s in by_split), None)
        if chosen is None:
            raise InputError(
                f"{key}: the folder {folder} holds no {splits[0]} file, only {', '.join(f.name for f in files)}; name one file."
            )
        files = [f for f in files if f.name in chosen]
    if len({kind_of(f) for f in files}) > 1:
        raise InputError(f"{key}: the folder {folder} holds files of several kinds ({', '.join(f.name for f in files)}); name one file.")
    return files


def _of_files(files: Sequence[Path], asked: Sequence[str], key: str) -> Pieces:
    """The rows of several files, one after the other; `InputError` where one lacks a column that another has."""
    names: dict[str, None] = {}
    first: set[str] | None = None
    for file in files:
        own: list[str] = []
        for own, piece in read_pieces(file, asked, key):
            yield list(names | dict.fromkeys(own)), piece
        names |= dict.fromkeys(own)
        there = set(asked) & set(own)
        first = there if first is None else first
        if there != first:
            raise InputError(
                f"{key}: the files in {file.parent} differ in their columns: '{min(there ^ first)}' is not in both {files[0].name} and "
                f"{file.name}."
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without `datasets`' own log lines: what is wrong goes into one message."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _from_hub(
    source: str, key: str, splits: tuple[str, ...], columns: Sequence[str], *, as_files: bool = False
) -> tuple[list[str], Columns, str, bool]:
    """The names of all columns, the values of those wanted, the split that was read, and whether the source names it."""
    import datasets

    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w.+-]*)(?:/([\w.+-]+))?)?", source)
    if match is None or (match[3] == "" and not match[4]):
        raise InputError(f"{key}: '{source}' is not hf://org/name[@revision][:config[/split]].")
    if Path(match[1]).exists():  # `datasets` would read that in place of the hub's
        raise InputError(
            f"{key}: '{source}': the local folder '{match[1]}' hides the hub's data set. To use the folder, give its path; to use the hub, "
            "run from another directory."
        )
    datasets.disable_progress_bars()
    try:
        with _quiet(), hub_or_cache(match[1], "dataset"):
            named: Any = (match[1], match[3]) if match[3] else (match[1],)
            found = datasets.load_dataset(*named, revision=match[2])
            split = next((s for s in ([match[4]] if match[4] else [*splits, *TRAINING]) if s in found), None)
            names = [] if split is None else list(found[split].column_names or ())
            # Its files are mapped: a damaged one shows here.
            values = {name: hub_column(found[split], name, as_files=as_files) for name in columns if name in names}
    except Exception as error:  # the hub client raises many unrelated kinds; all mean that the rows cannot be had
        raise InputError(f"{key}: cannot fetch '{source}' ({hub_reason(error)}).") from None
    if split is None:
        raise InputError(f"{key}: '{source}' has no split {match[4] or splits[0]}, only {', '.join(map(str, found))}.")
    return names, values, split, match[4] is not None
