"""Messages between the service and a solver process: a JSON header and a payload, preceded by their lengths.

Pickle is not used: whatever another process sends is read as plain data, even if that process misbehaves.
"""

from __future__ import annotations

import json
import struct
from asyncio import IncompleteReadError, StreamReader
from dataclasses import dataclass
from typing import Any, BinaryIO

_LENGTHS = struct.Struct(">II")  # bytes of the header and of the payload


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFrame:
    """A message: ``kind`` is its type, ``fields`` are plain data, ``payload`` is a document or empty."""

    kind: str
    fields: dict[str, Any]
    payload: bytes = b""


def to_bytes(frame: JobFrame) -> bytes:
    header = json.dumps({"kind": frame.kind, **frame.fields}, allow_nan=False).encode()
    return _LENGTHS.pack(len(header), len(frame.payload)) + header + frame.payload


def read_frame(pipe: BinaryIO) -> JobFrame | None:
    """Return the next frame, or None if the other side is gone."""
    lengths = pipe.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    header_bytes, payload_bytes = _LENGTHS.unpack(lengths)
    body = pipe.read(header_bytes + payload_bytes)
    return _from_body(body, header_bytes) if len(body) == header_bytes + payload_bytes else None


async def receive_frame(stream: StreamReader) -> JobFrame | None:
    """Read a frame as `read_frame` does, without blocking the event loop."""
    try:
        header_bytes, payload_bytes = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
        body = await stream.readexactly(header_bytes + payload_bytes)
    except (IncompleteReadError, ConnectionError):
        return None
    return _from_body(body, header_bytes)


def _from_body(body: bytes, header_bytes: int) -> JobFrame:
    fields = json.loads(body[:header_bytes])
    return JobFrame(kind=fields.pop("kind"), fields=fields, payload=body[header_bytes:])
