"""Numbers formatted for people."""

from __future__ import annotations


def seconds(value: float) -> str:
    """Return ``12.3 us``, ``4.56 ms``, ``1.2 s``."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def percent(value: float | None) -> str:
    """Return ``4.2%``, or a dash if the value is unknown."""
    return "-" if value is None else f"{value:.1%}"


def duration(value: float) -> str:
    """Return minutes and seconds as ``3:07``."""
    return f"{int(value) // 60}:{int(value) % 60:02d}"
