"""Numbers in human-readable form: milliseconds, GiB, per cent, bars."""

from __future__ import annotations

import math

_BLOCKS = " ▏▎▍▌▋▊▉"


def seconds(value_s: float) -> str:
    """Return seconds as ``1.25 s``, ``98.2 ms``, ``340 us``: three digits and a suitable unit."""
    if value_s == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if abs(value_s) * factor >= 0.9995 or unit == "us":
            return f"{digits(value_s * factor)} {unit}"
    raise AssertionError("unreachable")


def digits(value: float, significant: int = 3) -> str:
    """Return a number with at least ``significant`` digits and thousands separators, never with an exponent."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return "unknown"
    before_point = math.floor(math.log10(abs(value))) + 1
    text = f"{value:,.{min(max(significant - before_point, 0), 9)}f}"
    return text if float(text.replace(",", "")) else "0"


def with_unit(value: float, unit: str) -> str:
    """Return a plan's value with its unit: ``2.081 requests/s``, ``63.84 USD/h``, ``3 GPUs``."""
    if unit == "GPUs" and float(value).is_integer():
        return plural(int(value), "GPU")
    return f"{digits(value, 4)} {unit}"


def gigabytes(num_bytes: float) -> str:
    """Return bytes as ``79.2 GiB``."""
    return f"{num_bytes / 2**30:.1f} GiB"


def tokens(count: float) -> str:
    """Return a count as ``980``, ``12.3k``, ``4.56M``."""
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if count >= limit:
            return f"{digits(count / {'M': 1e6, 'k': 1e3}[unit])}{unit}"
    return f"{count:.0f}"


def percent(ratio: float) -> str:
    """Return a ratio as ``0.42%``; values below 10% have two decimals, larger ones none."""
    if not math.isfinite(ratio):
        return "unknown"
    value = 100 * ratio
    return f"{value:.2f}%" if abs(value) < 10 else f"{value:.0f}%"


def percent_of_gap(gap: float) -> str:
    """Return a gap above 0 as `percent` does, but never as nothing: no plan is over 0.01% better, not over 0.00%."""
    return percent(max(gap, 1e-4))


def percent_at_least(ratio: float) -> str:
    """Return a ratio as `percent` does, but rounded down: 99.95% is not 100%."""
    scale = 1e4 if abs(ratio) < 0.1 else 1e2
    return percent(math.floor(ratio * scale * (1 + 1e-12)) / scale)


def bar(ratio: float, width: int) -> str:
    """Return a bar of ``width`` characters, filled to ``ratio`` in eighths of a character."""
    eighths = round(min(max(ratio, 0.0), 1.0) * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_BLOCKS[part] if part else "")).ljust(width)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: ``1 replica``, ``1,200 replicas``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
