"""Frames: a header of 64 bytes, and a body whose length the header states.

Little-endian. Every frame names its engine (``epoch``) and the connection (``session``) that it belongs to, so that
frames of an old engine or an old connection are recognised, and a ``serial``, which an answer repeats.

| kind | counts | body |
| --- | --- | --- |
| CHALLENGE | | |
| HELLO (layer: how many) | head_dim, r, page_tokens | windows, scale, soft cap, age; whether encrypted; nonce; proof |
| BEGIN | N, T | requests, incarnations, heads, first positions, and how many unless T is N: i64 [4 or 5, N] |
| ATTEND | T | queries, key and value of each position: [T, r + 2, d] |
| FINISH, ABORT, PING, BYE | | |
| DROP | N | (request, incarnation, head): i64 [N, 3] |
| EXPORT | H | request, incarnation, first, last, heads: i64 [4 + H] |
| ADOPT | H, positions | the numbers of EXPORT; K, V [H, layers, positions, d] |
| ATTACH | | path of the shared memory |
| WELCOME | | pages i64, proof, name |
| NONCE | | nonce |
| OUT | T | [T, r, d] |
| KV | H, positions | K, V [H, layers, positions, d] |
| PONG | | free pages, sequences: i64 |
| ERROR | code | needed i64, free i64, text |

HetisError
+-- ChannelError   the channel is no longer usable
    +-- ChannelClosedError    the other end closed it, or died
    +-- ChannelStalledError   nothing arrived, or nothing could be sent, for too long
    +-- FrameError            what arrived is not a valid frame, or not one expected here
"""

from __future__ import annotations

import hmac
import math
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hetis.runtime.attention.device import DeviceStep
from hetis.runtime.attention.kv import IntArray, KvShape, SequenceKey
from hetis.runtime.transport.keys import NONCE_BYTES, PROOF_BYTES, proof_of
from hetis.solver.errors import HetisError

MAGIC = 0x53495448  # "HTIS"
VERSION = 6
HEADER = struct.Struct("<IHBBQQQQIIIIQ")
HEADER_BYTES = HEADER.size
_SAID_BYTES = HEADER_BYTES - 8  # the header without the size of the body, which the proof adds to
MOST_BODY_BYTES = 1 << 32
Bytes = npt.NDArray[np.uint8]
Numbers: TypeAlias = torch.Tensor | npt.NDArray[Any]
DTYPES = ("", "float32", "float64", "bfloat16", "float16")
Array = npt.NDArray[Any]
MOST_LAYERS = 4096
MOST_HEAD_DIM, MOST_QUERIES, MOST_PAGE_TOKENS = 4096, 4096, 1 << 16


class ChannelError(HetisError):
    """The channel failed. The other end may be well, but can no longer be reached through it."""


class ChannelClosedError(ChannelError):
    """The other end closed the channel, or died."""


class ChannelStalledError(ChannelError):
    """The other end did not send, or accept, what it should have within the time limit."""


class FrameError(ChannelError):
    """Bytes that are not a frame, or an unexpected frame: the rest of the stream cannot be trusted."""


class VersionError(FrameError):
    """The other end is of another version of hetis."""

    def __init__(self, version: int) -> None:
        super().__init__(f"a frame of version {version}, this is version {VERSION}")


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
    PING = 10
    BYE = 11
    ATTACH = 12
    CHALLENGE = 13
    WELCOME = 32
    OUT = 33
    KV = 34
    PONG = 36
    ERROR = 37
    NONCE = 38


class Frame(NamedTuple):
    """One message."""

    kind: FrameKind
    epoch: int  # the engine, by a number that it draws when it starts
    session: int  # connection that the frame belongs to, unique at its worker
    serial: int = 0  # serial of the request; an answer repeats it
    step: int = 0  # decode step, or 0 if it concerns none
    layer: int = 0  # layer within the stage
    counts: tuple[int, int, int] = (0, 0, 0)  # numbers whose meaning depends on the kind
    dtype: str = ""  # dtype of the numbers in the body. Empty: there are none.
    # Consecutive parts of the body. A received frame has one part, of bytes: `body` or `raw`.
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
    kind, *numbers, counts, dtype, _ = frame
    return HEADER.pack(MAGIC, VERSION, kind, DTYPES.index(dtype), *numbers, *counts, frame.body_bytes)


def read_header(header: bytes | bytearray, *, most_body_bytes: int = MOST_BODY_BYTES) -> tuple[Frame, Bytes]:
    """Return a frame, and the array to read its body into. Raises FrameError if it is not ours, unknown or too long."""
    if len(header) != HEADER_BYTES:
        raise FrameError(f"a header has {HEADER_BYTES} bytes, {len(header)} came")
    magic, version, kind, dtype, epoch, session, serial, step, layer, a, b, c, body_bytes = HEADER.unpack(header)
    if magic != MAGIC:
        raise FrameError(f"no frame begins with {magic:#010x}")
    if version != VERSION:
        raise VersionError(version)
    if kind not in _KINDS or dtype >= len(DTYPES):
        raise FrameError(f"a frame of kind {kind} and dtype {dtype}, which are not known")
    if body_bytes > most_body_bytes:
        raise FrameError(f"a body of {body_bytes} bytes, {most_body_bytes} are the most")
    try:
        body = np.empty(body_bytes, np.uint8)
    except MemoryError:
        raise FrameError(f"there is no memory for a body of {body_bytes} bytes") from None
    return Frame(_KINDS[kind], epoch, session, serial, step, layer, (a, b, c), DTYPES[dtype], (body,)), body


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


class ErrorCode(IntEnum):
    """The code in the first count of an ERROR frame."""

    FAILED = 1  # anything else: the process cannot be relied on
    OUT_OF_PAGES = 2
    UNKNOWN_SEQUENCE = 3
    STALE_EPOCH = 4
    REFUSED = 5  # wrong key


def uptime_s() -> float:
    """Return the time since this host started, including the time that it was suspended, if the system counts it.

    Engines tell their age by it and workers compare ages by it (`Hello.age_s`): the two agree on which engine is older
    even if one of the hosts has slept.
    """
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """An engine's first message: the shape of its virtual sequences, and the proof that it has the worker's key."""

    shape: KvShape
    nonce: bytes  # the engine's, to which the worker answers with a proof
    age_s: float = 0.0  # time since the engine started, by `uptime_s`
    is_encrypted: bool = False  # whether everything behind the answer is

    def frame(self, *, epoch: int, session: int, key: bytes, challenge: bytes) -> Frame:
        """Return the frame; ``challenge`` is the worker's nonce."""
        frame = self._unproved(epoch, session)
        said = header_of(frame)[:_SAID_BYTES] + b"".join(bytes(bytes_of(part)) for part in frame.parts)
        proof = np.frombuffer(proof_of(key, "engine", challenge, said), np.uint8)
        return frame._replace(parts=(*frame.parts, proof))

    @staticmethod
    def is_proved(frame: Frame, *, key: bytes, challenge: bytes) -> bool:
        """Return whether the sender of a received HELLO has the key, and answers this challenge."""
        raw = bytes(frame.raw)
        said = header_of(frame)[:_SAID_BYTES] + raw[:-PROOF_BYTES]
        return hmac.compare_digest(raw[-PROOF_BYTES:], proof_of(key, "engine", challenge, said))

    def _unproved(self, epoch: int, session: int) -> Frame:
        shape = self.shape
        factors = torch.tensor([shape.scale, shape.soft_cap, self.age_s], dtype=torch.float64)
        last = torch.frombuffer(bytearray([self.is_encrypted, *self.nonce]), dtype=torch.uint8)
        return Frame(
            kind=FrameKind.HELLO,
            epoch=epoch,
            session=session,
            layer=shape.layers,
            counts=(shape.head_dim, shape.queries_per_group, shape.page_tokens),
            dtype=shape.dtype,
            parts=(torch.tensor(shape.windows, dtype=torch.int64), factors, last),
        )

    @classmethod
    def read(cls, frame: Frame) -> Hello:
        _expect(frame, FrameKind.HELLO, 8 * frame.layer + 25 + NONCE_BYTES + PROOF_BYTES)
        head_dim, queries, page_tokens = frame.counts
        limits = MOST_HEAD_DIM, MOST_QUERIES, MOST_PAGE_TOKENS
        fits = all(0 < size <= most for size, most in zip(frame.counts, limits, strict=True))
        if not (0 < frame.layer <= MOST_LAYERS and fits and frame.dtype in DTYPES[1:]):
            raise FrameError(f"HELLO of {frame.layer} layers, {frame.counts} and dtype {frame.dtype!r}")
        raw = bytes(frame.raw)
        windows = np.frombuffer(raw, "<i8", frame.layer)
        scale, soft_cap, age_s = struct.unpack_from("<ddd", raw, 8 * frame.layer)
        if int(windows.min()) < 0 or not (math.isfinite(scale) and 0 <= soft_cap < math.inf):
            raise FrameError(f"HELLO of windows {windows.tolist()}, scale {scale} and soft cap {soft_cap}")
        if (encrypted := raw[8 * frame.layer + 24]) > 1:
            raise FrameError(f"HELLO with an encryption of kind {encrypted}")
        if not 0 <= age_s < math.inf:
            raise FrameError(f"HELLO of an engine that is {age_s} s old")
        shape = KvShape(
            layers=frame.layer,
            head_dim=head_dim,
            queries_per_group=queries,
            page_tokens=page_tokens,
            dtype=frame.dtype,
            scale=scale,
            windows=tuple(windows.tolist()),
            soft_cap=soft_cap,
        )
        nonce = raw[-NONCE_BYTES - PROOF_BYTES : -PROOF_BYTES]
        return cls(shape=shape, nonce=nonce, age_s=age_s, is_encrypted=bool(encrypted))


class KvRange(NamedTuple):
    """Positions ``first`` to ``last - 1`` of some heads of one request."""

    request: int
    incarnation: int
    first: int
    last: int
    heads: tuple[int, ...]

    def numbers(self) -> torch.Tensor:
        return torch.tensor([*self[:4], *self.heads], dtype=torch.int64)


def pack_step(step: DeviceStep) -> tuple[torch.Tensor, ...]:
    """Return the body of BEGIN."""
    columns = [step.requests, step.incarnations, step.heads, step.positions]
    if step.counts is not None and step.num_rows > len(step):
        columns.append(step.counts)
    return tuple(torch.from_numpy(x) for x in columns)


def read_step(frame: Frame) -> DeviceStep:
    count, num_rows, _ = frame.counts
    has_counts = num_rows != count
    columns = 5 if has_counts else 4
    rows = _integers(frame, FrameKind.BEGIN, columns * count).reshape(columns, count)
    if count and int(rows.min()) < 0:
        raise FrameError("BEGIN has negative numbers")
    if has_counts and not (count and 0 < rows[4].min() <= rows[4].max() <= num_rows == rows[4].sum()):
        raise FrameError(f"BEGIN of {num_rows} positions, which its {count} sequences do not have")
    return DeviceStep(
        epoch=frame.epoch,
        number=frame.step,
        requests=rows[0],
        incarnations=rows[1],
        heads=rows[2],
        positions=rows[3],
        counts=rows[4] if has_counts else None,
    )


def read_queries(frame: Frame, shape: KvShape, count: int) -> Array:
    """Return the queries, key and value of each position of ATTEND, [T, r + 2, d]; ``count`` is the T from BEGIN.

    They are a numpy array (bfloat16 as its words): for a small computation, making a tensor would cost as much.
    """
    if frame.counts[0] != count or frame.layer >= shape.layers:
        raise FrameError(f"ATTEND of {frame.counts[0]} positions in layer {frame.layer}: {count} were begun")
    return _as_came(frame, FrameKind.ATTEND, shape, (count, shape.queries_per_group + 2, shape.head_dim))


def read_outputs(frame: Frame, shape: KvShape, count: int) -> torch.Tensor:
    """Return the outputs [T, r, d] of OUT."""
    return _tensor(frame, FrameKind.OUT, shape, (count, shape.queries_per_group, shape.head_dim))


def pack_keys(keys: Sequence[SequenceKey]) -> torch.Tensor:
    """Return the body of DROP."""
    return torch.tensor([list(key) for key in keys], dtype=torch.int64)


def read_keys(frame: Frame) -> list[SequenceKey]:
    rows = _integers(frame, FrameKind.DROP, 3 * frame.counts[0]).reshape(-1, 3)
    return [SequenceKey(*row) for row in rows.tolist()]


def read_part(frame: Frame) -> KvRange:
    """Return the range that EXPORT requests."""
    return _part(_integers(frame, frame.kind, 4 + frame.counts[0]), frame)


def read_adopted(frame: Frame, shape: KvShape) -> tuple[KvRange, torch.Tensor, torch.Tensor]:
    """Return the range of ADOPT with its K and V, each [H, layers, positions, d]."""
    heads, positions, _ = frame.counts
    begin = 8 * (4 + heads)
    sizes = heads * shape.layers * positions * shape.head_dim
    _expect(frame, FrameKind.ADOPT, begin + 2 * sizes * shape.item_bytes, dtype=shape.dtype)
    part = _part(frame.raw[:begin].view("<i8"), frame)
    if part.last - part.first != positions:
        raise FrameError(f"ADOPT of positions {part.first} to {part.last} with {positions} of them")
    k, v = frame.body[begin:].view(shape.torch_dtype).view(2, heads, shape.layers, positions, shape.head_dim)
    return part, k, v


def read_kv(frame: Frame, shape: KvShape, part: KvRange) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K and V of KV, each [H, layers, positions, d]."""
    size = (2, len(part.heads), shape.layers, part.last - part.first, shape.head_dim)
    k, v = _tensor(frame, FrameKind.KV, shape, size)
    return k, v


def read_pong(frame: Frame) -> tuple[int, int]:
    """Return a worker's free pages and the number of its virtual sequences, from PONG."""
    free_pages, sequences = _integers(frame, FrameKind.PONG, 2).tolist()
    return free_pages, sequences


def error_answer(frame: Frame, code: ErrorCode, text: str, *, needed: int = 0, free: int = 0) -> Frame:
    """Return an ERROR in answer to a frame."""
    words = torch.frombuffer(bytearray(text.encode()[:4096] or b" "), dtype=torch.uint8)
    numbers = torch.tensor([needed, free], dtype=torch.int64)
    return frame.answered(FrameKind.ERROR, counts=(code, 0, 0), parts=(numbers, words))


def stale_answer(frame: Frame, name: str, *, current: int) -> Frame:
    """Return an ERROR to a frame of a connection other than that of epoch ``current``, which ``name`` obeys."""
    text = f"{name} obeys epoch {current} over another connection"
    return error_answer(frame, ErrorCode.STALE_EPOCH, text, needed=frame.epoch, free=current)


def read_error(frame: Frame) -> tuple[int, int, str]:
    raw = bytes(frame.raw)
    if frame.kind is not FrameKind.ERROR or len(raw) < 16:
        raise FrameError(f"{frame.kind.name} of {len(raw)} bytes, an error was expected")
    needed, free = struct.unpack_from("<qq", raw)
    return needed, free, raw[16:].decode(errors="replace")


def pack_welcome(num_pages: int, name: str, *, key: bytes, nonce: bytes) -> tuple[Numbers, ...]:
    """Return the body of WELCOME, in answer to an engine's nonce."""
    pages, words = struct.pack("<q", num_pages), name.encode()
    return (np.frombuffer(pages + proof_of(key, "worker", nonce, pages, words) + words, np.uint8),)


def read_welcome(frame: Frame, *, key: bytes, nonce: bytes) -> int:
    """Return the worker's number of pages. Raises FrameError if it does not have the key."""
    raw = bytes(frame.raw)
    if frame.kind is not FrameKind.WELCOME or len(raw) < 8 + PROOF_BYTES:
        raise FrameError(f"{frame.kind.name} of {len(raw)} bytes, a welcome was expected")
    pages, proof, words = raw[:8], raw[8 : 8 + PROOF_BYTES], raw[8 + PROOF_BYTES :]
    if not hmac.compare_digest(proof, proof_of(key, "worker", nonce, pages, words)):
        raise FrameError("what listens there does not have the worker's key")
    return int(struct.unpack("<q", pages)[0])


def read_nonce(frame: Frame) -> bytes:
    _expect(frame, FrameKind.NONCE, NONCE_BYTES)
    return bytes(frame.raw)


def _part(numbers: IntArray, frame: Frame) -> KvRange:
    request, incarnation, first, last, *heads = numbers.tolist()
    if not 0 <= first <= last or min([request, incarnation, *heads]) < 0 or len(set(heads)) < len(heads):
        raise FrameError(f"{frame.kind.name} of positions {first} to {last} of heads {heads}")
    return KvRange(request, incarnation, first, last, tuple(heads))


def _integers(frame: Frame, kind: FrameKind, count: int) -> IntArray:
    _expect(frame, kind, 8 * count)
    numbers: IntArray = frame.raw.view("<i8")
    return numbers


def _as_came(frame: Frame, kind: FrameKind, shape: KvShape, size: tuple[int, ...]) -> Array:
    """Return the body as an array, with bfloat16 as its words."""
    _expect(frame, kind, math.prod(size) * shape.item_bytes, dtype=shape.dtype)
    return frame.raw.view(shape.numpy_dtype).reshape(size)


def _tensor(frame: Frame, kind: FrameKind, shape: KvShape, size: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(_as_came(frame, kind, shape, size)).view(shape.torch_dtype)


def _expect(frame: Frame, kind: FrameKind, num_bytes: int, *, dtype: str | None = None) -> None:
    if frame.kind is not kind:
        raise FrameError(f"{frame.kind.name} came, {kind.name} was expected")
    if frame.body_bytes != num_bytes:
        raise FrameError(f"{kind.name} has a body of {frame.body_bytes} bytes, {num_bytes} were expected")
    if dtype is not None and frame.dtype != dtype:
        raise FrameError(f"{kind.name} is of {frame.dtype or 'no dtype'}, {dtype} was expected")
