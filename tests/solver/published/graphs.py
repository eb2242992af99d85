"""Small weighted graphs to partition, and their best cuts by enumeration."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

from hetis.solver.placement.replicas.tables import FloatArray
from hetis.solver.published.replicas import Part


@st.composite
def graphs(draw: st.DrawFn, *, least: int = 2, most: int = 8) -> FloatArray:
    """Symmetric weights between 0 and 20, shape [N, N]."""
    size = draw(st.integers(least, most))
    weights = np.zeros((size, size))
    for i, j in itertools.combinations(range(size), 2):
        weights[i, j] = weights[j, i] = draw(st.integers(0, 20))
    return weights


def cliques(*sizes: int, inside: float = 100.0, between: float = 1.0) -> FloatArray:
    """Return nodes of ``sizes`` GPUs, with fast links inside and slow ones between."""
    node = np.repeat(np.arange(len(sizes)), sizes)
    weights = np.where(node[:, None] == node[None, :], inside, between)
    np.fill_diagonal(weights, 0.0)
    return weights


def bipartitions(size: int) -> list[tuple[Part, Part]]:
    """Yield all splits into two sides, neither of them empty."""
    found = []
    for count in range(1, size):
        for first in itertools.combinations(range(size), count):
            found.append((first, tuple(v for v in range(size) if v not in first)))
    return found


def cut_between(weights: FloatArray, first: Part, second: Part) -> float:
    return float(weights[np.ix_(first, second)].sum())
