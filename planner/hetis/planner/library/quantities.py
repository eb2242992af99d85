"""Quantities from programs: numbers in seconds and ratios, or texts as on the command line."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from hetis.formats.units import parse_duration, parse_ratio
from hetis.solver.errors import InvalidProblemError

Quantity = float | str
Name = TypeVar("Name", bound=StrEnum)


def member(names: type[Name], text: str, what: str) -> Name:
    """Return the member of ``names`` with this text.

    Raises:
        InvalidProblemError: there is none.
    """
    try:
        return names(text)
    except ValueError:
        raise InvalidProblemError(f"unknown {what} {text!r}, expected one of {', '.join(names)}") from None


def seconds_of(value: Quantity) -> float:
    """Return the seconds of ``0.2`` or ``"200ms"``.

    Raises:
        InvalidProblemError: it is not a positive duration.
    """
    try:
        seconds = parse_duration(value) if isinstance(value, str) else float(value)
    except ValueError as error:
        raise InvalidProblemError(str(error)) from None
    if not seconds > 0:
        raise InvalidProblemError(f"a duration is {value}, must be > 0")
    return seconds


def limit_of(value: Quantity | None) -> float | None:
    """Return the seconds of a latency limit, infinity for no limit, or None for the objective's default.

    Raises:
        InvalidProblemError: it is not a positive duration.
    """
    if value is None:
        return float("inf")
    if isinstance(value, str) and value.strip().lower() in ("none", "default"):
        return float("inf") if value.strip().lower() == "none" else None
    return seconds_of(value)


def ratio_of(value: Quantity) -> float:
    """Return the ratio of ``0.01`` or ``"1%"``.

    Raises:
        InvalidProblemError: it is not a ratio.
    """
    try:
        return parse_ratio(value) if isinstance(value, str) else float(value)
    except ValueError as error:
        raise InvalidProblemError(str(error)) from None
