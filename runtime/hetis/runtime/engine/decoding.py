"""One step's decoding: every virtual sequence is computed on the device where it lives.

A rank's heads are gathered once per layer, in the order of the devices, each of which gets its part in one piece; the
outputs are put back into the rank's own order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from hetis.runtime.attention.device import AttentionDevice, DeviceStep, IntArray
from hetis.runtime.engine.step import Step
from hetis.runtime.kv.errors import DeviceError


class Decoding:
    """The virtual sequences that decode in one step, on the devices that have them."""

    def __init__(
        self, step: Step, *, find: Callable[[int], AttentionDevice], places: IntArray, ranks: Sequence[str]
    ) -> None:
        """Which device has which; the primary is the last, so that others compute meanwhile.

        Args:
            step: says which device has which head.
            find: a device by its number.
            places: where the queries, key and value of each of a rank's heads are among those it projects for a token:
                `places_of`.
            ranks: the torch device of each.
        """
        numbers, per_rank = [int(number) for number in np.unique(step.heads)[::-1]], len(places)
        owned = [
            [np.nonzero(step.heads[:, rank * per_rank : (rank + 1) * per_rank] == number) for number in numbers]
            for rank in range(len(ranks))
        ]
        self._shares = []
        for number, own in zip(numbers, zip(*owned, strict=True), strict=True):
            rows = np.concatenate([row for row, _ in own])
            part = DeviceStep(
                epoch=step.epoch,
                number=step.number,
                requests=step.requests[rows],
                incarnations=step.incarnations[rows],
                heads=np.concatenate([head + rank * per_rank for rank, (_, head) in enumerate(own)]),
                positions=step.positions[rows],
            )
            self._shares.append(_Share(find(number), part, [len(row) for row, _ in own]))
        self._orders = [_order(own, places, on) for own, on in zip(owned, ranks, strict=True)] if numbers else []

    def begin(self) -> None:
        """Raises DeviceError."""
        for share in self._shares:
            share.device.begin(share.step)

    def attend(self, layer: int, projected: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Outputs [B * H, r, d] of each rank's heads, from what it projects: [T, heads, d] of T >= B tokens.

        Raises DeviceError.
        """
        given = [order.split(heads) for order, heads in zip(self._orders, projected, strict=True)]
        pending = [
            share.device.attend(layer, _joined(own))
            for share, own in zip(self._shares, zip(*given, strict=True), strict=True)
        ]
        computed = [one.wait().split(share.sizes) for share, one in zip(self._shares, pending, strict=True)]
        return [order.join(own) for order, own in zip(self._orders, zip(*computed, strict=True), strict=True)]

    def finish(self) -> None:
        """All layers are through. Raises DeviceError."""
        for share in self._shares:
            share.device.finish(share.step.number)

    def abort(self) -> None:
        """The step is not."""
        for share in self._shares:
            # The one that failed, or another that did meanwhile: the engine hears of that at the next step.
            with contextlib.suppress(DeviceError):
                share.device.abort(share.step.number)


def places_of(heads: int, r: int) -> IntArray:
    """Where r queries, key and value of each head are among the heads of a token, [heads, r + 2].

    A token has the queries of all heads first, then their keys, then their values.
    """
    head = np.arange(heads)[:, None]
    return np.concatenate([head * r + np.arange(r), heads * r + head, heads * (r + 1) + head], axis=1)


class _Share(NamedTuple):
    """What one device computes: so many virtual sequences (``sizes``) of the first rank, then of the next."""

    device: AttentionDevice
    step: DeviceStep
    sizes: list[int]


class _Order(NamedTuple):
    """A rank's virtual sequences by the devices that have them.

    Attributes:
        sizes: how many each device has.
        takes: queries, key and value of each in turn, among all heads of all tokens.
        back: where each in the rank's own order is in this one; None: they are the same.
        on: where the rank computes.
    """

    sizes: list[int]
    takes: torch.Tensor
    back: torch.Tensor | None
    on: str

    def split(self, projected: torch.Tensor) -> Sequence[torch.Tensor]:
        """Queries, key and value of what each device has, [N, r + 2, d]."""
        heads = projected.flatten(0, 1).index_select(0, self.takes)
        parts: Sequence[torch.Tensor] = heads.view(sum(self.sizes), -1, heads.shape[1]).split(self.sizes)
        return parts

    def join(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The devices' outputs, each [N, r, d], in the rank's own order."""
        together = _joined([own.to(self.on) for own in outputs])
        return together if self.back is None else together.index_select(0, self.back)


def _order(owned: Sequence[Sequence[IntArray]], places: IntArray, on: str) -> _Order:
    """``owned``: rows and heads of what each device has of a rank."""
    row, head = (np.concatenate(numbers) for numbers in zip(*owned, strict=True))
    takes = row[:, None] * places.size + places[head]
    sizes = [len(rows) for rows, _ in owned]
    is_one = max(sizes) == len(row)
    back = None if is_one else torch.from_numpy(np.argsort(row * len(places) + head)).to(on)
    return _Order(sizes, torch.from_numpy(takes.ravel()).to(on), back, on)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other, on the device of the first that is not empty."""
    found = [part for part in parts if len(part)]
    return found[0] if len(found) == 1 else torch.cat([part.to(found[0].device) for part in found])
