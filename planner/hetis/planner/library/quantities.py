"""Quantities as programs give them: numbers in seconds and ratios, or the texts that the command line takes."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

from hetis.formats.units import parse_duration, parse_ratio
from hetis.solver.errors import InvalidProblemError

Quantity = float | str
Name = TypeVar("Name", bound=StrEnum)


def member(names: type[Name], text: str, what: str) -> Name:
    """The name that the text says.

    Raises:
        InvalidProblemError: there is none such.
    """
    try:
        return names(text)
    except ValueError:
        raise InvalidProblemError(f"unknown {what} {text!r}, expected one of {', '.join(names)}") from None


def seconds_of(value: Quantity) -> float:
    """Seconds of ``0.2`` or ``"200ms"``.

    Raises:
        InvalidProblemError: it is no duration above zero.
    """
    try:
        seconds = parse_duration(value) if isinstance(value, str) else float(value)
    except ValueError as error:
        raise InvalidProblemError(str(error)) from None
    if not seconds > 0:
        raise InvalidProblemError(f"a duration is {value}, must be > 0")
    return seconds


def limit_of(value: Quantity | None) -> float | None:
    """Seconds of a latency limit, infinite where it is lifted; None asks for the default of the objective.

    Raises:
        InvalidProblemError: it is no duration above zero.
    """
    if value is None:
        return float("inf")
    if isinstance(value, str) and value.strip().lower() in ("none", "default"):
        return float("inf") if value.strip().lower() == "none" else None
    return seconds_of(value)


def ratio_of(value: Quantity) -> float:
    """A ratio of ``0.01`` or ``"1%"``.

    Raises:
        InvalidProblemError: it is none.
    """
    try:
        return parse_ratio(value) if isinstance(value, str) else float(value)
    except ValueError as error:
        raise InvalidProblemError(str(error)) from None
