"""`gather_by_torch` as one Triton kernel: a program for each virtual sequence."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_PIECE = 128  # numbers of a table, or tokens, at a time
# Triton would compile anew for values that are 1 or multiples of 16.
_NUMBERS = ["num", "tokens", "width", "anchor_stride", "map_row_stride", "map_group_stride", "table_stride"]


@triton.jit(do_not_specialize=_NUMBERS)  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    rows_ptr,
    map_ptr,
    anchors_ptr,
    starts_ptr,
    lasts_ptr,
    tables_ptr,
    slots_ptr,
    out_starts_ptr,
    out_lasts_ptr,
    num,
    tokens,
    width,
    anchor_stride,
    map_row_stride,
    map_group_stride,
    table_stride,
    BLOCK_TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    IN_ORDER: tl.constexpr,
    PIECE: tl.constexpr,
):
    request, group = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows_ptr + tl.load(anchors_ptr + request * anchor_stride)).to(tl.int64)
    start, end = tl.load(starts_ptr + request), tl.load(starts_ptr + request + 1)
    last, count = tl.load(lasts_ptr + request), end - start
    if IN_ORDER:
        sequence = request * GROUPS + group
        begin = start * GROUPS + group * count
    else:
        sequence = group * num + request
        begin = group * tokens + start
    tl.store(out_starts_ptr + sequence, begin)
    tl.store(out_lasts_ptr + sequence, last)
    if sequence == num * GROUPS - 1:
        tl.store(out_starts_ptr + num * GROUPS, begin + count)
    table = map_ptr + row * map_row_stride + group * map_group_stride
    out_table = tables_ptr + sequence.to(tl.int64) * table_stride
    offsets = tl.arange(0, PIECE)
    for first in range(0, width, PIECE):
        at = first + offsets
        tl.store(out_table + at, tl.load(table + at, mask=at < width, other=0), mask=at < width)
    if IN_ORDER and count == 0:
        # The slot of padding is that of the request's own number: there are as many tokens as requests.
        tl.store(slots_ptr + request * GROUPS + group, tl.full((), -1, tl.int64))
    for first in range(0, count, PIECE):
        token = first + offsets
        position = last - count + token
        block = tl.load(table + position // BLOCK_TOKENS, mask=token < count, other=0).to(tl.int64)
        slot = block * BLOCK_TOKENS + position % BLOCK_TOKENS
        tl.store(slots_ptr + begin + token, slot, mask=token < count)


def gather_by_triton(
    of: Any,
    anchors: torch.Tensor,
    starts: torch.Tensor,
    lasts: torch.Tensor,
    out: Any,
    block_tokens: int,
    is_in_order: bool,
) -> None:
    """Write the virtual sequences of a step; arguments as of `gather_by_torch`."""
    num, groups = len(anchors), of.tables.shape[1]
    _gather[(num, groups)](
        of.rows,
        of.tables,
        anchors,
        starts,
        lasts,
        out.tables,
        out.slots,
        out.starts,
        out.lasts,
        num,
        len(out.slots) // groups,
        out.tables.shape[1],
        anchors.stride(0),
        of.tables.stride(0),
        of.tables.stride(1),
        out.tables.stride(0),
        BLOCK_TOKENS=block_tokens,
        GROUPS=groups,
        IN_ORDER=is_in_order,
        PIECE=_PIECE,
    )
