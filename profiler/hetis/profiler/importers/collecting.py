"""Collects rows into measurements, one per GPU and engine, after checking that all times are physically possible."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from hetis.formats import catalogue
from hetis.formats.errors import DocumentError, Problem
from hetis.formats.measurements import Column, MeasuredBy, MeasuredOp, Measurements, Table
from hetis.profiler.importers.reading import Rows
from hetis.profiler.plausibility import unit_doubt
from hetis.profiler.work import roofline_seconds
from hetis.solver.cluster import GpuType

Value = float | int | str

ROW_PEAKS = 1000.0  # limit for any single row


@dataclass
class _Open:
    """A table while it is being read."""

    columns: dict[str, list[Value]] = field(default_factory=lambda: defaultdict(list))
    places: list[tuple[Rows, int, str]] = field(default_factory=list)

    def problem(self, row: int, message: str) -> Problem:
        rows, index, column = self.places[row]
        return Problem(file=rows.sheet.file, path=f"row {rows.sheet.first_row + index}: {column}", message=message)


class Collection:
    """Rows of any number of files. `finish` makes the measurements."""

    def __init__(self) -> None:
        self._tables: dict[tuple[str, MeasuredBy], dict[tuple[MeasuredOp, str], _Open]] = {}
        self._notes: dict[tuple[str, MeasuredBy], dict[str, None]] = defaultdict(dict)

    def add(
        self, gpu: str, by: MeasuredBy, op: MeasuredOp, kernel: str, row: tuple[Rows, int, str],
        values: Mapping[str, Value | None],
    ) -> None:  # fmt: skip
        """Add one row, or skip it if a value is None, whose problem is recorded already.

        Args:
            row: the rows it comes from, its index there, and the column that holds the time.
        """
        table = self._tables.setdefault((gpu, by), {}).setdefault((op, kernel), _Open())
        if any(value is None for value in values.values()):
            return
        for name, value in values.items():
            assert value is not None
            table.columns[name].append(value)
        table.places.append(row)

    def note(self, gpu: str, by: MeasuredBy, text: str) -> None:
        self._notes[gpu, by][text] = None

    def finish(self) -> list[Measurements]:
        """Return all measurements, in a fixed order.

        Raises:
            DocumentError: there are times that no GPU of that type can reach.
        """
        problems: list[Problem] = []
        results = []
        for (gpu, by), tables in sorted(
            self._tables.items(), key=lambda item: (item[0][0], str(item[0][1]), item[0][1].host)
        ):
            made = []
            for (op, kernel), opened in sorted(tables.items()):
                if not opened.places:
                    continue
                table = Table(op=op, kernel=kernel, columns={n: _array(c) for n, c in opened.columns.items()})
                problems += _implausible(table, catalogue.find_gpu(gpu).gpu, opened)
                made.append(table)
            if made:
                results.append(
                    Measurements(gpu=gpu, provenance=by, tables=tuple(made), notes=tuple(self._notes[gpu, by]))
                )
        if problems:
            raise DocumentError(problems)
        return results


def _array(values: list[Value]) -> Column:
    # Specify types: numpy would make objects of integers beyond 64 bits.
    if isinstance(values[0], str):
        return np.array(values, dtype=np.str_)
    return np.array(values, dtype=np.float64)


def _implausible(table: Table, gpu: GpuType, opened: _Open) -> list[Problem]:
    least = roofline_seconds(table, gpu)
    if least is not None and (peaks := least / table.seconds).max() > ROW_PEAKS:
        worst = int(peaks.argmax())
        times = f"{peaks[worst]:,.0f} times faster than the peaks of {gpu.name} allow"
        return [opened.problem(worst, f"is {table.seconds[worst]:.3g} s, {times} (limit {ROW_PEAKS:g})")]
    if doubt := unit_doubt(table, gpu):
        return [opened.problem(0, f"{table.op}: {doubt}")]
    return []
