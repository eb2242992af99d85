"""A step's virtual sequences as vLLM's backend sees them, in tensors that stay where they are from step to step.

With every head group here, nothing of a step is known on the host only: one kernel gathers block tables, slots, lengths
and query starts on the device, from vLLM's own description and a copy of the head map's tables. The host waits for
nothing, and a graph that was captured over these tensors sees the present step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from hetis.runtime.vllm.ranks.head_map import (
    IntArray,
    LayerTimes,
    RankHeadMap,
    Remote,
    Sorting,
    StepRequests,
    Table,
    VirtualBatch,
)
from hetis.runtime.vllm.ranks.layer_rows import LayerRows

_MOST_CHANGES = 1 << 16  # numbers of the map that are sent one by one; if more have changed, the whole map is


class StepLimits(NamedTuple):
    """The largest step. Tensors of these sizes are made once; a larger step, such as a dummy's, makes larger ones."""

    requests: int
    tokens: int
    blocks: int  # of one sequence


class Fence:
    """A point in the device's work that the host may wait for. On a CPU the work is always done."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        """Note the work queued so far."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Wait until the noted work is done."""
        if self._event is not None:
            self._event.synchronize()


class Staged:
    """A tensor of the device and its pinned twin on the host, copied without waiting. On a CPU they are one tensor."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.there = torch.zeros(shape, dtype=dtype, device=device)
        self.is_one = device.type == "cpu"
        self.here = self.there if self.is_one else torch.empty(shape, dtype=dtype, pin_memory=True)
        self.fence = Fence(device)

    def up(self, count: int) -> torch.Tensor:
        """Queue the copy of the first rows of ``here``, and return them there. `wait` before ``here`` changes again."""
        if not self.is_one:
            self.there[:count].copy_(self.here[:count], non_blocking=True)
            self.fence.record()
        return self.there[:count]

    def put(self, rows: np.ndarray[Any, Any]) -> torch.Tensor:
        """Queue the copy of an array to the first rows, and return them there."""
        self.fence.wait()  # for the last copy, which a step has passed since
        self.here[: len(rows)].copy_(torch.from_numpy(rows))
        return self.up(len(rows))

    def down(self, rows: torch.Tensor) -> torch.Tensor:
        """Queue the copy of rows of the device to the first rows of ``here``, and return them. `wait` to read them."""
        here = self.here[: len(rows)]
        here.copy_(rows, non_blocking=True)
        self.fence.record()
        return here

    def wait(self) -> None:
        """Wait until the last copy is done."""
        self.fence.wait()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalSequences:
    """The N virtual sequences of a step that are computed here, with V tokens in total, as `VirtualBatch` orders them.

    Tensors without ``_cpu`` are on the device. A padded request of a graph has sequences without tokens.
    """

    tables: torch.Tensor  # blocks, int32 [N, width]
    slots: torch.Tensor  # of each token, int64 [V]; -1 for a padded one
    starts: torch.Tensor  # int32 [N + 1]
    lasts: torch.Tensor  # int32 [N]
    starts_cpu: torch.Tensor  # int32 [N + 1]
    lasts_cpu: torch.Tensor  # int32 [N]
    is_in_order: bool
    max_query_len: int
    max_seq_len: int
    requests: IntArray | None = None  # index of the request of each, shape [N]; None: all groups of every request

    def __len__(self) -> int:
        return len(self.lasts_cpu)

    def of_requests(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """Return for each sequence the value of its request, of which ``values`` has one each, if there are any."""
        if values is None or self.requests is not None:
            return None if values is None else values[torch.from_numpy(self.requests)]
        groups = len(self) // len(values)
        return values.repeat_interleave(groups) if self.is_in_order else values.repeat(groups)

    @property
    def num_tokens(self) -> int:
        return len(self.slots)


@dataclass(slots=True, kw_only=True, eq=False)
class Step:
    """A step as this rank computes it."""

    common: Any  # vLLM's description, the same for all layers
    num_tokens: int
    local: LocalSequences | None  # what is computed here; None: nothing
    # None if all groups of all requests are here: then the host need not know which requests these are before the next
    requests: StepRequests | None = None
    remotes: list[Remote] = field(default_factory=list)
    sorting: Sorting | None = None  # None if all rows are computed here
    rows: LayerRows | None = None  # memory that the layers take in turn, made with the first
    is_captured: bool = False  # whether a graph is: its layers make their own memory, which then belongs to the graph
    must_attend: bool = False  # whether its layers must call `Rank.attend`, as no graph may compute them
    is_timed: bool = False  # whether the host sees how long a layer takes here: on a GPU the call returns before
    layers: LayerTimes = field(default_factory=LayerTimes)  # times of the layers computed here


class StepDescription(Protocol):
    """A step as vLLM's layers get it."""

    @property
    def step(self) -> Step: ...

    @property
    def base(self) -> Any:
        """What vLLM's own backend knows of the part computed here."""


class StepTensors:
    """The tensors of one rank."""

    def __init__(self, heads: RankHeadMap, limits: StepLimits, block_tokens: int, device: torch.device) -> None:
        self.device = device
        self._heads, self._block_tokens, self._groups = heads, block_tokens, heads.head_groups
        self._limits = StepLimits(0, 0, 0)
        self._map = _DeviceMap(heads, device)
        self._grow(limits)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where a captured graph reads a step."""
        return tuple(x.data_ptr() for x in (self._tables, self._slots.there, self._starts.there, self._lasts.there))

    def gather(self, common: Any) -> LocalSequences:
        """Return all sequences of a step, all of whose head groups are here, from vLLM's description of it."""
        num, groups = common.num_reqs, self._groups
        self._map.update()
        is_in_order = common.max_query_len == 1 and common.num_actual_tokens == num
        tokens = num if is_in_order else int(common.query_start_loc_cpu[num])
        width = min(-(-common.max_seq_len // self._block_tokens), self._map.tables.shape[2])
        self._grow(StepLimits(num, tokens, width))
        anchors = common.block_table_tensor[:num, 0]
        self._anchors.down(anchors)
        out = Gathered(
            tables=self._tables[: num * groups, :width],
            slots=self._slots.there[: tokens * groups],
            starts=self._starts.there[: num * groups + 1],
            lasts=self._lasts.there[: num * groups],
        )
        starts, lasts = common.query_start_loc[: num + 1], common.seq_lens[:num]
        self._gather(self._map, anchors, starts, lasts, out, self._block_tokens, is_in_order)
        starts_cpu, bound = common.query_start_loc_cpu[: num + 1], common.seq_lens_cpu_upper_bound[:num]
        if is_in_order:
            every = self._counting[: num * groups + 1]
            # Padded requests have no tokens: their sequences begin where all others end.
            padded_starts = every if int(starts_cpu[num]) == num else every.clamp(max=int(starts_cpu[num]) * groups)
            lasts_cpu = bound.repeat_interleave(groups)
        else:
            begins = self._counting[:groups, None] * tokens + starts_cpu[:num]
            padded_starts = torch.cat([begins.flatten(), self._counting[:1] + tokens * groups])
            lasts_cpu = bound.repeat(groups)
        return LocalSequences(
            tables=out.tables,
            slots=out.slots,
            starts=out.starts,
            lasts=out.lasts,
            starts_cpu=padded_starts,
            lasts_cpu=lasts_cpu,
            is_in_order=is_in_order,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
        )

    def read_anchors(self, num: int) -> IntArray:
        """Return the anchors of the last step that was gathered."""
        self._anchors.wait()
        anchors: IntArray = self._anchors.here[:num].numpy()
        return anchors

    def put(self, part: VirtualBatch, tables: Table, slots: IntArray) -> LocalSequences:
        """Return the sequences of a part of a step, which the host has selected; ``tables`` is [N, width]."""
        num, width = tables.shape
        self._map.update()  # not needed here, but changes would pile up
        self._grow(StepLimits(-(-num // self._groups), -(-len(slots) // self._groups), width))
        starts, lasts = part.starts.astype(np.int32), part.lasts.astype(np.int32)
        self._sent.wait()
        sent = self._sent.here[: num * width]
        sent.copy_(torch.from_numpy(tables.reshape(-1)))
        self._tables[:num, :width].copy_(self._sent.up(num * width).view(num, width))
        return LocalSequences(
            tables=self._tables[:num, :width],
            slots=self._slots.put(slots),
            starts=self._starts.put(starts),
            lasts=self._lasts.put(lasts),
            starts_cpu=torch.from_numpy(starts),
            lasts_cpu=torch.from_numpy(lasts),
            is_in_order=part.is_in_order,
            max_query_len=int(part.counts.max()),
            max_seq_len=int(part.lasts.max()),
            requests=part.requests,
        )

    def sort(self, tokens: int, parts: Sequence[VirtualBatch]) -> Sorting:
        """Return the order of a step's rows by device; ``parts`` are those of all devices, this one first."""
        order = np.concatenate([part.rows for part in parts])
        places = np.full(tokens * self._groups, len(order), np.int64)
        places[order] = np.arange(len(order))
        self._grow(StepLimits(0, tokens, 0))
        return Sorting(order=self._order.put(order), places=self._places.put(places))

    def _grow(self, needed: StepLimits) -> None:
        have = self._limits
        if needed.requests <= have.requests and needed.tokens <= have.tokens and needed.blocks <= have.blocks:
            return
        requests, tokens, blocks = self._limits = StepLimits(*map(max, have, needed))
        sequences, device = requests * self._groups, self.device
        self._tables = torch.zeros(sequences, blocks, dtype=torch.int32, device=device)
        self._sent = Staged((sequences * blocks,), torch.int32, device)
        self._slots = Staged((tokens * self._groups,), torch.int64, device)
        self._starts = Staged((sequences + 1,), torch.int32, device)
        self._lasts = Staged((sequences,), torch.int32, device)
        self._anchors = Staged((requests,), torch.int32, device)
        self._order, self._places = (Staged((tokens * self._groups,), torch.int64, device) for _ in range(2))
        self._counting = torch.arange(sequences + 1, dtype=torch.int32)
        self._gather = gather_on(device)


class Gathered(NamedTuple):
    """Where a gathering writes: the tensors of `LocalSequences`."""

    tables: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    lasts: torch.Tensor


class _DeviceMap:
    """The head map's rows and tables on the device. On a CPU they are the head map's own."""

    rows: torch.Tensor  # row of each anchor, 0 if it has none, shape [blocks]
    tables: torch.Tensor  # shape [rows, G, width]

    def __init__(self, heads: RankHeadMap, device: torch.device) -> None:
        self._heads, self._device = heads, device
        self._is_here = device.type == "cpu"
        self._shape: tuple[int, ...] = ()
        if not self._is_here:
            heads.changes = []
            self._places = Staged((_MOST_CHANGES,), torch.int64, device)
            self._numbers = Staged((_MOST_CHANGES,), torch.int32, device)

    def update(self) -> None:
        """Send what has changed since the last call."""
        heads = self._heads
        if self._is_here:
            if self._shape != heads.tables.shape:
                self._shape = heads.tables.shape
                self.rows, self.tables = torch.from_numpy(heads.row_of), torch.from_numpy(heads.tables)
            return
        changes = heads.changes
        assert changes is not None, "they are kept from the beginning"
        num = sum(len(numbers) for _, numbers in changes)
        if self._shape != heads.tables.shape or num > _MOST_CHANGES:
            self._send_all()
        elif num:
            places = np.concatenate([place + np.arange(len(numbers)) for place, numbers in changes])
            numbers = np.concatenate([numbers for _, numbers in changes]).astype(np.int32)
            self._flat.index_copy_(0, self._places.put(places), self._numbers.put(numbers))
        changes.clear()

    def _send_all(self) -> None:
        """Send the whole map, which the host waits for: it has grown, which it does a few times in an engine's life."""
        heads = self._heads
        self._shape = heads.tables.shape
        numbers = np.concatenate([heads.row_of.astype(np.int32), heads.tables.reshape(-1)])
        self._flat = torch.from_numpy(numbers).to(self._device)
        self.rows, tables = self._flat[: len(heads.row_of)], self._flat[len(heads.row_of) :]
        self.tables = tables.view(self._shape)


def gather_on(device: torch.device) -> Any:
    """Return the function that gathers on a device: a Triton kernel on a GPU, torch elsewhere."""
    if device.type == "cuda":
        from hetis.runtime.vllm.ranks.gather_triton import gather_by_triton

        return gather_by_triton
    return gather_by_torch


def gather_by_torch(
    of: Any,
    anchors: torch.Tensor,
    starts: torch.Tensor,
    lasts: torch.Tensor,
    out: Gathered,
    block_tokens: int,
    is_in_order: bool,
) -> None:
    """Write the virtual sequences of a step.

    Args:
        of: the head map on the device: ``rows`` [blocks] and ``tables`` [rows, G, width].
        anchors, starts, lasts: the requests' anchors [R], first tokens [R + 1], and tokens after the step [R].
        out: where to write, of exactly the step's sizes.
        is_in_order: each request has one token, or none if it is padding; sequences are in order of requests.
            Otherwise they are in order of groups, and there is no padding.
    """
    num, (_, groups, _), width = len(anchors), of.tables.shape, out.tables.shape[1]
    rows, counts = of.rows[anchors], starts[1:] - starts[:-1]
    number = torch.arange(groups, dtype=torch.int32, device=anchors.device)
    found = of.tables[:, :, :width][rows]
    if is_in_order:
        positions = (lasts - 1).clamp_(min=0)
        blocks = of.tables[rows, :, positions // block_tokens].long()
        slots = blocks * block_tokens + (positions % block_tokens)[:, None]
        out.slots.view(num, groups).copy_(slots.masked_fill_((counts == 0)[:, None], -1))
        out.tables.unflatten(0, (num, groups)).copy_(found)
        out.lasts.view(num, groups).copy_(lasts[:, None])
        out.starts[:-1].view(num, groups).copy_(starts[:-1, None] * groups + number * counts[:, None])
        out.starts[-1:].copy_(starts[-1:] * groups)
        return
    tokens = len(out.slots) // groups
    every = torch.arange(num, dtype=torch.int32, device=anchors.device)
    request = torch.repeat_interleave(every, counts, output_size=tokens)
    positions = torch.arange(tokens, dtype=torch.int32, device=anchors.device)
    positions += (lasts - starts[1:])[request]
    blocks = of.tables[rows[request], :, positions // block_tokens].long()
    out.slots.view(groups, tokens).copy_((blocks * block_tokens + (positions % block_tokens)[:, None]).T)
    out.tables.unflatten(0, (groups, num)).copy_(found.transpose(0, 1))
    out.lasts.view(groups, num).copy_(lasts)
    out.starts[:-1].view(groups, num).copy_(starts[:-1] + number[:, None] * tokens)
    out.starts[-1:].fill_(tokens * groups)
