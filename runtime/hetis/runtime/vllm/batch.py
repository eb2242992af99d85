"""The virtual sequences of a step: each (request, head group) is a sequence with one KV head and r query heads.

vLLM passes a batch of R requests with T tokens in total. The queries of token t and group g are row ``t G + g`` of
``query.view(T G, r, d)``. A part of the batch (computed here, or by one worker) is a list of such rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Table = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRequests:
    """The requests of a step, in the order of vLLM's batch.

    Attributes:
        rows: of the head map, shape [R]; -1 if vLLM runs a dummy.
        counts: tokens of this step, shape [R].
        lasts: tokens after this step, shape [R].
    """

    rows: IntArray
    counts: IntArray
    lasts: IntArray

    @property
    def firsts(self) -> IntArray:
        """The position of the first token of this step, shape [R]."""
        return self.lasts - self.counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VirtualBatch:
    """N virtual sequences with V tokens in total. If each has one token, they are ordered by request, then by group,
    which is the order of vLLM's batch; otherwise by group, then by request.

    Attributes:
        requests: index of the request of each sequence, shape [N].
        groups: head group of each, shape [N].
        counts: tokens of each in this step, shape [N].
        lasts: tokens of each after this step, shape [N].
        starts: first token of each among the part's, and V at the end, shape [N + 1].
        rows: row of ``query.view(T G, r, d)`` of each token, shape [V].
        positions: of each token in its sequence, shape [V].
        is_everything: all groups of all requests are included.
        is_in_order: ``rows`` increase.
    """

    requests: IntArray
    groups: IntArray
    counts: IntArray
    lasts: IntArray
    starts: IntArray
    rows: IntArray
    positions: IntArray
    is_everything: bool
    is_in_order: bool

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def num_tokens(self) -> int:
        return len(self.rows)


def part_of(requests: StepRequests, chosen: Bools) -> VirtualBatch:
    """Return the part of a step with the ``chosen`` groups, shape [R, G]."""
    num_groups = chosen.shape[1]
    is_in_order = bool((requests.counts == 1).all())
    if is_in_order:
        indices, groups = np.nonzero(chosen)
        counts = np.ones_like(indices)
        starts = np.arange(len(indices) + 1)
        rows, positions = indices * num_groups + groups, requests.firsts[indices]
    else:
        groups, indices = np.nonzero(chosen.T)
        counts = requests.counts[indices]
        starts = np.zeros(len(indices) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        begins = np.cumsum(requests.counts) - requests.counts
        offsets = np.arange(starts[-1]) - np.repeat(starts[:-1], counts)
        rows = (np.repeat(begins[indices], counts) + offsets) * num_groups + np.repeat(groups, counts)
        positions = np.repeat(requests.firsts[indices], counts) + offsets
    return VirtualBatch(
        requests=indices,
        groups=groups,
        counts=counts,
        lasts=requests.lasts[indices],
        starts=starts,
        rows=rows,
        positions=positions,
        is_everything=bool(chosen.all()),
        is_in_order=is_in_order,
    )


def slots_of(part: VirtualBatch, tables: Table, block_tokens: int) -> IntArray:
    """Return each token's slot, shape [V]: its block times ``block_tokens`` plus offset; ``tables`` is [N, width]."""
    sequences = np.repeat(np.arange(len(part)), part.counts)
    blocks = tables[sequences, part.positions // block_tokens].astype(np.int64)
    return blocks * block_tokens + part.positions % block_tokens
