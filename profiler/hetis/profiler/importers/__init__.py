"""Converts other tools' tables to measurements: ``import_tables("aiconfigurator", [path, ...])``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hetis.formats.errors import DocumentError, Problem
from hetis.formats.measurements import Measurements
from hetis.profiler.importers import aiconfigurator
from hetis.profiler.importers.reading import Collection, Sheet, read_sheet

TableReader = Callable[[Sheet, Collection], None]
READERS: Mapping[str, TableReader] = {"aiconfigurator": aiconfigurator.read}  # by the tool that made the tables


def import_tables(
    form: str, files: Sequence[str | Path], *, readers: Mapping[str, TableReader] = READERS
) -> list[Measurements]:
    """Return the measurements of all ``files`` together: one per GPU, engine, version and host, in a fixed order.
    Raises DocumentError with every problem of every file (file, row, column, value and limit); nothing is returned in
    part. ``form`` is one of the ``readers``.
    """
    collection, problems, has_more, read = Collection(), list[Problem](), False, readers[form]
    for file in files:
        try:
            sheet = read_sheet(Path(file), check=lambda without_rows: read(without_rows, Collection()))
            read(sheet, collection)
            sheet.finish()
        except DocumentError as error:
            problems += error.problems
            has_more |= error.has_more
    if problems:
        raise DocumentError(problems, has_more=has_more)
    measurements = collection.finish()
    if not measurements:
        raise DocumentError([Problem(file=str(file), message="has no row that hetis can use") for file in files])
    return measurements
