"""Reads other tools' tables, CSV, CSV.gz and parquet, as columns of text, with a clear error for each problem.

Nothing is read in part: a sheet is rectangular, complete and not empty.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.files import unreadable
from hetis.formats.measurements import MAX_COUNT, MAX_SECONDS

MAX_BYTES = 2**30  # per table when unpacked
MAX_PROBLEMS = 100  # per table; a wrong column is wrong in every row
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table as text. ``first_row`` is the number of the first row of data in the file (2 below a CSV header)."""

    file: str
    columns: Mapping[str, Sequence[str]]
    first_row: int

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def has(self, *names: str) -> bool:
        return all(name in self.columns for name in names)


class Rows:
    """Typed access to the rows of a sheet. Collects every problem before it raises.

    A wrong value reads as None; the importer skips its row, and `finish` then raises.
    """

    def __init__(self, sheet: Sheet) -> None:
        self.sheet = sheet
        self.problems: list[Problem] = []

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.sheet)))

    def text(self, index: int, column: str) -> str:
        return self.sheet.columns[column][index]

    def number(self, index: int, column: str, *, above: float | None = None, least: float = 0.0) -> float | None:
        """Return a finite number ``> above``, or ``>= least``."""
        value = self.text(index, column).strip()
        try:
            number = float(value)
        except ValueError:
            number = None
        if number is None or "_" in value or not value.isascii():  # Python reads 1_000, and digits of other scripts
            self.refuse(index, column, f"is {value!r}, expected a number")
            return None
        if not abs(number) < float("inf"):
            self.refuse(index, column, f"is {value}, must be finite")
            return None
        if number <= above if above is not None else number < least:
            limit = f"> {above:g}" if above is not None else f">= {least:g}"
            self.refuse(index, column, f"is {value}, must be {limit}")
            return None
        return number

    def count(self, index: int, column: str, *, least: int = 1) -> int | None:
        """Return a whole number."""
        number = self.number(index, column, least=least)
        if number is not None and not number.is_integer():
            self.refuse(index, column, f"is {self.text(index, column)}, expected a whole number")
            return None
        if number is not None and number > MAX_COUNT:
            self.refuse(index, column, f"is {self.text(index, column)}, must be <= {MAX_COUNT}")
            return None
        return None if number is None else int(number)

    def flag(self, index: int, column: str) -> bool | None:
        """Return true or false, written in any case, or as 1 or 0."""
        value = self.text(index, column).strip()
        if value.lower() not in _FLAGS:
            self.refuse(index, column, f"is {value!r}, expected true or false")
            return None
        return _FLAGS[value.lower()]

    def seconds(self, index: int, column: str, *, unit_s: float) -> float | None:
        """Return a time, which the table has in units of ``unit_s`` seconds."""
        value = self.number(index, column, above=0.0)
        if value is not None and value * unit_s > MAX_SECONDS:
            limit = f"<= {MAX_SECONDS:g} s"
            self.refuse(index, column, f"is {value * unit_s:g} s, must be {limit}: is the unit right?")
            return None
        return None if value is None else value * unit_s

    def refuse(self, index: int, column: str, message: str) -> None:
        place = f"row {self.sheet.first_row + index}: {column}"
        self.problems.append(Problem(file=self.sheet.file, path=place, message=message))
        if len(self.problems) >= MAX_PROBLEMS:
            self.finish()

    def finish(self) -> None:
        """Raise DocumentError if there were problems."""
        if self.problems:
            raise DocumentError(self.problems)


def read_sheet(path: Path) -> Sheet:
    """Return a table, read according to its file name: ``.parquet``, otherwise CSV, gzip-compressed or not.

    Raises:
        DocumentError: the file is unreadable, truncated, empty, ragged, or parquet without a library to read it.
    """
    raw = _bytes(path)
    if path.suffix == ".parquet":
        return _parquet(path, raw)
    return _csv(path, _text(path, raw))


def require(sheet: Sheet, forms: Mapping[str, Iterable[str]]) -> str:
    """Return the first of ``forms`` (name to columns) whose columns the sheet has.

    Raises:
        DocumentError: there is none; it names the columns missing for the nearest form.
    """
    missing = {name: [column for column in columns if not sheet.has(column)] for name, columns in forms.items()}
    name = min(missing, key=lambda form: len(missing[form]))
    if missing[name]:
        found = ", ".join(list(sheet.columns)[:12])
        raise DocumentError(
            [
                Problem(
                    file=sheet.file,
                    path="header",
                    message=f"has no column {', '.join(missing[name])} (nearest: a table of {name}); found: {found}",
                )
            ]
        )
    return name


def _bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise unreadable(str(path), error) from None
    if len(raw) > MAX_BYTES:
        raise single_problem(str(path), f"is larger than {MAX_BYTES // 2**20} MiB")
    return raw


def _text(path: Path, raw: bytes) -> str:
    packed = raw[:2] == b"\x1f\x8b"
    if packed:
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(raw)) as stream:
                raw = stream.read(MAX_BYTES + 1)
        except EOFError:
            raise single_problem(
                str(path), f"is truncated: its gzip stream ends after {len(raw)} bytes without an end mark"
            ) from None
        except (OSError, zlib.error) as error:
            raise single_problem(str(path), f"is damaged: {error}") from None
    elif path.suffix == ".gz":
        raise single_problem(str(path), "is not gzip-compressed, though its name ends in .gz")
    if len(raw) > MAX_BYTES:
        raise single_problem(str(path), f"is larger than {MAX_BYTES // 2**20} MiB when unpacked")
    if not packed and raw.strip() and not raw.endswith((b"\n", b"\r")):
        # A number that lost its last digits is still a number; gzip has an end mark instead.
        message = "ends in the middle of a line, as if it were cut off: if it is whole, add a line end"
        raise single_problem(str(path), message, line=1 + raw.count(b"\n"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise single_problem(str(path), f"is not UTF-8 text (offset {error.start})") from None


def _csv(path: Path, text: str) -> Sheet:
    if not text.strip():
        raise single_problem(str(path), "is empty")
    try:
        lines = [line for line in csv.reader(io.StringIO(text), strict=True) if line]
    except csv.Error as error:
        raise single_problem(str(path), f"is not CSV: {error}") from None
    header, rows = [name.strip() for name in lines[0]], lines[1:]
    _refuse_twice(path, header)
    if not rows:
        raise single_problem(str(path), "has a header and no rows")
    ragged = [
        Problem(file=str(path), path=f"row {number}", message=f"has {len(row)} values, the header {len(header)}")
        for number, row in enumerate(rows, start=2)
        if len(row) != len(header)
    ]
    if ragged:
        raise DocumentError(ragged)
    return Sheet(str(path), dict(zip(header, zip(*rows, strict=True), strict=True)), first_row=2)


def _parquet(path: Path, raw: bytes) -> Sheet:
    try:
        reader: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise single_problem(
            str(path), "is a parquet table; reading it needs pyarrow (pip install 'hetis[profiler]')"
        ) from None
    try:
        table = reader.ParquetFile(io.BytesIO(raw)).read()
        names: list[str] = table.column_names
        values = [column.to_pylist() for column in table.columns]
    except Exception as error:  # pyarrow's exceptions for damaged files have no common base class
        what = " ".join(str(error).split())
        raise single_problem(str(path), f"is not a readable parquet table: {what}") from None
    _refuse_twice(path, names)
    if not names or not values[0]:
        raise single_problem(str(path), "has columns and no rows")
    texts = [["" if value is None else str(value) for value in column] for column in values]
    return Sheet(str(path), dict(zip(names, texts, strict=True)), first_row=1)


def _refuse_twice(path: Path, header: Sequence[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        message = f"has column {', '.join(twice)} more than once"
        raise DocumentError([Problem(file=str(path), path="header", message=message)])
