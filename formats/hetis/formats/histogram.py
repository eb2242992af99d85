"""Reduces many (prompt, output) pairs to few bins that keep the averages the cost model needs."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from hetis.solver.workload import LengthBin

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def length_bins(prompts: IntArray, outputs: IntArray, *, max_bins: int) -> tuple[LengthBin, ...]:
    """Return the joint histogram of request lengths, sorted by prompt and output. Weights are numbers of requests.

    Equal pairs share a bin. If there are more than ``max_bins`` distinct pairs, one bin of everything is split
    repeatedly: always the bin that adds most to the error of E[P^2] and E[O (P + O/2)], at its mean. Bins hold their
    means, so E[P] and E[O] stay exact; only the variance inside bins is lost.

    Args:
        prompts, outputs: tokens of each request, shape [requests], all >= 1 and at least one.
        max_bins: maximum number of bins.
    """
    pairs, counts = np.unique(np.stack([prompts, outputs], axis=1), axis=0, return_counts=True)
    p, o, w = pairs[:, 0].astype(np.float64), pairs[:, 1].astype(np.float64), counts.astype(np.float64)
    groups = [np.array([i]) for i in range(len(w))] if len(w) <= max_bins else _split(p, o, w, max_bins)
    bins = [_mean_bin(p[group], o[group], w[group]) for group in groups]
    return tuple(sorted(bins, key=lambda b: (b.prompt_tokens, b.output_tokens)))


def _mean_bin(p: FloatArray, o: FloatArray, w: FloatArray) -> LengthBin:
    total = float(w.sum())
    return LengthBin(prompt_tokens=float(w @ p) / total, output_tokens=float(w @ o) / total, weight=total)


def _split(p: FloatArray, o: FloatArray, w: FloatArray, max_bins: int) -> list[npt.NDArray[np.intp]]:
    # Weights of the variances in the relative errors of E[P^2] and of E[O (P + O/2)].
    per_p, per_o = 1.0 / float(w @ (p * p)), 1.0 / float(w @ (o * (p + o / 2)))

    def entry(number: int, group: npt.NDArray[np.intp]) -> tuple[float, int, npt.NDArray[np.intp], bool]:
        weight = w[group]
        mean_p, mean_o = (float(weight @ x[group]) / float(weight.sum()) for x in (p, o))
        error_p = per_p * float(weight @ (p[group] - mean_p) ** 2)
        error_o = per_o * float(weight @ (o[group] - mean_o) ** 2)
        along_prompt = error_p >= error_o
        return -max(error_p, error_o), number, group, along_prompt

    heap: list[Any] = [entry(0, np.arange(len(w)))]
    number = 1
    while len(heap) < max_bins and heap[0][0] < 0:
        _, _, group, along_prompt = heapq.heappop(heap)
        x = (p if along_prompt else o)[group]
        low = x <= float(w[group] @ x) / float(w[group].sum())
        for half in (group[low], group[~low]):
            heapq.heappush(heap, entry(number, half))
            number += 1
    return [group for _, _, group, _ in heap]
