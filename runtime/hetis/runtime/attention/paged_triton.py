"""Attention over pages in Triton: CUDA devices of compute capability 7.5 and above; float16, bfloat16 and float32.

One kernel does decodes and chunks of prompts. A *tile* is a run of consecutive positions of one virtual sequence with
their r query heads each, as rows of one matrix; its program reads the pages that these rows see. A tile of few rows,
such as any decode, is read in *splits* of a fixed number of positions, one program each, which `combine` merges, so
that few sequences with long contexts keep the whole device busy. Because the splits are fixed, a sequence gives the
same bits alone and among others.

Triton's language has no types that mypy knows. The kernels' arguments are pointers (`k`, for example, points to pages
[pages, page_tokens, d]), integers and floats; those in capitals are compile-time constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from hetis.runtime.attention.kv import Array, IntArray, KvShape, PagePool

LEAST_CAPABILITY_TENSOR_CORES = (8, 0)  # below it, Triton uses none and multiplies in float32, never in bfloat16
SPLIT = 512  # positions per program of `attend` if there are splits: a multiple of the block size
LOG2_E = tl.constexpr(1.4426950408889634)  # GPUs compute powers of 2 faster than those of e


@triton.jit(do_not_specialize=["layer_slots"])  # type: ignore[untyped-decorator]
def store(  # type: ignore[no-untyped-def]
    qkv, k, v, where, layer_slots, slots, D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write the key and value of each row of qkv [T, R + 2, D] to ``slots`` [T] of the pages of a layer.

    There is one program per row; rows with a negative slot are not positions.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(slots + row)
    is_stored = (d < D) & (slot >= 0)
    source = qkv + (row * (R + 2) + R) * D + d
    target = (tl.load(where) * layer_slots + slot) * D + d
    tl.store(k + target, tl.load(source, mask=is_stored), mask=is_stored)
    tl.store(v + target, tl.load(source + D, mask=is_stored), mask=is_stored)


@triton.jit  # type: ignore[untyped-decorator]
def load_rows(  # type: ignore[no-untyped-def]
    numbers, places, is_there, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDENS: tl.constexpr, IS_MASKED: tl.constexpr
):
    """Return keys or values [BLOCK_N, BLOCK_D] at ``places`` of the pages; without IS_MASKED, all rows are there."""
    d = tl.arange(0, BLOCK_D)
    if IS_MASKED:
        rows = tl.load(numbers + places, mask=is_there[:, None] & (d < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        rows = tl.load(numbers + places)
    else:
        rows = tl.load(numbers + places, mask=(d < D)[None, :], other=0.0)
    if WIDENS:
        rows = rows.to(tl.float32)
    return rows


@triton.jit  # type: ignore[untyped-decorator]
def attend_blocks(  # type: ignore[no-untyped-def]
    outputs,
    total,
    top,
    q,
    at,
    k,
    v,
    pages,
    first,
    last,
    end,
    scale,
    soft_cap,
    window,
    D: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDENS: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Add the positions from ``first`` to ``last - 1`` to a tile's outputs, sums of weights and largest scores.

    Scores are logarithms to base 2. Without IS_MASKED, every row must see all of these positions.
    """
    d = tl.arange(0, BLOCK_D)
    for begin in range(first, last, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        if IS_MASKED:
            page = tl.load(pages + n // PAGE_TOKENS, mask=n < end, other=0).to(tl.int64)
        else:
            page = tl.load(pages + n // PAGE_TOKENS).to(tl.int64)
        places = ((page * PAGE_TOKENS + n % PAGE_TOKENS) * D)[:, None] + d[None, :]
        keys = load_rows(k, places, n < end, D, BLOCK_D, WIDENS, IS_MASKED)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if HAS_CAP:
            capped = 1 - 2 / (tl.exp2(scores * (2 * scale * LOG2_E / soft_cap)) + 1)  # tanh
            scores = capped * (soft_cap * LOG2_E)
        else:
            scores = scores * (scale * LOG2_E)
        if IS_MASKED:
            is_seen = (n[None, :] <= at[:, None]) & (n < end)[None, :]
            if HAS_WINDOW:
                is_seen = is_seen & (n[None, :] > at[:, None] - window)
            scores = tl.where(is_seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top
        if IS_MASKED:
            base = tl.where(new_top == -float("inf"), 0.0, new_top)  # for a row that has seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        fades = tl.exp2(top - base)
        total = total * fades + tl.sum(weights, 1)
        values = load_rows(v, places, n < end, D, BLOCK_D, WIDENS, IS_MASKED)
        outputs = outputs * fades[:, None]
        outputs = tl.dot(weights.to(values.dtype), values, outputs, input_precision="ieee")
        top = new_top
    return outputs, total, top


@triton.jit(do_not_specialize=["layer_slots", "window"])  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    qkv,
    k,
    v,
    where,
    layer_slots,
    table,
    tiles,
    out,
    sums,
    scale,
    soft_cap,
    window,
    D: tl.constexpr,
    R: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDENS: tl.constexpr,
):
    """Compute the outputs of each tile, or of each split of it.

    Args:
        where: the layer, and the width of ``table``, int64 [2]. They are in memory so that a CUDA graph can serve all.
        layer_slots: positions in a layer's pages.
        table: pages of every sequence, int32 [N, width].
        tiles: sequence, first position, first row and number of positions of each, int32 [tiles, 4].
        out: [T, R, D]; with splits, float32 [splits, tiles, BLOCK_M, D].
        sums: with splits, logarithms to base 2 of the sums of weights, float32 [splits, tiles, BLOCK_M].
        window: positions that a row sees, including its own, if HAS_WINDOW.
        SPLIT: positions per program; 0: all.
        WIDENS: convert numbers to float32 before they are multiplied.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    layer, table_width = tl.load(where), tl.load(where + 1)
    k += layer * layer_slots * D  # multiplied by a constant last, from which Triton sees how far both stay aligned
    v += layer * layer_slots * D
    sequence = tl.load(tiles + tile * 4).to(tl.int64)
    position = tl.load(tiles + tile * 4 + 1)
    row = tl.load(tiles + tile * 4 + 2).to(tl.int64)
    count = tl.load(tiles + tile * 4 + 3)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token, head = m // R, m % R
    is_row, at = token < count, position + token
    places = ((row + token) * (R + 2) + head)[:, None] * D + d[None, :]
    q = tl.load(qkv + places, mask=is_row[:, None] & (d < D)[None, :], other=0.0)
    if WIDENS:
        q = q.to(tl.float32)
    begin, end = 0, position + count
    if HAS_WINDOW:
        begin = tl.maximum(position + 1 - window, 0)
    if SPLIT:
        begin, end = tl.maximum(begin, split * SPLIT), tl.minimum(end, (split + 1) * SPLIT)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    outputs = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Blocks begin where they would without a window or splits, so that the order of sums is the same. Those from
    # `whole` to `partial` are seen in full by all rows, and need no masks.
    first = begin // BLOCK_N * BLOCK_N
    partial = tl.maximum(tl.minimum(position + 1, end) // BLOCK_N * BLOCK_N, first)
    pages = table + sequence * table_width
    if HAS_WINDOW:
        whole = tl.minimum(tl.maximum(tl.cdiv(position + count - window, BLOCK_N) * BLOCK_N, first), partial)
        outputs, total, top = attend_blocks(
            outputs, total, top, q, at, k, v, pages, first, whole, end, scale, soft_cap, window,
            D, PAGE_TOKENS, BLOCK_N, BLOCK_D, HAS_WINDOW, HAS_CAP, WIDENS, True,
        )  # fmt: skip
        first = whole
    outputs, total, top = attend_blocks(
        outputs, total, top, q, at, k, v, pages, first, partial, end, scale, soft_cap, window,
        D, PAGE_TOKENS, BLOCK_N, BLOCK_D, HAS_WINDOW, HAS_CAP, WIDENS, False,
    )  # fmt: skip
    outputs, total, top = attend_blocks(
        outputs, total, top, q, at, k, v, pages, partial, end, end, scale, soft_cap, window,
        D, PAGE_TOKENS, BLOCK_N, BLOCK_D, HAS_WINDOW, HAS_CAP, WIDENS, True,
    )  # fmt: skip
    total = tl.where(total == 0, 1.0, total)  # for a row that has seen nothing here: its top is -inf
    outputs = outputs / total[:, None]
    if SPLIT:
        at_partial = (split * tl.num_programs(0) + tile).to(tl.int64) * BLOCK_M + m
        tl.store(sums + at_partial, top + tl.log2(total), mask=is_row)
        tl.store(out + at_partial[:, None] * D + d[None, :], outputs, mask=is_row[:, None] & (d < D)[None, :])
    else:
        places = ((row + token) * R + head)[:, None] * D + d[None, :]
        tl.store(out + places, outputs.to(out.dtype.element_ty), mask=is_row[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["splits"])  # type: ignore[untyped-decorator]
def combine(  # type: ignore[no-untyped-def]
    parts,
    sums,
    tiles,
    splits,
    out,
    D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the splits that `attend` left into out [T, R, D]; one program per row of each tile."""
    tile, m = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, count = tl.load(tiles + tile * 4 + 2).to(tl.int64), tl.load(tiles + tile * 4 + 3)
    if m < count * R:
        d = tl.arange(0, BLOCK_D)
        rows = tl.num_programs(0).to(tl.int64) * BLOCK_M
        place = tile * BLOCK_M + m
        top = tl.load(sums + place)
        for split in range(1, splits):
            top = tl.maximum(top, tl.load(sums + split * rows + place))
        total = 0.0
        outputs = tl.zeros([BLOCK_D], tl.float32)
        for split in range(splits):
            weight = tl.exp2(tl.load(sums + split * rows + place) - top)
            total += weight
            part = tl.load(parts + (split * rows + place) * D + d, mask=d < D, other=0.0)
            outputs += weight * part
        tl.store(out + (row * R + m) * D + d, (outputs / total).to(out.dtype.element_ty), mask=d < D)


class Sizes(NamedTuple):
    """The sizes of a launch of `attend`: constants of the kernel, and Triton's launch options."""

    block_m: int
    block_n: int
    block_d: int
    widens: bool
    warps: int
    stages: int

    def constants(self, shape: KvShape, *, has_splits: bool, has_window: bool) -> dict[str, int | bool]:
        """Return the constants of `attend`."""
        return {
            "D": shape.head_dim,
            "R": shape.queries_per_group,
            "PAGE_TOKENS": shape.page_tokens,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_D": self.block_d,
            "SPLIT": SPLIT if has_splits else 0,
            "HAS_WINDOW": has_window,
            "HAS_CAP": shape.soft_cap > 0,
            "WIDENS": self.widens,
        }


def sizes_of(shape: KvShape, capability: tuple[int, int], *, is_chunk: bool) -> Sizes:
    """Return sizes that fit into the shared memory and registers of a device. Tiles of a chunk have more rows."""
    block_d = max(16, triton.next_power_of_2(shape.head_dim))
    least = max(16, triton.next_power_of_2(shape.queries_per_group))
    is_old = capability < LEAST_CAPABILITY_TENSOR_CORES
    bytes_of_row = block_d * (4 if is_old else shape.item_bytes)
    block_n = min(64, max(16, 16384 // bytes_of_row))
    rows = 64 if bytes_of_row <= 512 else 32
    return Sizes(
        block_m=max(least, rows) if is_chunk else least,
        block_n=block_n,
        block_d=block_d,
        widens=shape.dtype == "bfloat16" and is_old,
        # Eight warps take twice as long for prompts in 16 bits (measured on an H100).
        warps=8 if is_chunk and block_d >= 128 and (is_old or block_d > 128 or shape.item_bytes > 2) else 4,
        stages=1 if is_old else 2,
    )


class Launch(NamedTuple):
    """Tiles of a step that are cut alike. ``parts`` and ``sums`` are for splits, None if there are none."""

    sizes: Sizes
    tiles: torch.Tensor
    splits: int
    parts: torch.Tensor | None
    sums: torch.Tensor | None


def launch(
    pool: PagePool,
    where: torch.Tensor,
    window: int,
    qkv: torch.Tensor,
    slots: torch.Tensor,
    table: torch.Tensor,
    launches: Sequence[Launch],
    out: torch.Tensor,
) -> None:
    """Store and attend with qkv [T, r + 2, d] into out [T, r, d]; see `attend` for the arguments."""
    shape, (r, d) = pool.shape, out.shape[1:]
    layer_slots, block_d = pool.num_pages * shape.page_tokens, launches[0].sizes.block_d
    store[(len(qkv),)](qkv, pool.k, pool.v, where, layer_slots, slots, D=d, R=r, BLOCK_D=block_d)
    for sizes, tiles, splits, parts, sums in launches:
        attend[(len(tiles), splits)](
            qkv,
            pool.k,
            pool.v,
            where,
            layer_slots,
            table,
            tiles,
            out if parts is None else parts,
            out if sums is None else sums,
            shape.scale,
            shape.soft_cap,
            window,
            **sizes.constants(shape, has_splits=parts is not None, has_window=window > 0),
            num_warps=sizes.warps,
            num_stages=sizes.stages,
        )
        if parts is not None:
            combine[(len(tiles), sizes.block_m)](
                parts, sums, tiles, splits, out, D=d, R=r, BLOCK_M=sizes.block_m, BLOCK_D=block_d, num_warps=1
            )


class TritonBackend:
    """The kernels over one pool."""

    name = "triton"

    def __init__(self, pool: PagePool, *, capability: tuple[int, int]) -> None:
        """Initialise for a pool whose device has this compute ``capability``."""
        self.pool = pool
        self.few = sizes_of(pool.shape, capability, is_chunk=False)
        self._many = sizes_of(pool.shape, capability, is_chunk=True)
        self._slots = self._table = self._where = torch.zeros(0)
        self._launches: list[Launch] = []

    def plan(self, rows: IntArray, positions: IntArray, counts: IntArray | None = None) -> None:
        pool, shape, device = self.pool, self.pool.shape, self.pool.k.device
        if counts is None:
            counts = np.ones_like(rows)
        starts = np.cumsum(counts) - counts
        within = np.arange(counts.sum()) - np.repeat(starts, counts)
        self._slots = pool.slots(np.repeat(rows, counts), np.repeat(positions, counts) + within)
        ends = positions + counts
        width = shape.pages(int(ends.max(initial=1)))
        self._table = torch.from_numpy(np.ascontiguousarray(pool.table[rows, :width])).to(device)
        self._where = torch.tensor([[layer, width] for layer in range(shape.layers)], dtype=torch.int64, device=device)
        sequences = np.stack((np.arange(len(rows)), positions, starts, counts), axis=1)
        is_few = counts * shape.queries_per_group <= self.few.block_m
        self._launches = []
        if is_few.any():
            self._launches.append(self._launch(sequences[is_few], self.few, shape_end=int(ends[is_few].max())))
        if not is_few.all():
            self._launches.append(self._launch(_cut(sequences[~is_few], self._many, shape), self._many, shape_end=0))

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        shape = self.pool.shape
        qkv = qkv.contiguous()
        out = qkv.new_empty(len(qkv), shape.queries_per_group, shape.head_dim)
        if len(qkv):
            where, window = self._where[layer], shape.windows[layer]
            launch(self.pool, where, window, qkv, self._slots, self._table, self._launches, out)
        return out

    def attend_array(self, layer: int, qkv: Array) -> Array | torch.Tensor:
        own = torch.from_numpy(qkv).view(self.pool.shape.torch_dtype)
        return self.attend(layer, own.to(self.pool.k.device)).cpu()

    def _launch(self, tiles: IntArray, sizes: Sizes, *, shape_end: int) -> Launch:
        """Return a launch. ``shape_end`` is the number of positions of the longest sequence, or 0 not to split."""
        device, splits = self.pool.k.device, max(1, -(-shape_end // SPLIT))
        kinds: dict[str, Any] = {"dtype": torch.float32, "device": device}
        size = splits, len(tiles), sizes.block_m
        return Launch(
            sizes=sizes,
            tiles=torch.from_numpy(tiles.astype(np.int32)).to(device),
            splits=splits,
            parts=torch.empty((*size, self.pool.shape.head_dim), **kinds) if splits > 1 else None,
            sums=torch.empty(size, **kinds) if splits > 1 else None,
        )


def _cut(sequences: IntArray, sizes: Sizes, shape: KvShape) -> IntArray:
    """Cut sequences into tiles [tiles, 4], both as (sequence, first position, first row, positions)."""
    most = sizes.block_m // shape.queries_per_group
    cuts = -(-sequences[:, 3] // most)
    within = most * (np.arange(cuts.sum()) - np.repeat(np.cumsum(cuts) - cuts, cuts))
    tiles = np.repeat(sequences, cuts, axis=0)
    tiles[:, 1] += within
    tiles[:, 2] += within
    tiles[:, 3] = np.minimum(tiles[:, 3] - within, most)
    return tiles
