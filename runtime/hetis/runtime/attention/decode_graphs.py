"""Decode steps as CUDA graphs: the copy of the received data, the kernels and the copy back are launched at once.

For a step with few sequences, launching them one by one takes longer than running them, and it happens in every layer
while an engine waits. A graph fixes every address and size. Therefore everything of a step is in buffers that are never
moved, with the layer's number among the inputs, and sizes are rounded up to powers of two: surplus rows have no slot
and surplus tiles no positions. A step whose size is new runs without a graph, which compiles its kernels, and is
captured the next time.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch

from hetis.runtime.attention import paged_triton
from hetis.runtime.attention.kv import Array, IntArray, PagePool
from hetis.runtime.attention.paged_triton import Launch, TritonBackend, launch

MOST_SEQUENCES = 512  # a power of two; larger ones were not tried (on an H100, 512 took 140 microseconds, 311 before)
MOST_PART_BYTES = 32 << 20  # limit for the outputs of all splits of a step
HEADER_BYTES = 16  # the layer and the table's width, int64 [2], before the rows; keeps these aligned
_log = logging.getLogger(__name__)


class _Size(NamedTuple):
    """The rows of a step and the splits of its longest sequence, each rounded up to a power of two."""

    rows: int
    splits: int


class GraphBackend(TritonBackend):
    """The kernels over one pool. Small steps of decodes that come from a channel run as graphs."""

    def __init__(self, pool: PagePool, *, capability: tuple[int, int]) -> None:
        """Initialise for a pool whose device has this compute ``capability``."""
        super().__init__(pool, capability=capability)
        shape, device = pool.shape, pool.k.device
        self._is_cuda = device.type == "cuda"
        self._captures = self._is_cuda  # Triton's interpreter has no graphs
        r, d, most, dtype = shape.queries_per_group, shape.head_dim, MOST_SEQUENCES, shape.torch_dtype
        size = HEADER_BYTES + most * (r + 2) * d * shape.item_bytes
        # In the host's memory: the data received from a channel and the outputs that it sends, both with numpy views.
        self._came = torch.zeros(size, dtype=torch.uint8, pin_memory=self._is_cuda)
        self._goes = torch.zeros(most, r, d, dtype=dtype, pin_memory=self._is_cuda)
        words = self._came.numpy()
        self._header = words[:HEADER_BYTES].view(np.int64)
        self._rows: Array = words[HEADER_BYTES:].view(shape.numpy_dtype).reshape(most, r + 2, d)
        self._answers: Array = self._goes.view(torch.uint8).numpy().view(shape.numpy_dtype)
        # On the device: a copy of the received data, with views of its header and rows, the outputs, and the step's
        # slots, tiles and pages.
        self._inputs = torch.zeros(size, dtype=torch.uint8, device=device)
        self._place = self._inputs[:HEADER_BYTES].view(torch.int64)
        self._qkv = self._inputs[HEADER_BYTES:].view(dtype).view(most, r + 2, d)
        self._out = torch.zeros(most, r, d, dtype=dtype, device=device)
        self._stored = torch.zeros(most, dtype=torch.int64, device=device)
        self._tiles = torch.zeros(most, 4, dtype=torch.int32, device=device)
        self._pages = torch.zeros(most, dtype=torch.int32, device=device)
        # All sizes share these: the outputs of splits, and their sums of weights.
        self._parts = torch.zeros(MOST_PART_BYTES // 4, device=device)
        self._sums = torch.zeros(MOST_PART_BYTES // 4 // d, device=device)
        self._graphs: dict[tuple[_Size, int], torch.cuda.CUDAGraph | None] = {}  # by size and window; None: seen once
        self._size: _Size | None = None  # None: the step does not run as a graph
        self._width = 0  # pages per row of the step's table
        self._later: tuple[IntArray, IntArray] | None = None  # the step, in case tensors are attended to after all

    def plan(self, rows: IntArray, positions: IntArray, counts: IntArray | None = None) -> None:
        is_decode = counts is None or int(counts.max(initial=1)) == 1
        self._size = self._fitting(positions) if is_decode else None
        self._later = None
        if self._size is None:
            super().plan(rows, positions, counts)
        else:
            self._fill(self._size, rows, positions)
            self._later = rows, positions

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        if self._later is not None:
            super().plan(*self._later)
            self._later = None
        return super().attend(layer, qkv)

    def attend_array(self, layer: int, qkv: Array) -> Array | torch.Tensor:
        if self._size is None:
            return super().attend_array(layer, qkv)
        self._header[:] = layer, self._width
        np.copyto(self._rows[: len(qkv)], qkv)
        self._run(self._size, self.pool.shape.windows[layer])
        return self._answers[: len(qkv)].copy()

    def _fitting(self, positions: IntArray) -> _Size | None:
        """Return the size of a step of decodes, or None if it has too many sequences or too long ones."""
        if not 0 < len(positions) <= MOST_SEQUENCES:
            return None
        size = _Size(_power(max(len(positions), 8)), _power(-(-(int(positions.max()) + 1) // paged_triton.SPLIT)))
        part_bytes = 4 * size.splits * size.rows * self.few.block_m * self.pool.shape.head_dim
        return size if size.splits == 1 or part_bytes <= MOST_PART_BYTES else None

    def _fill(self, size: _Size, rows: IntArray, positions: IntArray) -> None:
        """Write a step's slots, tiles and pages to their buffers."""
        pool, count = self.pool, len(rows)
        self._width = pool.shape.pages(int(positions.max()) + 1)
        slots = np.full(size.rows, -1)
        slots[:count] = pool.slot_numbers(rows, positions)
        tiles = np.zeros((size.rows, 4), np.int32)
        tiles[:count] = np.stack((np.arange(count), positions, np.arange(count), np.ones_like(rows)), axis=1)
        pages = torch.from_numpy(np.ascontiguousarray(pool.table[rows, : self._width])).flatten()
        if len(pages) > len(self._pages):
            self._pages = self._pages.new_zeros(_power(len(pages)))
            self._graphs.clear()
        self._stored[: size.rows].copy_(torch.from_numpy(slots))
        self._tiles[: size.rows].copy_(torch.from_numpy(tiles))
        self._pages[: len(pages)].copy_(pages)

    def _run(self, size: _Size, window: int) -> None:
        """Attend to the received data, and wait for the outputs."""
        key = size, window
        graph = self._graphs.get(key)
        if graph is None and self._captures and key in self._graphs:
            graph = self._graphs[key] = self._captured(size, window)
        if graph is not None:
            graph.replay()
        else:
            self._launch_all(size, window)
            self._graphs.setdefault(key)
        if self._is_cuda:
            torch.cuda.current_stream(self.pool.k.device).synchronize()

    def _captured(self, size: _Size, window: int) -> torch.cuda.CUDAGraph | None:
        """Return a graph, or None if the GPU refuses it, for example because it is full; then no more are captured."""
        stream, graph = torch.cuda.current_stream(self.pool.k.device), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._launch_all(size, window)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves its own if a capture cannot be ended
            _log.warning("decodes are no longer captured as CUDA graphs: %s", str(error).partition("\n")[0])
            self._captures = False
            return None
        return graph

    def _launch_all(self, size: _Size, window: int) -> None:
        """Launch both copies and the kernels between them, which is what a graph holds."""
        count, splits = size
        rows = slice(count)
        used = HEADER_BYTES + count * self._qkv[0].nbytes
        self._inputs[:used].copy_(self._came[:used], non_blocking=True)
        parts, sums = (self._parts, self._sums) if splits > 1 else (None, None)
        launches = [Launch(self.few, self._tiles[rows], splits, parts, sums)]
        out = self._out[rows]
        launch(self.pool, self._place, window, self._qkv[rows], self._stored[rows], self._pages, launches, out)
        self._goes[rows].copy_(out, non_blocking=True)


def _power(number: int) -> int:
    """Return the least power of two that is at least ``number``."""
    return 1 << (number - 1).bit_length()
