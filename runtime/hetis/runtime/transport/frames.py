"""Frames: a header of 64 bytes, and a body whose length the header says.

Little-endian. Every frame names the engine's term (``epoch``) and the connection (``session``) that it belongs to, so
that what an old engine or an old connection sent is seen to be old, and a ``serial``, which an answer repeats.

| kind | counts | body |
| --- | --- | --- |
| HELLO (layer: how many) | head_dim, r, page_tokens | windows i64 [layers], scale f64, soft cap f64, key |
| BEGIN | N, T | requests, incarnations, heads, first positions, and how many unless T is N: i64 [4 or 5, N] |
| ATTEND | T | queries, key and value of each position: [T, r + 2, d] |
| FINISH, ABORT, PING, BYE | | |
| DROP | N | (request, incarnation, head): i64 [N, 3] |
| EXPORT, DIGEST | H | request, incarnation, first, last, heads: i64 [4 + H] |
| ADOPT | H, positions | the numbers of EXPORT; K, V [H, layers, positions, d] |
| ATTACH | | path of the shared memory |
| WELCOME | | pages i64, name |
| OUT | T | [T, r, d] |
| KV | H, positions | K, V [H, layers, positions, d] |
| DIGESTS | H | i64 [H, layers] |
| PONG | | numbers of a `WorkerStats` i64 |
| ERROR | code | needed i64, free i64, text |
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hetis.runtime.transport.errors import FrameError

MAGIC = 0x53495448  # "HTIS"
VERSION = 3
HEADER = struct.Struct("<IHBBQQQQIIIIQ")
HEADER_BYTES = HEADER.size
MOST_BODY_BYTES = 1 << 32
Bytes = npt.NDArray[np.uint8]
Numbers: TypeAlias = torch.Tensor | npt.NDArray[Any]
DTYPES = ("", "float32", "float64", "bfloat16", "float16")


class FrameKind(IntEnum):
    """The kind of a frame. Kinds from WELCOME on are answers."""

    HELLO = 1
    BEGIN = 2
    ATTEND = 3
    FINISH = 4
    ABORT = 5
    DROP = 6
    EXPORT = 7
    ADOPT = 8
    DIGEST = 9
    PING = 10
    BYE = 11
    ATTACH = 12
    WELCOME = 32
    OUT = 33
    KV = 34
    DIGESTS = 35
    PONG = 36
    ERROR = 37


class Frame(NamedTuple):
    """One message.

    Attributes:
        kind: of the message.
        epoch: of the engine.
        session: connection that it belongs to, unique at its worker.
        serial: of the request; an answer repeats it.
        step: decode step, or 0 if it concerns none.
        layer: within the stage.
        counts: numbers whose meaning depends on the kind.
        dtype: of the numbers in the body. Empty: there are none.
        parts: consecutive parts of the body. A received frame has one part, of bytes: `body` or `raw`.
    """

    kind: FrameKind
    epoch: int
    session: int
    serial: int = 0
    step: int = 0
    layer: int = 0
    counts: tuple[int, int, int] = (0, 0, 0)
    dtype: str = ""
    parts: tuple[Numbers, ...] = ()

    @property
    def body_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def body(self) -> torch.Tensor:
        """The body of a received frame as bytes, shape [body_bytes]."""
        return torch.from_numpy(self.raw)

    @property
    def raw(self) -> Bytes:
        """The body of a received frame as a numpy array of bytes."""
        assert len(self.parts) == 1, "only a frame that was received has its body in one piece"
        [body] = self.parts
        return body.numpy() if isinstance(body, torch.Tensor) else body

    def answered(
        self,
        kind: FrameKind,
        *,
        counts: tuple[int, int, int] = (0, 0, 0),
        dtype: str = "",
        parts: tuple[Numbers, ...] = (),
    ) -> Frame:
        """Return an answer to this frame, which keeps the fields that identify the request."""
        return self._replace(kind=kind, counts=counts, dtype=dtype, parts=parts)


def header_of(frame: Frame) -> bytes:
    """Return the 64 bytes that precede a frame's body."""
    return HEADER.pack(
        MAGIC,
        VERSION,
        frame.kind,
        DTYPES.index(frame.dtype),
        frame.epoch,
        frame.session,
        frame.serial,
        frame.step,
        frame.layer,
        *frame.counts,
        frame.body_bytes,
    )


def read_header(header: bytes | bytearray, *, most_body_bytes: int = MOST_BODY_BYTES) -> tuple[Frame, Bytes]:
    """Return a frame, and the array to read its body into.

    Raises:
        FrameError: the frame is not ours, of another version, of unknown kind or dtype, or too long.
    """
    if len(header) != HEADER_BYTES:
        raise FrameError(f"a header has {HEADER_BYTES} bytes, {len(header)} came")
    magic, version, kind, dtype, epoch, session, serial, step, layer, a, b, c, body_bytes = HEADER.unpack(header)
    if magic != MAGIC:
        raise FrameError(f"no frame begins with {magic:#010x}")
    if version != VERSION:
        raise FrameError(f"a frame of version {version}, this is version {VERSION}")
    if kind not in _KINDS or dtype >= len(DTYPES):
        raise FrameError(f"a frame of kind {kind} and dtype {dtype}, which are not known")
    if body_bytes > most_body_bytes:
        raise FrameError(f"a body of {body_bytes} bytes, {most_body_bytes} are the most")
    body = np.empty(body_bytes, np.uint8)
    frame = Frame(_KINDS[kind], epoch, session, serial, step, layer, (a, b, c), DTYPES[dtype], (body,))
    return frame, body


def bytes_of(numbers: Numbers) -> memoryview:
    """Return the memory of a tensor or array, copied only if it is not contiguous or not on the CPU."""
    if isinstance(numbers, torch.Tensor):
        # Check first: with cold caches, calls into torch that do nothing cost as much as those that do something.
        tensor = numbers if numbers.is_cpu else numbers.cpu()
        tensor = tensor.detach() if tensor.requires_grad else tensor
        # numpy has no bfloat16.
        numbers = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    # An empty view cannot be cast.
    return np.ascontiguousarray(numbers).data.cast("B") if numbers.size else memoryview(b"")


_KINDS = {int(kind): kind for kind in FrameKind}
