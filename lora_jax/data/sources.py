"""Rows from a file, a folder or the hub, through `datasets`: no dataset scripts, and no network for what is local."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, hint
from ..weights.locations import resolve

if TYPE_CHECKING:
    from datasets import Dataset

_KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open}
# What a split is called in file names and on the hub; the first that is there is taken.
TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
# Column added to all rows: the 1-based number a row had before any was dropped, for messages.
ROW = "#row"


def load_rows(
    source: str, *, key: str, columns: list[str], drop: dict[str, list[str]] | None = None, splits: tuple[str, ...] = TRAINING
) -> Dataset:
    """The rows of a source, without those that `drop` names.

    Args:
        source: a .csv, .tsv, .jsonl, .json, .parquet or .txt file (also .gz, .bz2), a folder of such files, `package://...`, or
            `hf://org/name[@revision]`.
        key: the config key the source came from, for messages.
        columns: columns that must be there, and the only ones kept; a .txt file has one, `text`.
        drop: column -> values; rows with one of them are left out. Values compare as text.
        splits: names, best first, of the split wanted of a folder or hub data set that has several.

    Returns:
        A data set in memory with `columns` and `ROW`.

    Raises:
        InputError: nothing is there, it cannot be read, it has no rows, or a column is missing.
    """
    import datasets  # here, not above: it takes seconds to import

    datasets.disable_progress_bars()
    if source.startswith("hf://"):
        rows = _from_hub(source, key, splits)
    else:
        path = resolve(source, key=key)
        rows = _joined([_from_file(f, key) for f in _files_in(path, key, splits)], path, key) if path.is_dir() else _from_file(path, key)
    if rows.num_rows == 0:
        raise InputError(f"{key}: {source} has no rows.")
    drop = drop or {}
    for column in [*columns, *drop]:
        if column not in rows.column_names:
            wanted = "task" if column in columns else "task.drop"
            raise InputError(
                f"{wanted}: {source} has no column '{column}'. {hint(column, rows.column_names)} Columns: {', '.join(rows.column_names)}."
            )
    kept = np.ones(rows.num_rows, bool)
    for column, values in drop.items():
        kept &= ~np.isin(np.array([str(v) for v in rows[column][:]]), values)
    if not kept.any():
        raise InputError(f"task.drop: leaves no row of {source}.")
    numbered = rows.select_columns(list(dict.fromkeys(columns))).add_column(ROW, np.arange(1, len(kept) + 1))
    return numbered if kept.all() else numbered.select(np.flatnonzero(kept), keep_in_memory=True)


def _kind(path: Path) -> str | None:
    """`.csv` of both `a.csv` and `a.csv.gz`; None where it is no kind of data file."""
    name = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return name.suffix.lower() if name.suffix.lower() in _KINDS else None


def _split_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Split -> the names that have it as a word: `data/train-00.parquet` is of `train`."""
    words = {n: set(re.split(r"[^a-z]+", n.lower())) for n in names}
    return {s: found for s in (*TRAINING, *HELD_OUT) if (found := [n for n, w in words.items() if s in w])}


def _files_in(folder: Path, key: str, splits: tuple[str, ...]) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.is_file() and _kind(f) is not None)
    if not files:
        raise InputError(f"{key}: the folder {folder} holds no data file ({', '.join(_KINDS)}, also .gz, .bz2).")
    # Training rows must not come from a file that says it is for testing.
    by_split = _split_names(f.name for f in files)
    if by_split:
        chosen = next((by_split[s] for s in splits if s in by_split), None)
        if chosen is None:
            raise InputError(
                f"{key}: the folder {folder} holds no {splits[0]} file, only {', '.join(f.name for f in files)}; name one file."
            )
        files = [f for f in files if f.name in chosen]
    if len({_kind(f) for f in files}) > 1:
        raise InputError(f"{key}: the folder {folder} holds files of several kinds ({', '.join(f.name for f in files)}); name one file.")
    return files


def _joined(parts: list[Dataset], folder: Path, key: str) -> Dataset:
    import datasets

    try:
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except ValueError as error:
        raise InputError(f"{key}: the files in {folder} differ in their columns ({_first_line(error)}); name one file.") from None


def _from_file(path: Path, key: str) -> Dataset:
    kind = _kind(path)
    if kind is None:
        raise InputError(f"{key}: {path.name}: cannot tell what kind of file this is. Known: {', '.join(_KINDS)}, also .gz, .bz2.")
    # A cache of its own, gone afterwards: a file that changed under the same name is read anew, and nothing is left behind.
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        try:
            plain = path
            if path.suffix.lower() in _OPENERS:
                plain = Path(scratch) / f"plain{kind}"
                with _OPENERS[path.suffix.lower()](path, "rb") as packed, plain.open("wb") as out:
                    shutil.copyfileobj(packed, out)
            if plain.stat().st_size == 0:
                raise InputError(f"{key}: {path} is empty.")
            rows = _read(plain, kind, cache_dir=f"{scratch}/cache", keep_in_memory=True)
        except InputError:
            raise
        except Exception as error:  # datasets, pyarrow, pandas and zlib raise many kinds for a damaged file
            cause = error.__cause__ or error
            if "corresponds to no data" in str(error):
                raise InputError(f"{key}: {path} has no rows.") from None
            if "No columns to parse" in str(cause):
                raise InputError(f"{key}: {path} has no columns.") from None
            raise InputError(f"{key}: cannot read {path} as {kind[1:]}: {_first_line(cause)}") from None
    if "__index_level_0__" in rows.column_names:  # pandas took the first field of each row for an index and shifted the rest
        raise InputError(f"{key}: {path}: the rows have more fields than the header has columns.")
    return rows


def _read(path: Path, kind: str, **options: Any) -> Dataset:
    """Through the readers, not `datasets.load_dataset`: that one reports each use, of a local file too, to a server."""
    from datasets import Dataset

    if kind == ".parquet":
        return Dataset.from_parquet(str(path), **options)  # type: ignore[return-value]
    if kind == ".txt":
        return Dataset.from_text(str(path), encoding="utf-8-sig", **options)  # type: ignore[return-value]
    if kind in (".json", ".jsonl"):
        return Dataset.from_json(str(path), **options)  # type: ignore[return-value]
    # keep_default_na: the text "NA" is a text.
    return Dataset.from_csv(str(path), sep="\t" if kind == ".tsv" else ",", keep_default_na=False, **options)  # type: ignore[return-value]


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


def _from_hub(source: str, key: str, splits: tuple[str, ...]) -> Dataset:
    import datasets

    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if match is None:
        raise InputError(f"{key}: '{source}' is not hf://org/name[@revision].")
    try:
        with _quiet():
            found = datasets.load_dataset(match[1], revision=match[2])
    except Exception as error:  # the hub client raises many unrelated kinds; all mean that the rows cannot be had
        raise InputError(f"{key}: cannot fetch '{source}' ({_first_line(error)}).") from None
    split = next((s for s in (*splits, *TRAINING) if s in found), None)
    if split is None:
        raise InputError(f"{key}: '{source}' has no split {splits[0]}, only {', '.join(map(str, found))}.")
    return found[split]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
