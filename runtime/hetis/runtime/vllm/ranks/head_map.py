"""The device of each head group of every running request of a rank, and a step as that rank computes it.

Each (request, head group) is a sequence with one KV head and r query heads. vLLM passes a batch of R requests with T
tokens in total. The queries of token t and group g are row ``t G + g`` of ``query.view(T G, r, d)``. A part of the
batch (computed here, or by one worker) is a list of such rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hetis.runtime.attention.device import Pending
from hetis.runtime.attention.kv import KvShape
from hetis.runtime.vllm.steps import LOCAL, Admitted, Gone, Grown, Rehomed

IntArray = npt.NDArray[np.int64]
Table = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRequests:
    """The requests of a step, in the order of vLLM's batch."""

    rows: IntArray  # rows of the head map, shape [R]; 0 if vLLM runs a dummy
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


NOWHERE = -1  # the device of head groups that nobody computes


class RankHeadMap:
    """Rows of requests, found by their anchors. Kept up to date by the events of `StepPlan`.

    Row 0 is nobody's: that of anchors which no request has, whose groups are nowhere and whose blocks are vLLM's block
    0, which holds nothing.
    """

    def __init__(self, head_groups: int, num_blocks: int, *, rows: int = 16, width: int = 16) -> None:
        self.head_groups = head_groups
        # Device of each head group, shape [rows, G]; of a row without a request `LOCAL`
        self.devices = np.zeros((rows, head_groups), np.int64)
        self.devices[0] = NOWHERE
        # Blocks of each local head group, shape [rows, G, width]
        self.tables: Table = np.zeros((rows, head_groups, width), np.int32)
        self.numbers = np.zeros(rows, np.int64)  # number of each request, as workers know it, shape [rows]
        self.tokens = np.zeros(rows, np.int64)  # number of tokens stored for each request, shape [rows]
        # Requests that lost KV: void until they are recomputed from their first token, shape [rows]
        self.must_restart = np.zeros(rows, np.bool_)
        self.anchors = np.full(rows, -1, np.int64)
        self.row_of = np.zeros(num_blocks, np.int64)  # row of each anchor, shape [blocks]
        self._free = list(range(rows - 1, 0, -1))
        # What a copy of ``row_of``, followed by ``tables``, lacks: places in it, and the numbers from there on. None:
        # there is no copy.
        self.changes: list[tuple[int, Sequence[int]]] | None = None

    @property
    def is_local(self) -> bool:
        """Return whether the KV of every request is here, all of it, and valid."""
        return bool(self.devices.max() <= LOCAL) and not self.must_restart.any()

    def admit(self, event: Admitted) -> None:
        if not self._free:
            self._add_rows()
        row = self._free.pop()
        self.row_of[event.anchor], self.anchors[row] = row, event.anchor
        self.devices[row], self.numbers[row] = event.devices, event.number
        self.must_restart[row], self.tokens[row] = False, 0
        if self.changes is not None:
            self.changes.append((event.anchor, (row,)))

    def remove(self, event: Gone) -> None:
        row = self._row(event.anchor)
        self.row_of[event.anchor], self.anchors[row] = 0, -1
        self.devices[row], self.must_restart[row] = LOCAL, False
        self._free.append(row)
        if self.changes is not None:
            self.changes.append((event.anchor, (0,)))

    def grow(self, event: Grown) -> None:
        row, last = self._row(event.anchor), event.first + len(event.blocks)
        while last > self.tables.shape[2]:
            self.tables = np.concatenate([self.tables, np.zeros_like(self.tables)], axis=2)
        self.tables[row, event.group, event.first : last] = event.blocks
        if self.changes is not None:
            place = np.ravel_multi_index((row, event.group, event.first), self.tables.shape)
            self.changes.append((len(self.row_of) + int(place), event.blocks))

    def rehome(self, event: Rehomed) -> None:
        row = self._row(event.anchor)
        self.devices[row], self.tokens[row], self.must_restart[row] = event.devices, 0, True

    def row(self, anchor: int) -> int | None:
        """Return the row of an anchor, or None if the request is gone."""
        row = int(self.row_of[anchor])
        return row or None

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
        assert row, f"no request has anchor {anchor}"
        return row

    def _add_rows(self) -> None:
        rows = len(self.numbers)
        for name in ("devices", "tables", "numbers", "tokens", "must_restart", "anchors"):
            old = getattr(self, name)
            new = np.zeros_like(old) if name != "anchors" else np.full_like(old, -1)
            setattr(self, name, np.concatenate([old, new]))
        self._free = list(range(2 * rows - 1, rows - 1, -1))


# --- a step


class LayerCall(NamedTuple):
    """One call of a layer's attention: q [T, H, d], k and v [T, G, d], the layer's cache, and outputs like q.

    For virtual sequences it is q and out [V, r, d], k and v [V, 1, d].
    """

    layer: Any  # vLLM's
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_cache: torch.Tensor
    out: torch.Tensor


class LocalAttention(Protocol):
    """vLLM's own backend, for one layer."""

    def attend_here(self, call: LayerCall, slots: torch.Tensor, metadata: Any) -> None:
        """Store keys and values of virtual sequences at ``slots`` [V] and attend."""


@dataclass(slots=True)
class LayerTimes:
    """The total time that layers of a step took on one device, between ``least_s`` and ``most_s`` seconds."""

    count: int = 0
    least_s: float = 0.0
    most_s: float = 0.0

    def add(self, least_s: float, most_s: float) -> None:
        self.count += 1
        self.least_s += least_s
        self.most_s += most_s


@dataclass(slots=True, kw_only=True, eq=False)
class Remote:
    """One worker's part of a step: rows ``begin`` to ``end - 1`` of those for workers, sorted by device."""

    device: int
    part: VirtualBatch
    begin: int
    end: int
    pending: Pending | None = None
    requested_s: float = 0.0
    sent_s: float = 0.0
    layers: LayerTimes = field(default_factory=LayerTimes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sorting:
    """The order of rows by device."""

    order: torch.Tensor  # rows of ``query.view(T G, r, d)``: those computed here first, then those of each worker
    # Position in ``order`` of each row of ``query.view(T G, r, d)``; its length if the row is void
    places: torch.Tensor


# Queries at a time: all of a prompt's would need memory that grows with the square of its length.
_PIECE_TOKENS = 256


def attend_directly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: KvShape, layer: int) -> torch.Tensor:
    """Return causal attention of a whole sequence, computed in float32.

    Args:
        q: queries of one head group, shape [tokens, r, d].
        k, v: its keys and values, shape [tokens, d].
        shape: has the scale, the soft cap, and the window of ``layer``.

    Returns:
        Outputs, shape [tokens, r, d], float32.
    """
    outputs = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32, device=q.device)
    at = torch.arange(len(k), device=q.device)
    for begin in range(0, len(k), _PIECE_TOKENS):
        end = min(begin + _PIECE_TOKENS, len(k))
        scores = torch.einsum("trd,sd->rts", q[begin:end].float(), k[:end].float()) * shape.scale
        if shape.soft_cap:
            scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
        distance = at[begin:end, None] - at[None, :end]
        seen = distance >= 0
        if window := shape.windows[layer]:
            seen &= distance < window
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
        outputs[begin:end] = torch.einsum("rts,sd->trd", weights, v[:end].float())
    return outputs
