"""Reads other tools' tables, CSV, CSV.gz and parquet, and collects their rows to measurements.

Every problem gets a clear error, and nothing is read in part: a sheet is complete and not empty.
"""

from __future__ import annotations

import csv
import gzip
import importlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hetis.formats import catalogue
from hetis.formats.errors import MAX_SHOWN, DocumentError, Problem, single_problem
from hetis.formats.files import is_packed, read_bytes, unpacking
from hetis.formats.measurements import MAX_COUNT, MAX_ROWS, MAX_SECONDS, MeasuredBy, MeasuredOp, Measurements, Table
from hetis.profiler.plausibility import roofline_seconds, unit_doubt
from hetis.solver.cluster import GpuType

MAX_BYTES = 2**30  # limit per table when unpacked
MAX_LINE_BYTES = 2**20
MAX_PROBLEMS = MAX_SHOWN + 1  # limit per table, one more than are shown: a wrong column is wrong in every row
ROW_PEAKS = 1000.0  # limit for any single row
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
# Names that the catalogue refuses because they are ambiguous; the READMEs of the tables resolve them.
_MEANT = {
    "A100": "A100-SXM-80GB",
    "H100": "H100-SXM-80GB",
    "L40S-48GB": "L40S",
    "a100-80gb": "A100-SXM-80GB",
    "h100-80gb": "H100-SXM-80GB",
    "h100-80gb-pcap": "H100-SXM-80GB",
    "a100_sxm": "A100-SXM-80GB",
    "h100_sxm": "H100-SXM-80GB",
    "l40s": "L40S",
    "a100_pcie": "A100-PCIe-80GB",
}

Value = float | int | str


@dataclass(slots=True, eq=False)
class Sheet:
    """One table as text. It collects every problem of its rows before `finish` raises.

    ``numbers`` are those of the rows in the file: the lines of a CSV, whose header is the first that is not empty.
    """

    file: str
    columns: Mapping[str, Sequence[str]]
    numbers: Sequence[int]
    problems: list[Problem] = field(default_factory=list)

    def __iter__(self) -> Iterator[SheetRow]:
        return (SheetRow(self, index) for index in range(len(next(iter(self.columns.values())))))

    def has(self, *names: str) -> bool:
        return all(name in self.columns for name in names)

    def require(self, forms: Mapping[str, Iterable[str]]) -> str:
        """Return the first of ``forms`` (name to columns) whose columns the sheet has. Raises DocumentError if there is
        none; it names the columns missing for the nearest form.
        """
        missing = {name: [column for column in columns if not self.has(column)] for name, columns in forms.items()}
        name = min(missing, key=lambda form: len(missing[form]))
        if missing[name]:
            found = ", ".join(list(self.columns)[:12])
            message = f"has no column {', '.join(missing[name])} (nearest: a table of {name}); found: {found}"
            raise DocumentError([Problem(file=self.file, path="header", message=message)])
        return name

    def finish(self) -> None:
        """Raise DocumentError if there were problems."""
        if self.problems:
            raise DocumentError(self.problems)


@dataclass(frozen=True, slots=True)
class SheetRow:
    """Typed access to one row. A wrong value reads as None after its problem is noted: importers skip the row."""

    sheet: Sheet
    index: int

    def text(self, column: str, default: str | None = None) -> str:
        """Return a value as it stands, or ``default`` if there is one and the table lacks the column."""
        if default is not None and column not in self.sheet.columns:
            return default
        return self.sheet.columns[column][self.index]

    def number(self, column: str, *, above: float | None = None, least: float = 0.0) -> float | None:
        """Return a finite number ``> above``, or ``>= least``."""
        value = self.text(column).strip()
        try:
            number = float(value)
        except ValueError:
            number = None
        if number is None or "_" in value or not value.isascii():  # Python reads 1_000, and digits of other scripts
            self.refuse(column, f"is {value!r}, expected a number")
        elif not abs(number) < float("inf"):
            self.refuse(column, f"is {value}, must be finite")
        elif above is not None and number <= above:
            self.refuse(column, f"is {value}, must be > {above:g}")
        elif above is None and number < least:
            self.refuse(column, f"is {value}, must be >= {least:g}")
        else:
            return number
        return None

    def count(self, column: str, *, least: int = 1) -> int | None:
        """Return a whole number."""
        number = self.number(column, least=least)
        if number is None:
            return None
        if not number.is_integer():
            self.refuse(column, f"is {self.text(column)}, expected a whole number")
        elif number > MAX_COUNT:
            self.refuse(column, f"is {self.text(column)}, must be <= {MAX_COUNT}")
        else:
            return int(number)
        return None

    def flag(self, column: str) -> bool | None:
        """Return true or false, written in any case, or as 1 or 0."""
        value = self.text(column).strip()
        if value.lower() not in _FLAGS:
            self.refuse(column, f"is {value!r}, expected true or false")
        return _FLAGS.get(value.lower())

    def seconds(self, column: str, *, unit_s: float) -> float | None:
        """Return a time, which the table has in units of ``unit_s`` seconds."""
        value = self.number(column, above=0.0)
        if value is not None and value * unit_s > MAX_SECONDS:
            self.refuse(column, f"is {value * unit_s:g} s, must be <= {MAX_SECONDS:g} s: check the unit")
            return None
        return None if value is None else value * unit_s

    def gpu(self, column: str) -> str | None:
        """Return the catalogue's name of a GPU."""
        text = self.text(column)
        found = catalogue_name(text)
        if found is None:
            several = _could_be(text)
            meant = f"which could be {' or '.join(several)}" if several else "no GPU of the catalogue"
            self.refuse(column, f"is {text!r}, {meant}")
        return found

    def problem(self, column: str, message: str) -> Problem:
        place = f"row {self.sheet.numbers[self.index]}: {column}"
        return Problem(file=self.sheet.file, path=place, message=message)

    def refuse(self, column: str, message: str) -> None:
        self.sheet.problems.append(self.problem(column, message))
        if len(self.sheet.problems) >= MAX_PROBLEMS:
            self.sheet.finish()


@cache
def catalogue_name(text: str) -> str | None:
    """Return the catalogue's name of a GPU as tables call it, or None if it is ambiguous or unknown."""
    gpu = catalogue.known_gpu(_MEANT.get(text, text))
    return None if gpu is None else gpu.name


@cache
def _could_be(text: str) -> tuple[str, ...]:
    """Return the GPUs that an ambiguous name may mean, or none if the name is unknown."""
    try:
        catalogue.find_gpu(text)
    except catalogue.UnknownNameError as error:
        return error.candidates if error.ambiguous else ()
    return ()


@dataclass
class _Open:
    """A table while it is being read."""

    columns: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    places: list[tuple[SheetRow, str]] = field(default_factory=list)  # row and column of each time


class Collection:
    """Rows of any number of files. `finish` makes the measurements, one for each GPU and measurer."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, MeasuredBy], dict[tuple[MeasuredOp, str], _Open]] = {}
        self._notes: dict[tuple[str, MeasuredBy], dict[str, None]] = defaultdict(dict)

    def add(
        self, gpu: str, by: MeasuredBy, op: MeasuredOp, kernel: str, row: SheetRow, time: str, /, **values: Value | None
    ) -> None:
        """Add one row, whose column ``time`` holds the time, or skip it if a value is None, whose problem is noted."""
        table = self._tables.setdefault((gpu, by), {}).setdefault((op, kernel), _Open())
        known = {name: value for name, value in values.items() if value is not None}
        if len(known) == len(values):
            for name, value in known.items():
                table.columns[name].append(value)
            table.places.append((row, time))

    def note(self, gpu: str, by: MeasuredBy, text: str) -> None:
        self._notes[gpu, by][text] = None

    def finish(self) -> list[Measurements]:
        """Return all measurements, in a fixed order. Raises DocumentError if there are times that no GPU of that type
        can reach.
        """
        problems, results = list[Problem](), list[Measurements]()
        for (gpu, by), opened in sorted(self._tables.items(), key=lambda x: (x[0][0], str(x[0][1]), x[0][1].host)):
            tables = []
            for (op, kernel), rows in sorted(opened.items()):
                if rows.places:
                    # Name the type: numpy would make objects of integers beyond 64 bits.
                    columns = {
                        name: np.array(values, np.str_) if isinstance(values[0], str) else np.array(values, np.float64)
                        for name, values in rows.columns.items()
                    }
                    tables.append(Table(op=op, kernel=kernel, columns=columns))
                    problems += _implausible(tables[-1], catalogue.find_gpu(gpu).gpu, rows.places)
            if tables:
                notes = tuple(self._notes[gpu, by])
                results.append(Measurements(gpu=gpu, provenance=by, tables=tuple(tables), notes=notes))
        if problems:
            raise DocumentError(problems)
        return results


def _implausible(table: Table, gpu: GpuType, places: Sequence[tuple[SheetRow, str]]) -> list[Problem]:
    least = roofline_seconds(table, gpu)
    if least is not None and (peaks := least / table.seconds).max() > ROW_PEAKS:
        worst = int(peaks.argmax())
        row, column = places[worst]
        times = f"{peaks[worst]:,.0f} times faster than the peaks of {gpu.name} allow"
        return [row.problem(column, f"is {table.seconds[worst]:.3g} s, {times} (limit {ROW_PEAKS:g})")]
    if doubt := unit_doubt(table, gpu):
        row, column = places[0]
        return [row.problem(column, f"{table.op}: {doubt}")]
    return []


def read_sheet(path: Path, *, check: Callable[[Sheet], None] = lambda _sheet: None) -> Sheet:
    """Return a table, read according to its file name: ``.parquet``, otherwise CSV, gzip-compressed or not.

    The sheet has the problems of rows with too many or too few values, and is without these rows. ``check`` is called
    with a sheet of the same columns without rows, before any are read. Raises DocumentError if that does, or if the
    file is unreadable, truncated, empty, too large, or parquet without a library to read it.
    """
    raw = read_bytes(path, most=MAX_BYTES)
    return _parquet(path, raw, check) if path.suffix == ".parquet" else _csv(path, _lines(path, raw), check)


def _lines(path: Path, raw: bytes) -> Iterator[str]:
    """Yield the lines of a table, which is unpacked no further than it is read."""
    label = str(path)
    if is_packed(raw, label):
        with unpacking(raw, label) as stream:
            yield from _decoded(stream, label)
        return
    yield from _decoded(io.BytesIO(raw), label)
    if raw.strip() and not raw.endswith((b"\n", b"\r")):
        # A number that lost its last digits is still a number; gzip has an end mark instead.
        message = "ends in the middle of a line and may be truncated: if it is complete, add a newline"
        raise single_problem(label, message, line=1 + raw.count(b"\n"))


def _decoded(stream: BinaryIO | gzip.GzipFile, label: str) -> Iterator[str]:
    number = offset = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise single_problem(label, f"has a line of more than {MAX_LINE_BYTES // 2**20} MiB", line=number)
        try:
            text = line.decode("utf-8" if offset else "utf-8-sig")
        except UnicodeDecodeError as error:
            where = f"byte {line[error.start]:#04x} at offset {offset + error.start}"
            raise single_problem(label, f"is not UTF-8 text ({where})") from None
        offset += len(line)
        if offset > MAX_BYTES:
            raise single_problem(label, f"is larger than {MAX_BYTES // 2**20} MiB when unpacked")
        yield text


def _csv(path: Path, lines: Iterator[str], check: Callable[[Sheet], None]) -> Sheet:
    reader = csv.reader(lines, strict=True)
    numbers, rows, ragged = list[int](), list[list[str]](), list[Problem]()
    try:
        header = [name.strip() for name in next((line for line in reader if any(map(str.strip, line))), [])]
        if not header:
            raise single_problem(str(path), "is empty")
        _refuse_twice(path, header)
        check(Sheet(str(path), dict.fromkeys(header, ()), ()))
        for row in reader:
            if len(row) == len(header):
                numbers.append(reader.line_num)
                rows.append(row)
            elif row:
                message = f"has {len(row)} values, the header {len(header)}"
                ragged.append(Problem(file=str(path), path=f"row {reader.line_num}", message=message))
            if len(rows) > MAX_ROWS:
                raise single_problem(str(path), f"has more than {MAX_ROWS:,} rows: split it")
            if len(ragged) >= MAX_PROBLEMS:
                raise DocumentError(ragged)
    except csv.Error as error:
        raise single_problem(str(path), f"is not CSV: {error}") from None
    if not rows and not ragged:
        raise single_problem(str(path), "has a header and no rows")
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return Sheet(str(path), dict(zip(header, columns, strict=True)), numbers, ragged)


def _parquet(path: Path, raw: bytes, check: Callable[[Sheet], None]) -> Sheet:
    try:
        reader: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise single_problem(
            str(path), "is a parquet table; reading it needs pyarrow (pip install 'hetis[profiler]')"
        ) from None
    try:
        file = reader.ParquetFile(io.BytesIO(raw))
        names: list[str] = file.schema_arrow.names
        num_rows: int = file.metadata.num_rows
    except Exception as error:  # pyarrow's exceptions for damaged files have no common base class
        raise _not_parquet(path, error) from None
    _refuse_twice(path, names)
    if not names or not num_rows:
        raise single_problem(str(path), "has columns and no rows")
    check(Sheet(str(path), dict.fromkeys(names, ()), ()))
    if num_rows > MAX_ROWS:
        raise single_problem(str(path), f"has {num_rows:,} rows, more than {MAX_ROWS:,}: split it")
    try:
        values = [column.to_pylist() for column in file.read().columns]
    except Exception as error:
        raise _not_parquet(path, error) from None
    texts = [["" if value is None else str(value) for value in column] for column in values]
    return Sheet(str(path), dict(zip(names, texts, strict=True)), range(1, len(texts[0]) + 1))


def _not_parquet(path: Path, error: Exception) -> DocumentError:
    return single_problem(str(path), f"is not a readable parquet table: {' '.join(str(error).split())}")


def _refuse_twice(path: Path, header: Sequence[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        message = f"has column {', '.join(twice)} more than once"
        raise DocumentError([Problem(file=str(path), path="header", message=message)])
