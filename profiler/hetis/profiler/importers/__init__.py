"""Converts other tools' tables to measurements: ``import_tables("vidur", [path, ...])``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hetis.formats.errors import DocumentError, Problem
from hetis.formats.measurements import Measurements
from hetis.profiler.importers import aiconfigurator, simulators
from hetis.profiler.importers.reading import Collection, Sheet, read_sheet

_IMPORTERS: Mapping[str, Callable[[Sheet, Collection], None]] = {
    "aiconfigurator": aiconfigurator.read,
    "vidur": simulators.read_vidur,
    "splitwise": simulators.read_splitwise,
    "llmservingsim": simulators.read_llmservingsim,
}
FORMATS = tuple(_IMPORTERS)


def import_tables(form: str, files: Sequence[str | Path]) -> list[Measurements]:
    """Return the measurements of all ``files`` together: one per GPU, engine, version and host, in a fixed order.
    Raises DocumentError with every problem of every file (file, row, column, value and limit); nothing is returned in
    part. ``form`` is one of `FORMATS`.
    """
    collection, problems, has_more, read = Collection(), list[Problem](), False, _IMPORTERS[form]
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
