"""Measured points as the tables of a Measurements file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hetis.formats.measurements import Column, MeasuredBy, MeasuredOp, Measurements, Table
from hetis.profiler.measure.points import Measured


def to_measurements(
    gpu: str, provenance: MeasuredBy, measured: Sequence[Measured], notes: Sequence[str]
) -> Measurements:
    """One table per operator and kernel, rows in the order of their sizes: the order of measuring does not matter.

    Points with cold operands and points with warm ones are tables of their own, as a fit treats them apart.
    """
    groups: dict[tuple[str, str, bool], list[Measured]] = {}  # cold ones sort first, as fits take the first table
    for found in measured:
        groups.setdefault((found.point.op, found.point.kernel, not found.sample.cold), []).append(found)
    return Measurements(
        gpu=gpu,
        provenance=provenance,
        tables=tuple(_table(op, kernel, not warm, rows) for (op, kernel, warm), rows in sorted(groups.items())),
        notes=tuple(notes),
    )


def _table(op: str, kernel: str, cold: bool, rows: list[Measured]) -> Table:
    rows = sorted(rows, key=lambda found: (tuple(found.point.texts.values()), tuple(found.point.columns.values())))
    first = rows[0].point
    columns: dict[str, Column] = {name: np.array([found.point.texts[name] for found in rows]) for name in first.texts}
    columns |= {name: np.array([float(found.point.columns[name]) for found in rows]) for name in first.columns}
    columns["seconds"] = np.array([_digits(found.sample.seconds) for found in rows])
    columns["spread"] = np.array([_digits(found.sample.spread) for found in rows])
    return Table(op=MeasuredOp(op), kernel=kernel, columns=columns, cold=cold)


def _digits(value: float) -> float:
    """Five significant digits: more would be noise."""
    return float(f"{value:.4e}")
