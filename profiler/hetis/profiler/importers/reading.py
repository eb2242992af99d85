"""Reads other tools' tables, CSV, CSV.gz and parquet, and collects their rows to measurements.

Every problem gets a clear error, and nothing is read in part: a sheet is rectangular, complete and not empty.
"""

from __future__ import annotations

import csv
import importlib
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.formats.files import decoded, read_bytes, unpacked
from hetis.formats.measurements import MAX_COUNT, MAX_SECONDS, MeasuredBy, MeasuredOp, Measurements, Table
from hetis.profiler.plausibility import roofline_seconds, unit_doubt
from hetis.solver.cluster import GpuType

MAX_BYTES = 2**30  # limit per table when unpacked
MAX_PROBLEMS = 100  # limit per table; a wrong column is wrong in every row
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
    try:
        return catalogue.find_gpu(_MEANT.get(text, text)).gpu.name
    except catalogue.UnknownNameError:
        return None


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


def read_sheet(path: Path) -> Sheet:
    """Return a table, read according to its file name: ``.parquet``, otherwise CSV, gzip-compressed or not. Raises
    DocumentError if the file is unreadable, truncated, empty, ragged, or parquet without a library to read it.
    """
    raw = read_bytes(path, most=MAX_BYTES)
    return _parquet(path, raw) if path.suffix == ".parquet" else _csv(path, _text(path, raw))


def _text(path: Path, raw: bytes) -> str:
    content = unpacked(raw, str(path), most=MAX_BYTES)
    text = decoded(content, str(path))
    if content is raw and raw.strip() and not raw.endswith((b"\n", b"\r")):
        # A number that lost its last digits is still a number; gzip has an end mark instead.
        message = "ends in the middle of a line and may be truncated: if it is complete, add a newline"
        raise single_problem(str(path), message, line=1 + raw.count(b"\n"))
    return text


def _csv(path: Path, text: str) -> Sheet:
    if not text.strip():
        raise single_problem(str(path), "is empty")
    try:
        reader = csv.reader(io.StringIO(text), strict=True)
        lines = [(reader.line_num, line) for line in reader if line]
    except csv.Error as error:
        raise single_problem(str(path), f"is not CSV: {error}") from None
    header = [name.strip() for name in lines[0][1]]
    numbers, rows = [number for number, _ in lines[1:]], [row for _, row in lines[1:]]
    _refuse_twice(path, header)
    if not rows:
        raise single_problem(str(path), "has a header and no rows")
    ragged = [
        Problem(file=str(path), path=f"row {number}", message=f"has {len(row)} values, the header {len(header)}")
        for number, row in zip(numbers, rows, strict=True)
        if len(row) != len(header)
    ]
    if ragged:
        raise DocumentError(ragged)
    return Sheet(str(path), dict(zip(header, zip(*rows, strict=True), strict=True)), numbers)


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
    return Sheet(str(path), dict(zip(names, texts, strict=True)), range(1, len(texts[0]) + 1))


def _refuse_twice(path: Path, header: Sequence[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        message = f"has column {', '.join(twice)} more than once"
        raise DocumentError([Problem(file=str(path), path="header", message=message)])
