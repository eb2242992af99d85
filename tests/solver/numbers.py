"""Outputs of any kind as a few numbers, which change if any element does: the record of a search's steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

GOLDEN = (math.sqrt(5) - 1) / 2  # the golden ratio's multiples modulo 1 are spread evenly and never repeat


def numbers_of(*values: Any) -> list[float]:
    """Return numbers and truth values as they are, and of every array two sums of all elements, one weighted by place.

    Tuples, lists and dataclasses become those of their elements. Infinite elements have sums of their own.
    """
    found: list[float] = []
    for value in values:
        found += _numbers_of_one(value)
    return found


def _numbers_of_one(value: Any) -> list[float]:
    if value is None:
        return [-1.0]
    if isinstance(value, str):
        return [float(len(value)), float(sum(map(ord, value)))]
    if isinstance(value, np.ndarray) and value.ndim > 0:
        flat = value.astype(np.float64).ravel()
        weights = 0.5 + (GOLDEN * np.arange(1, len(flat) + 1)) % 1.0
        finite = np.isfinite(flat)
        sums = [float(len(flat)), float(flat[finite].sum()), float(weights[finite] @ flat[finite])]
        return sums if finite.all() else [*sums, float((weights * np.sign(flat))[~finite].sum())]
    if is_dataclass(value):
        return numbers_of(*(getattr(value, field.name) for field in fields(value)))
    if isinstance(value, Iterable):
        return numbers_of(*value)
    return [float(value)]


def differing(kept: list[list[float]], now: list[list[float]]) -> list[int]:
    """Return the positions at which rows of numbers differ by more than rounding."""
    same = [
        len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-7, abs_tol=1e-13) for x, y in zip(a, b, strict=True))
        for a, b in zip(kept, now, strict=True)
    ]
    return [position for position, is_same in enumerate(same) if not is_same]
