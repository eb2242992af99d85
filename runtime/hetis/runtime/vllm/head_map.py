"""The device of each head group of every running request of a rank, and the virtual sequences of a step.

Each (request, head group) is a sequence with one KV head and r query heads. vLLM passes a batch of R requests with T
tokens in total. The queries of token t and group g are row ``t G + g`` of ``query.view(T G, r, d)``. A part of the
batch (computed here, or by one worker) is a list of such rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hetis.runtime.vllm.steps import LOCAL, Admitted, Gone, Grown, Rehomed

IntArray = npt.NDArray[np.int64]
Table = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRequests:
    """The requests of a step, in the order of vLLM's batch."""

    rows: IntArray  # rows of the head map, shape [R]; -1 if vLLM runs a dummy
    counts: IntArray  # tokens of this step, shape [R]
    lasts: IntArray  # tokens after this step, shape [R]

    @property
    def firsts(self) -> IntArray:
        """The position of the first token of this step, shape [R]."""
        return self.lasts - self.counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VirtualBatch:
    """N virtual sequences with V tokens in total. If each has one token, they are in the order of vLLM's batch, by
    request, then by group; otherwise by group, then by request.
    """

    requests: IntArray  # index of the request of each sequence, shape [N]
    groups: IntArray  # head group of each sequence, shape [N]
    counts: IntArray  # tokens of each in this step, shape [N]
    lasts: IntArray  # tokens of each after this step, shape [N]
    starts: IntArray  # first token of each among the part's, and V at the end, shape [N + 1]
    rows: IntArray  # row of ``query.view(T G, r, d)`` of each token, shape [V]
    positions: IntArray  # position of each token in its sequence, shape [V]
    is_everything: bool  # whether all groups of all requests are included
    is_in_order: bool  # whether ``rows`` increase

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


class RankHeadMap:
    """Rows of requests, found by their anchors. Kept up to date by the events of `StepPlan`."""

    def __init__(self, head_groups: int, num_blocks: int, *, rows: int = 16, width: int = 16) -> None:
        self.devices = np.zeros((rows, head_groups), np.int64)  # device of each head group, shape [rows, G]
        # Blocks of each local head group, shape [rows, G, width]
        self.tables: Table = np.zeros((rows, head_groups, width), np.int32)
        self.numbers = np.zeros(rows, np.int64)  # number of each request, as workers know it, shape [rows]
        self.tokens = np.zeros(rows, np.int64)  # number of tokens stored for each request, shape [rows]
        # Requests that lost KV: void until they are recomputed from their first token, shape [rows]
        self.must_restart = np.zeros(rows, np.bool_)
        self.anchors = np.full(rows, -1, np.int64)
        self.row_of = np.full(num_blocks, -1, np.int64)  # row of each anchor, -1 if there is none, shape [blocks]
        self._free = list(range(rows - 1, -1, -1))

    def admit(self, event: Admitted) -> None:
        if not self._free:
            self._add_rows()
        row = self._free.pop()
        self.row_of[event.anchor], self.anchors[row] = row, event.anchor
        self.devices[row], self.numbers[row] = event.devices, event.number
        self.must_restart[row], self.tokens[row] = False, 0

    def remove(self, event: Gone) -> None:
        row = self._row(event.anchor)
        self.row_of[event.anchor] = self.anchors[row] = -1
        self._free.append(row)

    def grow(self, event: Grown) -> None:
        row, last = self._row(event.anchor), event.first + len(event.blocks)
        while last > self.tables.shape[2]:
            self.tables = np.concatenate([self.tables, np.zeros_like(self.tables)], axis=2)
        self.tables[row, event.group, event.first : last] = event.blocks

    def rehome(self, event: Rehomed) -> None:
        row = self._row(event.anchor)
        self.devices[row], self.tokens[row], self.must_restart[row] = event.devices, 0, True

    def row(self, anchor: int) -> int | None:
        """Return the row of an anchor, or None if the request is gone."""
        row = int(self.row_of[anchor])
        return None if row < 0 else row

    def with_groups_on(self, device: int) -> IntArray:
        """Return the rows of the requests that have head groups on a device."""
        running = np.flatnonzero(self.anchors >= 0)
        rows: IntArray = running[(self.devices[running] == device).any(axis=1)]
        return rows

    def keys_on(self, row: int, device: int) -> Iterator[tuple[int, int]]:
        """Yield the request's number and the head group for each group of a row that lives on a device."""
        for group in np.flatnonzero(self.devices[row] == device):
            yield int(self.numbers[row]), int(group)

    def remote_devices(self, row: int) -> set[int]:
        """Return the workers that hold groups of a row."""
        return set(self.devices[row].tolist()) - {LOCAL}

    def _row(self, anchor: int) -> int:
        row = int(self.row_of[anchor])
        assert row >= 0, f"no request has anchor {anchor}"
        return row

    def _add_rows(self) -> None:
        rows = len(self.numbers)
        for name in ("devices", "tables", "numbers", "tokens", "must_restart", "anchors"):
            old = getattr(self, name)
            new = np.zeros_like(old) if name != "anchors" else np.full_like(old, -1)
            setattr(self, name, np.concatenate([old, new]))
        self._free = list(range(2 * rows - 1, rows - 1, -1))
