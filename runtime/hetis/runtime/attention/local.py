"""An attention device in this process: its pages, and the backend that suits its memory and dtype."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from hetis.runtime.attention.backends import Array, Backend, CompiledBackend, choose_backend
from hetis.runtime.attention.device import DeviceStep, IntArray, Ready
from hetis.runtime.kv.errors import DeviceError
from hetis.runtime.kv.pool import PagePool
from hetis.runtime.kv.shape import KvShape, SequenceKey

WARM_TOKENS = 600  # more than one split of the Triton kernel


class LocalDevice:
    """KV pages in this process, as an `AttentionDevice`."""

    def __init__(
        self, name: str, shape: KvShape, num_pages: int, *, device: str = "cpu", backend: Backend | None = None
    ) -> None:
        self.name, self.shape, self.num_pages = name, shape, num_pages
        self.pool = PagePool(name, shape, num_pages, device)
        self.backend = backend or choose_backend(self.pool)
        self._step: int | None = None

    def warm(self) -> None:
        """Compile in advance everything that the first use would compile, which takes longer than an engine waits.

        The device must hold nothing.
        """
        shape = self.shape
        tokens = min(WARM_TOKENS, self.num_pages * shape.page_tokens)
        if not tokens:
            return
        key = SequenceKey(0, 0, 0)
        self.pool.extend([key], [0], [tokens])
        rows = self.pool.rows([key])
        for first, count in ((0, 1), (0, tokens), (tokens - 1, 1)):
            self.backend.plan(rows, np.array([first]), np.array([count]))
            qkv = torch.zeros(count, shape.queries_per_group + 2, shape.head_dim, dtype=shape.torch_dtype)
            self._attend(0, qkv)
        self.pool.drop([key])

    def begin(self, step: DeviceStep) -> None:
        keys = step.keys()
        positions = step.positions.tolist()
        if step.counts is None:
            ends = [position + 1 for position in positions]
        else:
            ends = [position + count for position, count in zip(positions, step.counts.tolist(), strict=True)]
        self.pool.extend(keys, positions, ends)
        self.backend.plan(self.pool.rows(keys), step.positions, step.counts)
        self._step = step.number

    def attend(self, layer: int, qkv: torch.Tensor) -> Ready:
        self._check_begun()
        return Ready(self._attend(layer, qkv))

    def attend_received(self, layer: int, qkv: Array) -> torch.Tensor | Array:
        """Like `attend`, for an array as it comes from a channel (bfloat16 as its words). Outputs are in CPU memory."""
        if not isinstance(self.backend, CompiledBackend):
            return self.attend(layer, torch.from_numpy(qkv).view(self.shape.torch_dtype)).output.cpu()
        self._check_begun()
        return self.backend.attend_array(layer, qkv)

    def finish(self, number: int) -> None:
        self._step = None

    def abort(self, number: int) -> None:
        self._step = None

    def drop(self, keys: Sequence[SequenceKey]) -> None:
        self.pool.drop(keys)

    def export(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pieces = [self.pool.read(SequenceKey(request, incarnation, head), first, last) for head in heads]
        return torch.stack([k for k, _ in pieces]), torch.stack([v for _, v in pieces])

    def adopt(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        keys = [SequenceKey(request, incarnation, head) for head in heads]
        last = first + k.shape[2]
        self.pool.extend(keys, [first] * len(keys), [last] * len(keys))
        for key, own_k, own_v in zip(keys, k, v, strict=True):
            self.pool.write(key, first, own_k, own_v)

    def digest(self, request: int, incarnation: int, heads: Sequence[int], last: int) -> IntArray:
        pieces = [self.pool.read(SequenceKey(request, incarnation, head), 0, last) for head in heads]
        return np.stack([digest(k, v) for k, v in pieces])

    def _attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        return self.backend.attend(layer, qkv.to(self.pool.k.device))

    def _check_begun(self) -> None:
        if self._step is None:
            raise DeviceError(self.name, "no step was begun")


# Any large odd numbers will do: a place's weight is its number times PLACE, and VALUES separates V from K.
PLACE, VALUES = 0x1E3779B97F4A7C15, 0x5DEECE66D

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(k: torch.Tensor, v: torch.Tensor) -> npt.NDArray[np.int64]:
    """Return one number per layer for K and V, each [layers, positions, d], from their bits and order alone."""
    sums: npt.NDArray[np.int64] = (_sums(k) + VALUES * _sums(v)).cpu().numpy()
    return sums


def _sums(x: torch.Tensor) -> torch.Tensor:
    """Return weighted sums of the bits as integers modulo 2^64, shape [layers], in any order of addition."""
    bits = x.contiguous().view(_INTEGERS[x.element_size()]).flatten(1).to(torch.int64)
    places = torch.arange(1, bits.shape[1] + 1, device=x.device) * PLACE | 1
    return (bits * places).sum(dim=1)
