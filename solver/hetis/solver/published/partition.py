"""Step A of HexGen-2: a partition of GPUs into serving groups with fast links inside and enough memory each.

This is recursive bisection by the Fiedler vector, then pair exchanges after Kernighan and Lin. HexGen-2 names "spectral
partitioning" and Kernighan-Lin; the recursion, and a cut that divides the memory evenly, are reconstructed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from hetis.solver.published.graph import FloatArray, IntArray

Part = tuple[int, ...]  # vertices, ascending

MAX_PASSES = 8  # of exchanges over all pairs of parts; after two or three there is usually nothing more to find
ROUNDING = 1e-9


def spectral_partition(weights: FloatArray, sizes: FloatArray, num_parts: int) -> list[Part]:
    """Return ``num_parts`` parts of about equal size by recursive Fiedler bisection, each with at least one vertex.

    Args:
        weights: symmetric edge weights, shape [N, N]; heavy edges should stay inside.
        sizes: vertex sizes, shape [N].
        num_parts: between 1 and N.
    """
    parts = _bisect(weights, sizes, np.arange(len(sizes)), num_parts)
    return sorted(parts)


def cut_weight(weights: FloatArray, parts: Sequence[Part]) -> float:
    """Return the total weight of the edges between different parts."""
    part_of = np.full(len(weights), -1)
    for number, part in enumerate(parts):
        part_of[list(part)] = number
    assigned = part_of >= 0
    apart = (part_of[:, None] != part_of[None, :]) & assigned[:, None] & assigned[None, :]
    return float(weights[apart].sum()) / 2


def refine(
    weights: FloatArray, sizes: FloatArray, parts: Sequence[Part], least_size: float, *, sign: float = 1.0
) -> list[Part]:
    """Make Kernighan-Lin exchanges between every pair of parts until no pass lowers the cut.

    A pass repeatedly exchanges the best pair of unlocked vertices, whether or not that helps, and keeps the prefix of
    exchanges with the lowest cut. It therefore crosses small hills, and no single exchange improves its result. An
    exchange that leaves a part below ``least_size`` (or below its previous size, if that was less) is not made.

    Args:
        sign: -1 raises the cut instead.
    """
    found = [list(part) for part in parts]
    for _ in range(MAX_PASSES):
        gains = [
            _exchange(sign * weights, sizes, found[i], found[j], least_size)
            for i, j in combinations(range(len(found)), 2)
        ]
        if not any(gains):
            break
    return sorted(tuple(sorted(part)) for part in found)


def fiedler_order(weights: FloatArray) -> list[int]:
    """Return vertices along the eigenvector of the Laplacian's second smallest eigenvalue; ties by number.

    The sign of the vector is fixed, so that the order does not depend on the sign that LAPACK chose.
    """
    laplacian = np.diag(weights.sum(axis=1)) - weights
    scale = float(np.abs(laplacian).max()) or 1.0
    _, vectors = np.linalg.eigh(laplacian / scale)
    fiedler = np.round(vectors[:, 1], 9)
    leading = np.flatnonzero(fiedler)
    if len(leading) and fiedler[leading[0]] > 0:
        fiedler = -fiedler
    return list(np.argsort(fiedler, kind="stable"))


def _bisect(weights: FloatArray, sizes: FloatArray, vertices: IntArray, num_parts: int) -> list[Part]:
    if num_parts == 1:
        return [tuple(sorted(vertices.tolist()))]
    left_parts = num_parts // 2
    order = vertices[fiedler_order(weights[np.ix_(vertices, vertices)])]
    share = sizes[order].sum() * left_parts / num_parts
    # The cut whose left side comes closest to its share, while both sides keep a vertex for each of their parts.
    reached = np.cumsum(sizes[order])
    cuts = np.arange(left_parts, len(order) - (num_parts - left_parts) + 1)
    cut = int(cuts[np.argmin(np.abs(reached[cuts - 1] - share))])
    return _bisect(weights, sizes, order[:cut], left_parts) + _bisect(
        weights, sizes, order[cut:], num_parts - left_parts
    )


def _exchange(weights: FloatArray, sizes: FloatArray, a: list[int], b: list[int], least_size: float) -> bool:
    """Make one Kernighan-Lin pass over two parts in place; return whether the cut between them fell."""
    vertices = np.array([*a, *b])
    w = weights[np.ix_(vertices, vertices)]
    s = sizes[vertices]
    side = np.array([True] * len(a) + [False] * len(b))
    room = {True: float(s[side].sum()), False: float(s[~side].sum())}
    least = {part: min(least_size, room[part]) for part in room}
    external = np.where(side[:, None] != side[None, :], w, 0.0).sum(axis=1)
    desire = 2 * external - w.sum(axis=1)  # how much moving a vertex across lowers the cut
    locked = np.zeros(len(vertices), dtype=bool)
    scale = float(np.abs(w).max()) or 1.0
    total, best, steps, kept = 0.0, ROUNDING * scale, list[tuple[int, int]](), 0
    for _ in range(min(len(a), len(b))):
        mine, theirs = np.flatnonzero(side & ~locked), np.flatnonzero(~side & ~locked)
        gain = desire[mine][:, None] + desire[theirs][None, :] - 2 * w[np.ix_(mine, theirs)]
        growth = s[theirs][None, :] - s[mine][:, None]  # of a's side
        fits = (room[True] + growth >= least[True]) & (room[False] - growth >= least[False])
        if not fits.any():
            break
        i, j = np.unravel_index(int(np.argmax(np.where(fits, gain, -np.inf))), gain.shape)
        u, v = int(mine[i]), int(theirs[j])
        total += float(gain[i, j])
        room[True] += float(growth[i, j])
        room[False] -= float(growth[i, j])
        locked[[u, v]] = True
        # For u's old companions v is now inside and u outside; for v's it is the other way round.
        desire += np.where(side, 2 * w[:, u] - 2 * w[:, v], 2 * w[:, v] - 2 * w[:, u])
        steps.append((u, v))
        if total > best:
            best, kept = total, len(steps)
    for u, v in steps[:kept]:
        a[a.index(int(vertices[u]))], b[b.index(int(vertices[v]))] = int(vertices[v]), int(vertices[u])
    return kept > 0
