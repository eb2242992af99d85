"""The engine's interface to a device that holds KV and computes attention, in this process or behind a channel.

A *virtual sequence* is one KV head of one request with its r query heads. It lives on one device as a whole: all
layers of the stage, all positions. This interface knows nothing of weights, of other devices, or of how heads are
distributed.

The engine drives devices of every kind in the same way:

    begin(step)             positions of this step; pages are allocated
    attend(layer, qkv) -> pending    once per layer, in order: stores k and v, attends from each position to those
                            up to it
    finish(step)            all layers are done
    abort(step)             the step is not finished: forget it. It may begin again, under any number

Every step states its positions in full, and a device never counts on its own, so a repeated step writes the same
slots. Whatever a device holds beyond the positions of a step is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from hetis.runtime.attention.backends import Backend, choose_backend
from hetis.runtime.attention.kv import Array, DeviceError, IntArray, KvShape, PagePool, SequenceKey

WARM_TOKENS = 600  # more than one split of the Triton kernel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceStep:
    """One step's part on one device: N virtual sequences, each with the positions that it writes.

    The rows of queries, keys, values and outputs are ordered by sequence, then by position: T in total.
    """

    epoch: int  # epoch of the engine; a device that has seen a higher one refuses the step
    number: int  # number of the step, increasing
    requests: IntArray  # shape [N]
    incarnations: IntArray  # shape [N]
    heads: IntArray  # KV heads, shape [N]
    # First position that this step writes, shape [N]. A row attends to positions 0 up to and including its own.
    positions: IntArray
    # Positions that each sequence writes, all >= 1, shape [N]: 1 for a decode, more for a chunk of a prompt. None: 1
    # for every sequence, so T is N.
    counts: IntArray | None = None

    def __len__(self) -> int:
        """Return the number of virtual sequences, N."""
        return len(self.requests)

    @property
    def num_rows(self) -> int:
        """The number of positions that are written, T."""
        return len(self.requests) if self.counts is None else int(self.counts.sum())

    def keys(self) -> list[SequenceKey]:
        columns = self.requests.tolist(), self.incarnations.tolist(), self.heads.tolist()
        return list(map(SequenceKey, *columns))


class Pending(Protocol):
    """The outputs of one layer, possibly still being computed."""

    def wait(self) -> torch.Tensor:
        """Return the query heads' outputs, shape [T, r, d], on whatever device they are. Raises DeviceLostError."""


class Ready(NamedTuple):
    """Outputs that are already there."""

    output: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.output


class AttentionDevice(Protocol):
    """A device that holds KV pages. Any method may raise `DeviceLostError`, after which the device is gone."""

    name: str  # display name, unique in its stage
    shape: KvShape  # shape of its virtual sequences
    num_pages: int  # total number of pages. The engine counts those in use itself, so it knows whether a step fits.

    def begin(self, step: DeviceStep) -> None:
        """Allocate the pages that the step's positions need.

        Raises:
            OutOfPagesError: there are too few pages; nothing has changed.
            UnknownSequenceError: a position beyond 0 belongs to a sequence that is not held here, or not up to there.
                A device behind a channel raises both when the first outputs are awaited; `abort` suffices then.
        """

    def attend(self, layer: int, qkv: torch.Tensor) -> Pending:
        """Store keys and values at the step's positions and attend. ``layer`` counts within the stage.

        Args:
            qkv: each row's r queries, key and value, rotated, shape [T, r + 2, d].
        """

    def finish(self, number: int) -> None:
        """End the step after all layers."""

    def abort(self, number: int) -> None:
        """Give up the step. It is not an error if no such step has begun."""

    def drop(self, keys: Sequence[SequenceKey]) -> None:
        """Free the pages of these sequences. Unknown sequences are ignored, so the call can be repeated."""

    def export(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of K and V at positions ``first`` to ``last - 1``, each of shape [heads, layers, positions, d].

        Raises:
            UnknownSequenceError: a head is not held here, or not up to there.
        """

    def adopt(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Write K and V, each of shape [heads, layers, positions, d], at the positions from ``first`` on.

        Sequences not held here yet are created. The same positions may be written again.

        Raises:
            OutOfPagesError: there are too few pages; nothing has changed.
            UnknownSequenceError: there would be a gap before ``first``.
        """


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
        layers = {window > 0: layer for layer, window in enumerate(shape.windows)}  # one of each kind
        for first, count in ((0, 1), (0, tokens), (tokens - 1, 1)):
            self.backend.plan(rows, np.array([first]), np.array([count]))
            qkv = np.zeros((count, shape.queries_per_group + 2, shape.head_dim), shape.numpy_dtype)
            for layer in [*layers.values()] * 3:  # without a graph, while one is captured, and while one is replayed
                self.backend.attend_array(layer, qkv)
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
        return Ready(self.backend.attend(layer, qkv.to(self.pool.k.device)))

    def attend_received(self, layer: int, qkv: Array) -> torch.Tensor | Array:
        """Like `attend`, for an array as a channel receives it (bfloat16 as its words). Outputs are in CPU memory."""
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

    def _check_begun(self) -> None:
        if self._step is None:
            raise DeviceError(self.name, "no step was begun")
