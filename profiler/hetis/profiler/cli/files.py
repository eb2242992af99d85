"""Files that verbs read and write: problems of all of them come together, those of outputs before the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from hetis.formats.errors import DocumentError, Problem

T = TypeVar("T")


def require_outputs(paths: Iterable[Path | None]) -> None:
    """Refuse paths that cannot be written. Paths that are None are skipped.

    Raises:
        DocumentError: with a problem for each.
    """
    problems = [
        Problem(file=str(path), message=f"cannot be written: {reason}")
        for path in paths
        if path is not None and (reason := _reason(path))
    ]
    if problems:
        raise DocumentError(problems)


def _reason(path: Path) -> str:
    if path.is_dir():
        return "is a folder, expected the name of a file"
    if not path.parent.is_dir():
        return f"no folder {path.parent}"
    return ""


def all_of(load: Callable[[Path], T], paths: Sequence[Path]) -> list[T]:
    """Return the values that ``load`` reads from all files.

    Raises:
        DocumentError: with the problems of all files.
    """
    values: list[T] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            values.append(load(path))
        except DocumentError as error:
            problems += error.problems
    if problems:
        raise DocumentError(problems)
    return values
