"""Rows from a file, a folder or the hub, through `datasets`: no dataset scripts, and no hub contact for what is local."""

from __future__ import annotations

import bz2
import gzip
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..config.errors import InputError, hint
from ..config.locations import resolve

if TYPE_CHECKING:
    from datasets import Dataset

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open}


def load_rows(source: str, *, key: str, columns: list[str], drop: dict[str, list[str]] | None = None) -> Dataset:
    """The rows of a source, without those that `drop` names.

    Args:
        source: a .csv, .tsv, .jsonl, .json, .parquet or .txt file (also .gz, .bz2), a folder of such files, `package://...`, or
            `hf://org/name[@revision]` (its `train` split).
        key: the config key the source came from, for messages.
        columns: columns that must be there; a .txt file has one, `text`.
        drop: column -> values; rows with one of them are left out.

    Raises:
        InputError: nothing is there, it cannot be read, it has no rows, or a column is missing.
    """
    import datasets

    datasets.disable_progress_bars()
    if source.startswith("hf://"):
        rows = _from_hub(source, key)
    else:
        path = resolve(source, key=key)
        files = _files_in(path, key) if path.is_dir() else [path]
        rows = datasets.concatenate_datasets([_from_file(f, key) for f in files]) if len(files) > 1 else _from_file(files[0], key)
    drop = drop or {}
    for column in [*columns, *drop]:
        if column not in rows.column_names:
            wanted = "task.drop" if column not in columns else "task"
            raise InputError(f"{wanted}: {source} has no column '{column}'. {hint(column, rows.column_names)} Columns: {', '.join(rows.column_names)}.")
    if rows.num_rows == 0:
        raise InputError(f"{key}: {source} has no rows.")
    if drop:
        keep = [i for i in range(rows.num_rows)]
        for column, values in drop.items():
            found = rows[column]
            keep = [i for i in keep if str(found[i]) not in values]
        if not keep:
            raise InputError(f"task.drop: leaves no row of {source}.")
        rows = rows.select(keep)
    return rows


def _files_in(folder: Path, key: str) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if _kind(f) is not None)
    if not files:
        raise InputError(f"{key}: the folder {folder} holds no data file ({', '.join(_BUILDERS)}, also .gz, .bz2).")
    if len({_kind(f) for f in files}) > 1:
        raise InputError(f"{key}: the folder {folder} holds files of several kinds; name one file.")
    return files


def _kind(path: Path) -> str | None:
    suffixes = [s for s in path.suffixes if s.lower() not in _OPENERS]
    return suffixes[-1].lower() if suffixes and suffixes[-1].lower() in _BUILDERS else None


def _from_file(path: Path, key: str) -> Dataset:
    import datasets

    kind = _kind(path)
    if kind is None:
        raise InputError(f"{key}: {path.name}: cannot tell what kind of file this is. Known: {', '.join(_BUILDERS)}, also .gz, .bz2.")
    # A cache of its own, gone afterwards: a file that changed under the same name is read anew.
    with tempfile.TemporaryDirectory() as scratch:
        try:
            plain = path
            if path.suffix.lower() in _OPENERS:
                plain = Path(scratch) / f"plain{kind}"
                with _OPENERS[path.suffix.lower()](path, "rb") as packed, plain.open("wb") as out:
                    shutil.copyfileobj(packed, out)
            if plain.stat().st_size == 0:
                raise InputError(f"{key}: {path} is empty.")
            options = {"sep": "\t"} if kind == ".tsv" else {}
            if _BUILDERS[kind] == "csv":
                options |= {"keep_default_na": False}  # the text "NA" is a text
            loaded = datasets.load_dataset(
                _BUILDERS[kind], data_files={"train": str(plain)}, split="train", cache_dir=f"{scratch}/cache", keep_in_memory=True, **options
            )
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:  # datasets, pyarrow, pandas and zlib raise many kinds for a damaged file
            cause = error.__cause__ or error
            reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)[:200]
            if "EmptyDataError" in type(cause).__name__ or "No columns to parse" in reason:
                raise InputError(f"{key}: {path} has no columns.") from None
            raise InputError(f"{key}: cannot read {path} as {kind[1:]}: {reason}") from None
    return loaded


def _from_hub(source: str, key: str) -> Dataset:
    import datasets

    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", source)
    if match is None:
        raise InputError(f"{key}: '{source}' is not hf://org/name[@revision].")
    try:
        return datasets.load_dataset(match[1], revision=match[2], split="train")
    except Exception as error:  # the hub client raises many unrelated kinds; all mean that the rows cannot be had
        raise InputError(f"{key}: cannot fetch '{source}' ({next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]}).") from None
