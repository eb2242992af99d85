"""What the engine asks of a device that holds KV and computes attention: in this process, or behind a channel.

A *virtual sequence* is one KV head of one request with its r query heads. It lives on one device, whole: all layers of
the stage, all positions. Nothing here knows of weights, of other devices, or of how heads are shared out.

The engine drives a device like this, the same for every kind:

    begin(step)                         positions of this step; pages are taken
    attend(layer, qkv) -> pending       once per layer, in order: stores k and v, attends from each position to those
                                        up to it
    finish(step)                        all layers are through
    abort(step)                         the step is not: forget it. It may be begun again, under any number

Positions are said in full in every step, and a device never counts by itself: a step that is done again writes the same
slots. What a device holds beyond the positions of a step is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hetis.runtime.kv.shape import KvShape, SequenceKey

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceStep:
    """One step's part on one device: N virtual sequences, each with the positions that it writes.

    Rows of queries, keys, values and outputs are ordered by sequence, and within it by position: T in all.

    Attributes:
        epoch: of the engine; a device that has seen a higher one refuses.
        number: of the step, rising.
        requests: shape [N].
        incarnations: shape [N].
        heads: KV heads, shape [N].
        positions: first that this step writes, shape [N]; a row's attention reads 0 to its position, itself included.
        counts: positions that each sequence writes, all >= 1, shape [N]: 1 of a decode, more of a chunk of a prompt.
            None: 1 of every sequence, so that T is N.
    """

    epoch: int
    number: int
    requests: IntArray
    incarnations: IntArray
    heads: IntArray
    positions: IntArray
    counts: IntArray | None = None

    def __len__(self) -> int:
        """Virtual sequences: N."""
        return len(self.requests)

    @property
    def num_rows(self) -> int:
        """Positions that are written: T."""
        return len(self.requests) if self.counts is None else int(self.counts.sum())

    def keys(self) -> list[SequenceKey]:
        columns = self.requests.tolist(), self.incarnations.tolist(), self.heads.tolist()
        return list(map(SequenceKey, *columns))


class Pending(Protocol):
    """The outputs of one layer, perhaps still under way."""

    def wait(self) -> torch.Tensor:
        """Outputs of the query heads, shape [T, r, d], wherever they have come to. Raises DeviceLostError."""


class Ready(NamedTuple):
    """Outputs that are here already."""

    output: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.output


class AttentionDevice(Protocol):
    """A device that holds KV pages. Every method may raise `DeviceLostError`, after which the device is gone.

    Attributes:
        name: for people; unique in its stage.
        shape: of its virtual sequences.
        num_pages: that it has in all. How many are in use the engine counts itself, so that it knows before it asks.
    """

    name: str
    shape: KvShape
    num_pages: int

    def begin(self, step: DeviceStep) -> None:
        """Takes the pages that the step's positions need.

        Raises:
            OutOfPagesError: there are too few; nothing has changed.
            UnknownSequenceError: a position beyond 0 of a sequence that is not held here, or not that far.
                A device behind a channel says either where the first outputs are waited for: `abort` is enough then.
        """

    def attend(self, layer: int, qkv: torch.Tensor) -> Pending:
        """Stores keys and values at the step's positions and attends. ``layer`` counts within the stage.

        Args:
            qkv: of each row its r queries, its key and its value, rotated, shape [T, r + 2, d].
        """

    def finish(self, number: int) -> None:
        """The step is through all layers."""

    def abort(self, number: int) -> None:
        """The step will not be finished. Also when no such step was begun."""

    def drop(self, keys: Sequence[SequenceKey]) -> None:
        """Frees the pages of these sequences; those that are not here are no error, so that it may be said again."""

    def export(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of positions ``first`` to ``last - 1``, each of shape [heads, layers, positions, d], a copy.

        Raises:
            UnknownSequenceError: a head is not here, or not that far.
        """

    def adopt(
        self, request: int, incarnation: int, heads: Sequence[int], first: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Writes K and V at the positions from ``first`` on, each of shape [heads, layers, positions, d].

        Sequences that are not here yet begin with it. The same positions may be written again.

        Raises:
            OutOfPagesError: there are too few; nothing has changed.
            UnknownSequenceError: there would be a gap before ``first``.
        """

    def digest(self, request: int, incarnation: int, heads: Sequence[int], last: int) -> IntArray:
        """A number for each head and layer, shape [heads, layers], of K and V at positions 0 to ``last - 1``.

        Two devices that say the same hold the same, bit for bit.

        Raises:
            UnknownSequenceError: a head is not here, or not that far.
        """
