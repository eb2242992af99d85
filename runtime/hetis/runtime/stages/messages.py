"""What the bodies of a stage's frames hold, written and read; every length is checked."""

from __future__ import annotations

import numpy as np
import torch

from hetis.runtime.engine.step import Chunk, IntArray, Step
from hetis.runtime.stages.setup import StageSetup
from hetis.runtime.transport.errors import FrameError
from hetis.runtime.transport.frames import Frame, Kind
from hetis.runtime.transport.keys import KEY_BYTES

_SIZES = 7  # tokens, decoding requests, heads, chunks, outputs, columns of the hidden states, whether it is greedy


def pack_setup(setup: StageSetup, key: bytes) -> tuple[torch.Tensor, ...]:
    """The body of SETUP."""
    return (torch.frombuffer(bytearray(key + setup.to_json().encode()), dtype=torch.uint8),)


def read_setup(frame: Frame) -> tuple[StageSetup, bytes]:
    raw = bytes(frame.raw)
    return StageSetup.from_json(raw[KEY_BYTES:]), raw[:KEY_BYTES]


def pack_run(step: Step, hidden: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """The body of RUN: sizes, the step's numbers one after the other, and the hidden states where there are some."""
    num_heads = step.heads.shape[1]
    columns = 0 if hidden is None else hidden.shape[1]
    sizes = [
        len(step.tokens),
        len(step.requests),
        num_heads,
        len(step.chunks),
        len(step.outputs),
        columns,
        int(step.is_greedy),
    ]
    chunks = [(c.request, c.incarnation, c.first, c.count, c.total, *c.heads) for c in step.chunks]
    arrays = (step.tokens, step.positions, step.requests, step.incarnations, step.heads.ravel(), step.outputs)
    numbers = np.concatenate([np.array(sizes, np.int64), *arrays, np.array(chunks, np.int64).ravel()])
    return (torch.from_numpy(numbers),) if hidden is None else (torch.from_numpy(numbers), hidden)


def read_run(frame: Frame, dtype: str) -> tuple[Step, torch.Tensor | None]:
    """The step, and hidden states [T, hidden] of ``dtype``; None on the first stage."""
    torch_dtype = getattr(torch, dtype)
    sizes = _integers(frame, 0, _SIZES)
    if min(sizes) < 0:
        raise FrameError(f"RUN of sizes {sizes.tolist()}")
    tokens, rows, heads, chunks, outputs, columns, is_greedy = sizes.tolist()
    lengths = [tokens, tokens, rows, rows, rows * heads, outputs, chunks * (5 + heads)]
    begin, numbers = 8 * (_SIZES + sum(lengths)), []
    body_bytes = begin + tokens * columns * torch_dtype.itemsize
    if frame.body_bytes != body_bytes or (columns and frame.dtype != dtype):
        raise FrameError(f"RUN has a body of {frame.body_bytes} bytes of {frame.dtype or 'no dtype'}: {body_bytes}")
    at = _SIZES
    for length in lengths:
        numbers.append(_integers(frame, at, length))
        at += length
    step = Step(
        epoch=frame.epoch,
        number=frame.step,
        tokens=numbers[0],
        positions=numbers[1],
        requests=numbers[2],
        incarnations=numbers[3],
        heads=numbers[4].reshape(rows, heads),
        chunks=tuple(_chunk(row) for row in numbers[6].reshape(chunks, 5 + heads).tolist()),
        outputs=numbers[5],
        is_greedy=bool(is_greedy),
    )
    if not columns:
        return step, None
    return step, frame.body[begin:].view(torch_dtype).view(tokens, columns)


def read_output(frame: Frame, dtype: torch.dtype) -> torch.Tensor:
    """Hidden states or logits of HIDDEN, tokens of TOKENS."""
    if frame.kind is Kind.TOKENS:
        return torch.from_numpy(_integers(frame, 0, frame.counts[0]))
    rows, columns, _ = frame.counts
    if frame.kind is not Kind.HIDDEN or frame.body_bytes != rows * columns * dtype.itemsize:
        raise FrameError(f"{frame.kind.name} of {frame.body_bytes} bytes, HIDDEN [{rows}, {columns}] was expected")
    return frame.body.view(dtype).view(rows, columns)


def read_numbers(frame: Frame, least: int) -> list[int]:
    """The body of COPY, FORGET or WELCOME: at least so many whole numbers, none below 0."""
    numbers = _integers(frame, 0, frame.body_bytes // 8).tolist()
    if len(numbers) < least or min(numbers) < 0:
        raise FrameError(f"{frame.kind.name} has {len(numbers)} numbers, must have {least} or more, none below 0")
    return list(numbers)


def _chunk(row: list[int]) -> Chunk:
    request, incarnation, first, count, total, *heads = row
    return Chunk(request=request, incarnation=incarnation, first=first, count=count, total=total, heads=tuple(heads))


def _integers(frame: Frame, first: int, count: int) -> IntArray:
    if frame.body_bytes < 8 * (first + count):
        raise FrameError(f"{frame.kind.name} has a body of {frame.body_bytes} bytes, too few")
    numbers: IntArray = frame.raw[8 * first : 8 * (first + count)].view("<i8")
    return numbers
