"""The cost of attention on the devices of one engine: measured when they join, updated while they work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from hetis.runtime.measured.calibration import Calibration, Coefficients, FloatArray, Piece, with_coefficients
from hetis.runtime.measured.following import Following, Taken
from hetis.solver.dispatch.problem import HeadShape, Primary, Stage

HERE = "here"  # name of the ranks as a device
_LINK_BYTE_S = 1e-9  # of copies, if nothing was measured


class EngineCosts:
    """The costs of one engine's devices: 0 is the ranks themselves, the workers follow.

    Each rank and its workers are measured separately; the slowest counts.

    Attributes:
        stage: the costs in use.
    """

    def __init__(self, heads: HeadShape, workers: Sequence[str]) -> None:
        """Initialise with equally fast devices, until they are measured; reaching a worker costs a little."""
        num = 1 + len(workers)
        away = np.array([0.0] + [1.0] * len(workers))
        self._first = Stage(
            heads=heads,
            devices=(HERE, *workers),
            head_s=np.full((num, 1), 1e-7),
            kv_byte_s=np.full((num, 1), 1e-10),
            call_s=np.full((num, 1), 1e-5),
            transfer_byte_s=1e-10 * away,
            transfer_s=1e-5 * away,
            primary=Primary(device=0),
        )
        self.stage = self._first
        self._measured: dict[tuple[int, int], Calibration] = {}  # by device and rank
        self._following: Following | None = None
        self._apply: Callable[[Stage], None] = lambda stage: None

    def follow(self, apply: Callable[[Stage], None]) -> None:
        """Set the function that receives the costs to use from now on."""
        self._apply = apply

    def measured(self, rank: int, calibrations: Mapping[int, Calibration]) -> None:
        """Take a rank's calibrations of devices, by their numbers, from when they joined it."""
        if not calibrations:
            return
        self._measured |= {(device, rank): found for device, found in calibrations.items()}
        names = self._first.devices
        known = {names[device]: self._slowest(device).coefficients for device in self._devices_measured()}
        calibrated = with_coefficients(self._first, known)
        self._use(calibrated)
        # Scales of the other devices were learnt against the same coefficients, and are soon learnt again.
        self._following = Following(calibrated, self._use)

    def planned(self, known: Mapping[str, Coefficients]) -> None:
        """Take a plan's coefficients, by device. They only count if nothing was measured at all."""
        if not self._measured:
            self._use(with_coefficients(self._first, known))

    def hear(self, device: int, taken: Sequence[Taken]) -> None:
        """Take the times of steps on a device."""
        if self._following is not None and any(number == device for number, _ in self._measured):
            for one in taken:
                self._following.hear(device, one)

    def advance(self) -> None:
        """Update the costs, once a step, from the times heard."""
        if self._following is not None:
            self._following.advance()

    @property
    def is_measured(self) -> bool:
        """Return whether any device has been measured."""
        return bool(self._measured)

    @property
    def scales(self) -> tuple[float, ...]:
        """The present cost of each device divided by that measured when it joined."""
        return (1.0,) * len(self._first.devices) if self._following is None else self._following.scales

    @property
    def link_byte_s(self) -> FloatArray:
        """Seconds per byte of KV that leaves each device, shape [D]."""
        found = np.full(len(self._first.devices), _LINK_BYTE_S)
        for device in self._devices_measured():
            found[device] = self._slowest(device).copy_byte_s or _LINK_BYTE_S
        return found

    # --- inside

    def _use(self, stage: Stage) -> None:
        self.stage = stage
        self._apply(stage)

    def _devices_measured(self) -> list[int]:
        return sorted({device for device, _ in self._measured})

    def _slowest(self, device: int) -> Calibration:
        """Return the maximum of each number over the ranks."""
        found = [one for (number, _), one in self._measured.items() if number == device]
        first = found[0]
        costs = [one.coefficients for one in found]
        pieces: list[Piece] = [
            (max(p[0] for p in same), max(p[1] for p in same), max(p[2] for p in same))
            for same in zip(*(one.pieces for one in costs), strict=True)
        ]
        return replace(
            first,
            coefficients=Coefficients(
                pieces=tuple(pieces),
                transfer_byte_s=max(one.transfer_byte_s for one in costs),
                transfer_s=max(one.transfer_s for one in costs),
            ),
            copy_byte_s=max(one.copy_byte_s for one in found),
            read_s=max(one.read_s for one in found),
        )


def head_shape(*, groups: int, queries: int, head_dim: int, item_bytes: int, block_tokens: int) -> HeadShape:
    """Return the heads of a layer on one rank: ``groups`` of ``queries`` query heads."""
    return HeadShape(
        head_groups=groups,
        queries_per_group=queries,
        kv_bytes_per_token=2 * head_dim * item_bytes,
        # Each query head sends a query and receives an output; its group's key and value are sent once.
        exchange_bytes_per_head=(2 + 2 / queries) * head_dim * item_bytes,
        block_tokens=block_tokens,
    )
