"""How rows are read from a file: values as they are written, whatever they look like and wherever in the file that changes.

Nothing is guessed: a cell of a CSV or TSV file is text, a number of a JSON file keeps its digits (`WrittenNumber`), and a Parquet column
has the type that the file says. `as_text` is how a task reads a text or a label from any of them.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import itertools
import lzma
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import InputError
from ..weights.checkpoint import parse_json
from .columns import AT_ONCE

KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open}
_UNREADABLE = (OSError, EOFError, ValueError, csv.Error, zlib.error, lzma.LZMAError, RecursionError)

Columns = dict[str, list[Any]]
Pieces = Iterator[tuple[list[str], Columns]]


class WrittenNumber(float):
    """A number of a JSON file that, as text, is what the file says: 1.0 stays "1.0", and 1e3 "1e3"."""

    text: str

    def __new__(cls, text: str) -> WrittenNumber:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


def as_text(value: Any) -> str | None:
    """A cell as text, as the file has it; None for a value that is no text: bytes that are not UTF-8, a list, a mapping.

    >>> as_text("01"), as_text(WrittenNumber("1.0")), as_text(True), as_text(b"caf\\xc3\\xa9"), as_text([1])
    ('01', '1.0', 'true', 'café', None)
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    return None if value is None or isinstance(value, list | dict) else str(value)


def kind_of(path: Path) -> str | None:
    """`.csv` of both `a.csv` and `a.csv.gz`; None where it is no kind of data file."""
    name = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return name.suffix.lower() if name.suffix.lower() in KINDS else None


def read_pieces(path: Path, columns: Sequence[str], key: str) -> Pieces:
    """Some rows after the others: the names of all columns so far, and the values of those wanted.

    A row of a JSON file that lacks a key has None there, also of a key that no row has; other files give no column that they have not.

    Args:
        path: a file of one of `KINDS`, also compressed (.gz, .bz2).
        columns: which are wanted.
        key: the config key the path came from, for messages.

    Yields:
        At least once. Columns are no longer than `AT_ONCE`.

    Raises:
        InputError: not a kind of data file, or it cannot be read whole: the message names the file and the line.
    """
    kind = kind_of(path)
    if kind is None:
        raise InputError(f"{key}: {path.name}: cannot tell what kind of file this is. Known: {', '.join(KINDS)}, also .gz, .bz2.")
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            start = file.read(4)
            if not start:
                raise InputError(f"{key}: {path} is empty.")
            file.seek(0)
            if kind == ".parquet":
                yield from _parquet(io.BytesIO(file.read()) if path.suffix.lower() in _OPENERS else file, columns)
                return
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")  # pyright: ignore[reportArgumentType]
            read = {".csv": _csv, ".tsv": _tsv, ".jsonl": _json_lines, ".json": _json, ".txt": _lines}[kind]
            yield from read(text, columns, f"{key}: {path}")
    except InputError:
        raise
    except _UNREADABLE as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise InputError(f"{key}: cannot read {path} as {kind[1:]}: {reason}") from None


def _csv(file: IO[str], columns: Sequence[str], where: str) -> Pieces:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(file, strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        begins = 1
        try:
            for fields in reader:
                yield begins, fields
                begins = reader.line_num + 1
        except csv.Error as error:
            reason = f"the row at line {begins} is broken ({error}): is there a stray quotation mark?"
            raise InputError(f"{where}: {reason}") from None

    return _table(rows(), columns, where)


def _tsv(file: IO[str], columns: Sequence[str], where: str) -> Pieces:
    """Tabs part fields and line ends rows. Quotation marks around a whole field are its quoting, any others are its text."""

    def field(text: str) -> str:
        inner = text[1:-1]
        quoted = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in inner.replace('""', "")
        return inner.replace('""', '"') if quoted else text

    rows = (line.rstrip("\r\n") for line in file)
    return _table(((n, [field(f) for f in row.split("\t")] if row else []) for n, row in enumerate(rows, 1)), columns, where)


def _table(rows: Iterator[tuple[int, list[str]]], columns: Sequence[str], where: str) -> Pieces:
    """Columns of (line, fields), the first being the header; blank lines are passed over."""
    header: list[str] = next((fields for _, fields in rows if fields), [])
    if not header:
        raise InputError(f"{where} has no columns.")
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise InputError(f"{where}: two columns are called '{twice}'.")
    wanted = {name: header.index(name) for name in columns if name in header}
    filled = ((line, fields) for line, fields in rows if fields)
    for piece in _cut(filled):
        found: Columns = {name: [] for name in wanted}
        for line, fields in piece:
            if len(fields) != len(header):
                raise InputError(f"{where}: line {line} has {len(fields)} fields, and the header names {len(header)} columns.")
            for name, place in wanted.items():
                found[name].append(fields[place])
        yield header, found


def _cut(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """At most `AT_ONCE` rows at a time; at least one list, which may be empty."""
    piece = list(itertools.islice(rows, AT_ONCE))
    while True:
        yield piece
        if not (piece := list(itertools.islice(rows, AT_ONCE))):
            return


def _json_lines(file: IO[str], columns: Sequence[str], where: str) -> Pieces:
    def rows() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", _parse(line)
                except ValueError as error:
                    raise InputError(f"{where}: line {number} is not JSON: {error}.") from None

    return _objects(rows(), columns, where)


def _json(file: IO[str], columns: Sequence[str], where: str) -> Pieces:
    """A list of objects; or objects one a line, as some files of this name have them."""
    if file.read(4096).lstrip()[:1] == "{":
        file.seek(0)
        return _json_lines(file, columns, where)
    file.seek(0)
    return _objects(((f"entry {number}", entry) for number, entry in enumerate(_parse(file.read()), 1)), columns, where)


def _objects(rows: Iterator[tuple[str, Any]], columns: Sequence[str], where: str) -> Pieces:
    names: dict[str, None] = {}
    for piece in _cut(rows):
        found: Columns = {name: [] for name in columns}
        for place, row in piece:
            if not isinstance(row, dict):
                raise InputError(f"{where}: {place} is a {type(row).__name__}, not an object with a value for each column.")
            names |= dict.fromkeys(row)
            for name, values in found.items():
                values.append(row.get(name))
        yield list(names), found


def _parse(text: str) -> Any:
    return parse_json(text, parse_float=WrittenNumber, parse_constant=WrittenNumber)


def _lines(file: IO[str], columns: Sequence[str], where: str) -> Pieces:
    for piece in _cut(line.rstrip("\r\n") for line in file):
        yield ["text"], {"text": piece} if "text" in columns else {}


def _parquet(file: Any, columns: Sequence[str]) -> Pieces:
    import pyarrow.compute
    import pyarrow.parquet  # takes a while to import, and few files are of this kind

    whole = pyarrow.parquet.ParquetFile(file)
    names = whole.schema_arrow.names
    wanted = [name for name in columns if name in names]
    empty = whole.schema_arrow.empty_table().select(wanted)
    batches = itertools.chain((pyarrow.Table.from_batches([b]) for b in whole.iter_batches(AT_ONCE, columns=wanted)), [empty])
    for table in batches:
        found: Columns = {}
        for name in table.column_names:
            column = table.column(name)
            if pyarrow.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            plain = pyarrow.types.is_temporal(column.type) or pyarrow.types.is_decimal(column.type)
            values = (pyarrow.compute.cast(column, pyarrow.string()) if plain else column).to_pylist()
            if pyarrow.types.is_float32(column.type):  # 0.1, and not the 0.10000000149011612 that is nearest to it
                values = [None if value is None else WrittenNumber(str(np.float32(value))) for value in values]
            found[name] = values
        yield names, found


def hub_column(rows: Any, name: str, *, as_files: bool) -> list[Any]:
    """A column of a data set of `datasets`."""
    import datasets

    feature = rows.features[name]
    if as_files and isinstance(feature, datasets.Image):
        return list(rows.cast_column(name, datasets.Image(decode=False))[name])
    if as_files and isinstance(feature, datasets.ClassLabel):
        return [None if value is None or value < 0 else feature.int2str(value) for value in rows[name]]
    return list(rows[name])
