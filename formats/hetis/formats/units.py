"""Quantities as people write them: ``80GiB``, ``100Gbps``, ``20us``, ``312TFLOPS``, ``0.5%``.

Parsing is exact: the decimal number is scaled as a fraction and rounded to a float once. Formatting picks the shortest
text that parses back to the identical value, so files round-trip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from fractions import Fraction

# Binary prefixes (Ki, Mi, ...) are powers of 1024, decimal ones (K, M, ...) powers of 1000: 80GB is 7% less than 80GiB.
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}

BYTE_UNITS: dict[str, Fraction] = {f"{prefix}B": Fraction(size) for prefix, size in (_DECIMAL | _BINARY).items()}
BANDWIDTH_UNITS: dict[str, Fraction] = {f"{prefix}bps": Fraction(size, 8) for prefix, size in _DECIMAL.items()} | {
    f"{unit}/s": size for unit, size in BYTE_UNITS.items()
}
_PER_SECOND = {"ns": 10**9, "us": 10**6, "ms": 10**3, "s": 1}
DURATION_UNITS = {unit: Fraction(1, number) for unit, number in _PER_SECOND.items()}
DURATION_UNITS |= {"min": Fraction(60), "h": Fraction(3600)}
FLOPS_UNITS: dict[str, Fraction] = {f"{prefix}FLOPS": Fraction(size) for prefix, size in _DECIMAL.items()}

_NUMBER = re.compile(r"([+-]?)(\d+(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,3}))?")
_BITS_OR_BYTES = re.compile(r"[KMGTP]b(/s)?")
_BYTES_PER_SECOND = re.compile(r"[KMGTP]i?Bps")
_MAX_LENGTH = 64  # characters; also keeps the fractions small
_RATE_NAMES = ("Gbps", "GB/s", "Mbps", "MB/s", "TB/s", "GiB/s", "B/s")


def parse_bytes(text: str) -> int:
    """Return the bytes of ``80GiB``, ``80GB`` or ``1024B``, rounded to whole bytes. Raises ValueError if it is not
    a number with a unit of bytes, negative, or too large for 64 bits.
    """
    size = round(_parse(text, BYTE_UNITS, "a size"))
    if size >= 2**63:
        raise ValueError(f"{text!r} is too large for a size")
    return size


def parse_bandwidth(text: str) -> float:
    """Return the bytes per second of ``100Gbps``, ``100Gbit/s`` (bits), ``600GB/s``, ``64GiB/s``. Raises ValueError."""
    return _to_float(_parse(text, BANDWIDTH_UNITS, "a bandwidth"), text)


def parse_link_bandwidth(text: str) -> float:
    """Return the bytes per second of a connection or a memory. Raises ValueError if it is not 1bps to 1000PB/s."""
    value = parse_bandwidth(text)
    if not 0.125 <= value <= 1e18:  # times would be infinite or zero
        raise ValueError(f"is {text.strip()}, must be 1bps to 1000PB/s")
    return value


def parse_seconds_per_byte(text: str) -> float:
    """Return the seconds per byte at a bandwidth such as ``25Gbps``: its inverse, rounded once. Raises ValueError if
    it is not a number with a unit of bandwidth, or not above zero.
    """
    bandwidth = _parse(text, BANDWIDTH_UNITS, "a bandwidth")
    if not bandwidth:
        raise ValueError(f"is {text.strip()}, must be > 0")
    return _to_float(1 / bandwidth, text)


def parse_duration(text: str, *, bare: bool = True) -> float:
    """Return the seconds of ``20us``, ``50ms``, ``2s``, ``5min``, ``1h``. A plain number is seconds unless ``bare`` is
    False. Raises ValueError if it is not a number with a unit of time, or negative.
    """
    units = DURATION_UNITS | ({"": Fraction(1)} if bare else {})
    return _to_float(_parse(text, units, "a duration"), text)


MOST_BARE_S = {"TTFT": 60.0, "TPOT": 2.0}
"""A limit without a unit is in seconds; from this value on, milliseconds were probably meant."""


def parse_limit(text: str, name: str) -> float:
    """Return the seconds of a limit on TTFT or TPOT, its ``name``, such as ``50ms``. Raises ValueError as
    `parse_duration` does, or if so long a limit has no unit.
    """
    limit_s = parse_duration(text)
    if limit_s >= MOST_BARE_S[name] and not text.strip()[-1].isalpha():
        raise ValueError(f"a {name} limit of {text} has no unit: {text}ms or {text}s?")
    return limit_s


def parse_moment(text: str, *, needs_zone: bool = False) -> datetime:
    """Return an ISO 8601 time. Without a zone it is UTC, or refused if ``needs_zone``. Raises ValueError."""
    with suppress(ValueError):
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment
        if not needs_zone:
            return moment.replace(tzinfo=UTC)
    raise ValueError(f"{text!r} is not a time: write it like 2027-01-31T00:00:00Z")


def parse_flops(text: str) -> float:
    """Return the FLOP/s of ``312TFLOPS``. Raises ValueError if it is not a number of FLOPS, or is negative."""
    return _to_float(_parse(text, FLOPS_UNITS, "a compute rate"), text)


def parse_ratio(text: str) -> float:
    """Return a ratio written as ``0.5%`` or ``0.005``. Raises ValueError if it is not a number, or is negative."""
    return _to_float(_parse(text, {"%": Fraction(1, 100), "": Fraction(1)}, "a ratio"), text)


def format_bytes(size: int) -> str:
    """Return the shortest text that `parse_bytes` turns back into ``size``."""
    exact = [f"{size // int(scale)}{unit}" for unit, scale in BYTE_UNITS.items() if size % int(scale) == 0]
    # Binary units read better for memory, so they win among texts of equal length.
    return min(exact, key=lambda text: (len(text.rstrip("BiKMGTP")), "i" not in text, len(text)))


def format_bandwidth(bytes_per_s: float) -> str:
    """Return the shortest text that `parse_bandwidth` turns back into ``bytes_per_s``."""
    return _shortest(bytes_per_s, _RATE_NAMES, BANDWIDTH_UNITS)


def format_duration(seconds: float) -> str:
    """Return the shortest text that `parse_duration` turns back into ``seconds``."""
    return _shortest(seconds, ("s", "ms", "us", "ns"), DURATION_UNITS)


def format_flops(flops: float) -> str:
    """Return the shortest text that `parse_flops` turns back into ``flops``."""
    return _shortest(flops, ("TFLOPS", "GFLOPS", "FLOPS"), FLOPS_UNITS)


def _parse(text: str, units: Mapping[str, Fraction], what: str) -> Fraction:
    """Return the number times its unit. All parsers take their messages from here."""
    stripped = text.strip()
    shown = repr(text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}...")
    match = _NUMBER.match(stripped)
    unit = stripped[match.end() :].strip() if match else ""
    if unit.endswith("bit/s"):  # another spelling of bps
        unit = f"{unit.removesuffix('bit/s')}bps"
    if match is None or len(stripped) > _MAX_LENGTH or unit not in units:
        raise ValueError(f"{shown} is not {what}: expected a number and {_listing(units)}{_hint(match, unit, units)}")
    sign, digits, exponent = match.groups()
    value = Fraction(digits) * Fraction(10) ** int(exponent or 0) * units[unit]
    if sign == "-" and value:
        raise ValueError(f"{shown} is negative, must be >= 0")
    return value


def _listing(units: Mapping[str, Fraction]) -> str:
    named = [unit for unit in units if unit]
    if len(named) == 1:
        return f"{named[0]} or nothing"
    return f"one of {', '.join(named)}" + (" (none: seconds)" if "" in units else "")


def _hint(match: re.Match[str] | None, unit: str, units: Mapping[str, Fraction]) -> str:
    """Suggest units that differ only in case. ``100Gb`` and ``100Gb/s`` could be either, ``100GBps`` is bytes."""
    if match is not None and _BITS_OR_BYTES.fullmatch(unit) and f"{unit[0]}bps" in units:
        return f" (did you mean {match.group()}{unit[0]}bps, which is bits, or {match.group()}{unit[0]}B/s, bytes?)"
    if match is not None and _BYTES_PER_SECOND.fullmatch(unit) and f"{unit[:-2]}/s" in units:
        return f" (did you mean {match.group()}{unit[:-2]}/s?)"
    near = [known for known in units if unit and known.lower() == unit.lower()]
    return f" (did you mean {match.group()}{near[0]}?)" if match is not None and len(near) == 1 else ""


def _to_float(value: Fraction, text: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{text!r} is too large") from None


def _shortest(value: float, candidates: tuple[str, ...], units: Mapping[str, Fraction]) -> str:
    """Return the shortest exact text; the base unit is among the candidates, so there is one."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{value} has no text form, must be finite and >= 0")
    texts = []
    above, below = value.as_integer_ratio()
    for unit in candidates:
        # Quotients of integers are rounded once: as exact as fractions, and 30 times as fast.
        scale_above, scale_below = units[unit].numerator, units[unit].denominator
        try:
            number = _plain(above * scale_below / (below * scale_above))
            text_above, text_below = _decimal_ratio(number)
            if text_above * scale_above / (text_below * scale_below) == value:
                texts.append(f"{number}{unit}")
        except OverflowError:
            continue
    return min(texts, key=len)


def _decimal_ratio(number: str) -> tuple[int, int]:
    """Return numerator and denominator of a float's `repr`."""
    mantissa, _, exponent = number.partition("e")
    whole, _, fraction = mantissa.partition(".")
    power = int(exponent or 0) - len(fraction)
    digits = int(whole + fraction)
    return (digits * 10**power, 1) if power >= 0 else (digits, 10**-power)


def _plain(number: float) -> str:
    """Return ``repr`` without the ``.0`` of whole numbers."""
    return repr(number).removesuffix(".0")
