"""Reads several files, and reports the problems of all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from hetis.formats.errors import DocumentError, Problem

T = TypeVar("T")


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
