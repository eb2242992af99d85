"""What is said between an engine that decodes and one that computes its prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hetis.runtime.kv.shape import KvShape
from hetis.runtime.transport.errors import FrameError
from hetis.runtime.transport.frames import Frame, Kind
from hetis.runtime.transport.keys import KEY_BYTES
from hetis.runtime.transport.messages import Part, read_kv

_SAMPLE_BYTES = 1 << 16
_INT64 = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """KV of positions from ``first`` on: K and V, each [kv_heads, layers, positions, d]."""

    first: int
    k: torch.Tensor
    v: torch.Tensor

    @property
    def last(self) -> int:
        """The position after its last."""
        positions: int = self.k.shape[2]
        return self.first + positions

    @property
    def num_bytes(self) -> int:
        size: int = 2 * self.k.numel() * self.k.element_size()
        return size

    @classmethod
    def read(cls, frame: Frame, shape: KvShape, *, heads: int) -> Piece:
        """Raises FrameError: it is no KV of this model."""
        count, positions, _ = frame.counts
        if count != heads or not positions:
            raise FrameError(f"KV of {count} heads and {positions} positions, the model has {heads} heads")
        part = Part(0, 0, frame.step, frame.step + positions, tuple(range(heads)))
        k, v = read_kv(frame, shape, part)
        return cls(first=frame.step, k=k, v=v)


def key_of(folder: Path, api_key: str | None) -> bytes:
    """What both ends must know: the same model in their folders, and the key of the front where there is one.

    Of a weight file its table of tensors and both its ends count, which tells checkpoints apart without reading them.
    """
    found = hashlib.sha256(b"hetis prompts\n")
    found.update(hashlib.sha256((api_key or "").encode()).digest())
    found.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            table = int.from_bytes(file.read(8), "little")
            found.update(file.read(min(table, size) + _SAMPLE_BYTES))
            file.seek(max(size - _SAMPLE_BYTES, 0))
            found.update(file.read())
    return found.digest()[:KEY_BYTES]


def pack_tokens(tokens: Sequence[int]) -> torch.Tensor:
    """The body of PREFILL."""
    return torch.tensor(list(tokens), dtype=torch.int64)


def read_tokens(frame: Frame) -> tuple[int, ...]:
    """Raises FrameError: it is no PREFILL."""
    if frame.kind is not Kind.PREFILL or frame.body_bytes != _INT64 * frame.counts[0] or not frame.counts[0]:
        raise FrameError(f"{frame.kind.name} of {frame.body_bytes} bytes and {frame.counts[0]} tokens")
    return tuple(frame.raw.view("<i8").tolist())
