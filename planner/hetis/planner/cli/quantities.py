"""Option values with units: ``--ttft 500ms``, ``--tpot none``, ``--gap 0.5%``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import typer

NO_LIMIT = float("inf")


MOST_BARE_S = {"TTFT": 60.0, "TPOT": 2.0}
"""A number without a unit is in seconds; from this value on, milliseconds were probably meant."""


def ttft_limit(text: str) -> float:
    """Parse a limit of the time to first token in seconds; `NO_LIMIT` for ``none``."""
    return _limit(text, "TTFT")


def tpot_limit(text: str) -> float:
    """Parse a limit of the time per output token in seconds; `NO_LIMIT` for ``none``."""
    return _limit(text, "TPOT")


def _limit(text: str, name: str) -> float:
    if text.strip().lower() == "none":
        return NO_LIMIT
    seconds = positive_duration(text)
    if seconds >= MOST_BARE_S[name] and not text.strip()[-1].isalpha():
        raise typer.BadParameter(f"a {name} limit of {text} has no unit: {text}ms or {text}s?")
    return seconds


def positive_duration(text: str) -> float:
    """Parse seconds: ``50ms``, ``2s``, ``2``."""
    from hetis.formats.units import parse_duration

    return _positive(_parsed(parse_duration, text), text)


def ratio(text: str) -> float:
    """Parse a ratio: ``0.5%`` or ``0.005``."""
    from hetis.formats.units import parse_ratio

    return _parsed(parse_ratio, text)


def share(text: str) -> float:
    """Parse a ratio above 0 and up to 1."""
    value = ratio(text)
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{text!r} is out of range, must be above 0 and at most 100%")
    return value


def error(text: str) -> float:
    """Parse a relative error from 0 to below 1: at 1, work could take no time."""
    value = ratio(text)
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text!r} is out of range, must be at least 0% and below 100%")
    return value


def prefix_hit_rate(text: str) -> float | Literal["trace"]:
    """Parse a share of prompt tokens below 1: ``0.4`` or ``40%``; or ``trace``."""
    if text.strip().lower() == "trace":
        return "trace"
    value = ratio(text)
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{text!r} is out of range, must be at least 0% and below 100%, or trace")
    return value


def size(text: str) -> int:
    """Parse bytes: ``10GiB``."""
    from hetis.formats.units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def bandwidth(text: str) -> float:
    """Parse bytes per second above zero: ``100Gbps`` or ``2GB/s``."""
    from hetis.formats.units import parse_bandwidth

    return _positive(_parsed(parse_bandwidth, text), text)


def rate(text: str) -> float:
    """Parse requests per second, above zero."""
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number of requests per second") from None
    return _positive(value, text)


def _parsed(parse: Callable[[str], float], text: str) -> float:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _positive(value: float, text: str) -> float:
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"{text!r} is out of range, must be above zero and finite")
    return value
