"""Compiled attention over pages on a CPU: reads each K and V once, in place, whatever the lengths of the contexts.

Each virtual sequence is computed separately and in the same order whatever else is in the batch. A head therefore
gives the same bits alone or among others, on this device or on another of its kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hetis.solver.backends.compiled import kernel_of

# Sums may be reordered, so that they vectorise. Infinities and NaN are kept, so that a broken model shows.
kernel = kernel_of(Path(__file__).parent, fastmath={"reassoc", "contract", "arcp", "nsz"})


Floats = npt.NDArray[np.floating[Any]]
Words = npt.NDArray[np.uint16]
Table = npt.NDArray[np.int32]
IntArray = npt.NDArray[np.int64]


@kernel
def attend(
    qkv: Floats,
    k: Floats,
    v: Floats,
    table: Table,
    rows: IntArray,
    positions: IntArray,
    starts: IntArray,
    ends: IntArray,
    window: int,
    scale: float,
    soft_cap: float,
    out: Floats,
) -> None:
    """Store keys and values in their pages, and attend: outputs [T, r, d]. All numbers are float32, or all float64.

    Args:
        qkv: each of T rows' r queries, key and value, shape [T, r + 2, d].
        k, v: pages [pages, page_tokens, d].
        table: pages of every sequence, shape [rows, most].
        rows: row of the table for each of N virtual sequences, shape [N].
        positions: position of each sequence's first row, shape [N].
        starts, ends: rows of sequence i are ``starts[i]`` to ``ends[i] - 1``, at consecutive positions, shape [N].
            Other rows are not touched. Slots up to a row's position are read, or the last ``window`` if that is not 0.
        scale: factor of the scores.
        soft_cap: cap of the scaled scores. 0: none.
    """
    size, r = k.shape[1], qkv.shape[1] - 2
    scores = np.empty((r, _longest(positions, starts, ends, size)), qkv.dtype)
    bits = np.empty(scores.shape[1], np.int32)
    _store(qkv, k, v, table, rows, positions, starts, ends)
    for i in range(len(rows)):
        pages = table[rows[i]]
        for t in range(starts[i], ends[i]):
            last = positions[i] + (t - starts[i]) + 1
            first = max(0, last - window) if window else 0
            for page in range(first // size, -(-last // size)):
                begin, end = max(first - page * size, 0), min(last - page * size, size)
                _score(qkv[t, :r], k[pages[page]], begin, end, page * size, scores)
            for h in range(r):
                _weigh(scores[h, first:last], scale, soft_cap, bits)
            out[t] = 0
            for page in range(first // size, -(-last // size)):
                begin, end = max(first - page * size, 0), min(last - page * size, size)
                _add_values(scores, v[pages[page]], begin, end, page * size, out[t])


@kernel
def attend_bfloat16(
    qkv: Words,
    k: Words,
    v: Words,
    table: Table,
    rows: IntArray,
    positions: IntArray,
    starts: IntArray,
    ends: IntArray,
    window: int,
    scale: float,
    soft_cap: float,
    out: Words,
) -> None:
    """Like `attend` with all numbers bfloat16, given as their words. All sums are float32."""
    size, r, d = k.shape[1], qkv.shape[1] - 2, qkv.shape[2]
    scores = np.empty((r, _longest(positions, starts, ends, size)), np.float32)
    bits = np.empty(scores.shape[1], np.int32)
    wide, wide_queries = np.empty((size, d), np.int32), np.empty((r, d), np.int32)
    floats, queries = wide.view(np.float32), wide_queries.view(np.float32)
    sums = np.empty((r, d), np.float32)
    _store(qkv, k, v, table, rows, positions, starts, ends)
    for i in range(len(rows)):
        pages = table[rows[i]]
        for t in range(starts[i], ends[i]):
            last = positions[i] + (t - starts[i]) + 1
            first = max(0, last - window) if window else 0
            _widen(qkv[t], 0, r, wide_queries)
            for page in range(first // size, -(-last // size)):
                begin, end = max(first - page * size, 0), min(last - page * size, size)
                _widen(k[pages[page]], begin, end, wide)
                _score(queries, floats, begin, end, page * size, scores)
            for h in range(r):
                _weigh(scores[h, first:last], scale, soft_cap, bits)
            sums[:] = 0
            for page in range(first // size, -(-last // size)):
                begin, end = max(first - page * size, 0), min(last - page * size, size)
                _widen(v[pages[page]], begin, end, wide)
                _add_values(scores, floats, begin, end, page * size, sums)
            _narrow(sums, out[t])


@kernel
def _store(
    qkv: Floats | Words,
    k: Floats | Words,
    v: Floats | Words,
    table: Table,
    rows: IntArray,
    positions: IntArray,
    starts: IntArray,
    ends: IntArray,
) -> None:
    """Write the keys and values to the slots of their positions."""
    size, at = k.shape[1], qkv.shape[1] - 2
    for i in range(len(rows)):
        for t in range(starts[i], ends[i]):
            position = positions[i] + (t - starts[i])
            page, slot = table[rows[i], position // size], position % size
            for d in range(qkv.shape[2]):
                k[page, slot, d] = qkv[t, at, d]
            for d in range(qkv.shape[2]):
                v[page, slot, d] = qkv[t, at + 1, d]


@kernel
def _longest(positions: IntArray, starts: IntArray, ends: IntArray, size: int) -> int:
    """Return the slots of the longest sequence, in whole pages."""
    most = 0
    for i in range(len(positions)):
        most = max(most, positions[i] + (ends[i] - starts[i]))
    return -(-most // size) * size


@kernel
def _widen(words: Words, begin: int, end: int, wide: Table) -> None:
    """Convert bfloat16 words to float32, of which they are the upper half."""
    for i in range(begin, end):
        for d in range(words.shape[1]):
            wide[i, d] = np.int32(words[i, d]) << np.int32(16)


@kernel
def _narrow(floats: Floats, words: Words) -> None:
    """Round each float32 [n, d] to the nearest bfloat16, ties to even."""
    wide = floats.view(np.uint32)
    for i in range(words.shape[0]):
        for d in range(words.shape[1]):
            bits = wide[i, d]
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            # Rounding would carry a NaN over into a number.
            words[i, d] = np.uint16(0x7FC0) if np.isnan(floats[i, d]) else np.uint16(rounded)


@kernel
def _score(q: Floats, page: Floats, begin: int, end: int, offset: int, scores: Floats) -> None:
    """Compute the products of queries [r, d] with the keys [page_tokens, d] of slots ``begin`` to ``end - 1``."""
    # Four at a time. From 0 to d, not from 1: of 63 products the compiler would do 31 individually.
    for h in range(q.shape[0]):
        slot = begin
        while slot + 4 <= end:
            s0, s1, s2, s3 = q.dtype.type(0), q.dtype.type(0), q.dtype.type(0), q.dtype.type(0)
            for d in range(q.shape[1]):
                s0 += q[h, d] * page[slot, d]
                s1 += q[h, d] * page[slot + 1, d]
                s2 += q[h, d] * page[slot + 2, d]
                s3 += q[h, d] * page[slot + 3, d]
            at = offset + slot
            scores[h, at], scores[h, at + 1], scores[h, at + 2], scores[h, at + 3] = s0, s1, s2, s3
            slot += 4
        while slot < end:
            total = q.dtype.type(0)
            for d in range(q.shape[1]):
                total += q[h, d] * page[slot, d]
            scores[h, offset + slot] = total
            slot += 1


@kernel
def _add_values(weights: Floats, page: Floats, begin: int, end: int, offset: int, out: Floats) -> None:
    """Add the weighted values [page_tokens, d] of the slots to out [r, d]. Four at a time halves the time."""
    for h in range(out.shape[0]):
        slot = begin
        while slot + 4 <= end:
            at = offset + slot
            w0, w1, w2, w3 = weights[h, at], weights[h, at + 1], weights[h, at + 2], weights[h, at + 3]
            for d in range(out.shape[1]):
                out[h, d] += (w0 * page[slot, d] + w1 * page[slot + 1, d]) + (
                    w2 * page[slot + 2, d] + w3 * page[slot + 3, d]
                )
            slot += 4
        while slot < end:
            weight = weights[h, offset + slot]
            for d in range(out.shape[1]):
                out[h, d] += weight * page[slot, d]
            slot += 1


@kernel
def _weigh(scores: Floats, scale: float, soft_cap: float, bits: Table) -> None:
    """Replace the scores by the softmax of ``scale * scores``, capped first unless ``soft_cap`` is 0."""
    factor = scores.dtype.type(scale)
    if soft_cap:
        _cap(scores, scale, soft_cap, bits)
        factor = scores.dtype.type(1)
    top = _largest(scores)
    for t in range(len(scores)):
        scores[t] = (scores[t] - top) * factor
    if scores.itemsize == 4:
        _exp(scores, bits)
    else:
        for t in range(len(scores)):
            scores[t] = np.exp(scores[t])
    total = scores[0] * 0
    for score in scores:
        total += score
    for t in range(len(scores)):
        scores[t] /= total


@kernel
def _cap(scores: Floats, scale: float, soft_cap: float, bits: Table) -> None:
    """Replace the scores by ``soft_cap * tanh(scale * scores / soft_cap)``."""
    inner, cap = scores.dtype.type(scale / soft_cap), scores.dtype.type(soft_cap)
    if scores.itemsize == 8:
        for t in range(len(scores)):
            scores[t] = cap * np.tanh(scores[t] * inner)
        return
    # tanh y is (1 - e) / (1 + e) with e = exp(-2 |y|). If y is so small that 1 - e loses its digits, use a polynomial.
    powers = np.empty_like(scores)
    for t in range(len(scores)):
        powers[t] = np.float32(-2.0) * abs(scores[t] * inner)
    _exp(powers, bits)
    for t in range(len(scores)):
        y = scores[t] * inner
        square = y * y
        near = y * (np.float32(1.0) - square * (np.float32(1 / 3) - square * np.float32(2 / 15)))
        far = np.copysign((np.float32(1.0) - powers[t]) / (np.float32(1.0) + powers[t]), y)
        scores[t] = cap * (near if square < np.float32(0.01) else far)


@kernel
def _largest(x: Floats) -> Any:
    """Return the largest number, in four strands, because a single one waits for each previous comparison."""
    a, b, c, d = x[0], x[0], x[0], x[0]
    t = 0
    while t + 4 <= len(x):
        a, b, c, d = max(a, x[t]), max(b, x[t + 1]), max(c, x[t + 2]), max(d, x[t + 3])
        t += 4
    while t < len(x):
        a = max(a, x[t])
        t += 1
    return max(max(a, b), max(c, d))


@kernel
def _exp(x: Floats, bits: Table) -> None:
    """Replace float32 numbers <= 0 by their exp, vectorised: numba would call the library for each number.

    Computes 2^n e^y with |y| <= ln 2 / 2, and e^y by Cephes' polynomial (expf; relative error 2e-7). Results are at
    least e^-87.
    """
    for t in range(len(x)):
        bounded = max(np.float32(x[t]), np.float32(-87.0))
        n = np.floor(bounded * np.float32(1.4426950408889634) + np.float32(0.5))
        y = bounded - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * y + np.float32(1.3981999507e-3)
        p = p * y + np.float32(8.3334519073e-3)
        p = p * y + np.float32(4.1665795894e-2)
        p = p * y + np.float32(1.6666665459e-1)
        p = p * y + np.float32(5.0000001201e-1)
        x[t] = p * y * y + y + np.float32(1.0)
        bits[t] = (np.int32(n) + np.int32(127)) << np.int32(23)
    powers = bits.view(np.float32)
    for t in range(len(x)):
        x[t] *= powers[t]
