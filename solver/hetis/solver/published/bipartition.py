"""Step A of HexGen-2, second level: serving groups into prefill and decode, so that the links between them are fast.

The coarse graph has one vertex for each group; its edges add up the bandwidth between both groups' GPUs. The sides are
those of a large cut: spectral, by the eigenvector of the Laplacian's largest eigenvalue, then exchanges after
Kernighan and Lin with the sign reversed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hetis.solver.published.graph import FloatArray
from hetis.solver.published.partition import Part, refine


def coarsened(weights: FloatArray, parts: Sequence[Part]) -> FloatArray:
    """Total edge weight between every two parts, shape [K, K], 0 on the diagonal."""
    members = np.zeros((len(parts), len(weights)))
    for number, part in enumerate(parts):
        members[number, list(part)] = 1.0
    coarse: FloatArray = members @ weights @ members.T
    np.fill_diagonal(coarse, 0.0)
    return coarse


def maximum_cut(weights: FloatArray) -> tuple[Part, Part]:
    """Two sides, none empty, with a large cut between them; vertex 0 is on the first.

    Kernighan-Lin exchanges keep the sizes of the sides, so every size from the spectral cut's neighbourhood is tried:
    the K vertices are split at each position along the eigenvector, and the best cut after refinement wins.
    """
    order = _opposing_order(weights)
    best: tuple[Part, Part] | None = None
    best_cut = -1.0
    for size in sorted(range(1, len(order)), key=lambda size: (abs(2 * size - len(order)), size)):
        first, second = refine(weights, np.ones(len(order)), [tuple(order[:size]), tuple(order[size:])], 1.0, sign=-1.0)
        cut = float(weights[np.ix_(first, second)].sum())
        if cut > best_cut * (1 + 1e-12):
            best, best_cut = (first, second), cut
    assert best is not None, "a cut needs two vertices"
    return best


def _opposing_order(weights: FloatArray) -> list[int]:
    """Vertices along the eigenvector of the Laplacian's largest eigenvalue, its sign fixed; ties by number."""
    laplacian = np.diag(weights.sum(axis=1)) - weights
    scale = float(np.abs(laplacian).max()) or 1.0
    _, vectors = np.linalg.eigh(laplacian / scale)
    last = np.round(vectors[:, -1], 9)
    leading = np.flatnonzero(last)
    if len(leading) and last[leading[0]] > 0:
        last = -last
    return [int(v) for v in np.argsort(last, kind="stable")]
