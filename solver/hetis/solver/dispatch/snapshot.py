"""The contents of one replica stage as a value: for files, for re-dispatch, and to initialise a `DispatchState`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from hetis.solver.dispatch.dispatch_problem import MOST_BLOCKS, MOST_TOKENS, DeviceLoad, IntArray, Stage, check_names
from hetis.solver.errors import InvalidProblemError


class DeviceStatus(StrEnum):
    """The status of a device, which determines whether it accepts head groups.

    ``ok``: it does. ``draining``: it serves what it holds, accepts nothing, and should be emptied. ``lost``: it is gone
    with its KV and holds nothing.
    """

    OK = "ok"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSnapshot:
    """One device of a stage."""

    name: str  # as in the stage
    total_blocks: int  # KV blocks of a layer on the device; for the primary, on all its cards together
    status: DeviceStatus = DeviceStatus.OK
    high_water: float = 0.9  # share of the blocks in use above which head groups should leave
    changed: bool = False  # joined, came back, was lost or changed its speed since the last check by re-dispatch

    def __post_init__(self) -> None:
        if not 0 <= self.total_blocks <= MOST_BLOCKS:
            raise InvalidProblemError(
                f"{self.name}: total_blocks is {self.total_blocks}, must be >= 0 and <= {MOST_BLOCKS}"
            )
        if not 0 < self.high_water <= 1:
            raise InvalidProblemError(f"{self.name}: high_water is {self.high_water}, must be > 0 and <= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedMove:
    """A move of head groups under way: both ends hold blocks, and the source owns the groups until commit.

    ``number`` identifies the move within its state; ``source`` and ``target`` are indices of devices.
    """

    number: int
    request: str
    groups: int
    source: int
    target: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StateSnapshot:
    """The contents of a stage at one moment, with requests in order of admission."""

    stage: Stage  # devices and the cost of attention on them
    devices: tuple[DeviceSnapshot, ...]  # one per device of the stage, in the stage's order
    ids: tuple[str, ...]  # names of the N running requests
    context_tokens: IntArray  # tokens that a decode step attends to, shape [N]
    remaining_tokens: IntArray  # output tokens still expected, one per decode step, shape [N]
    groups: IntArray  # head groups of each request on each device, shape [N, D]
    moves: tuple[PreparedMove, ...] = ()  # moves under way

    def __post_init__(self) -> None:
        names = tuple(device.name for device in self.devices)
        if names != self.stage.devices:
            raise InvalidProblemError(f"devices are {', '.join(names)}, the stage has {', '.join(self.stage.devices)}")
        num = len(self.ids)
        check_names("request", self.ids)
        if self.context_tokens.shape != (num,) or self.remaining_tokens.shape != (num,):
            raise InvalidProblemError(
                f"{num} requests have {len(self.context_tokens)} contexts and {len(self.remaining_tokens)} remainders"
            )
        if num and (self.context_tokens.min() < 1 or self.remaining_tokens.min() < 0):
            raise InvalidProblemError("requests need context_tokens >= 1 and remaining_tokens >= 0")
        if num and max(self.context_tokens.max(), self.remaining_tokens.max()) > MOST_TOKENS:
            longest = max(self.context_tokens.max(), self.remaining_tokens.max())
            raise InvalidProblemError(f"context_tokens or remaining_tokens is {longest}, must be <= {MOST_TOKENS}")
        if self.groups.shape != (num, len(names)):
            raise InvalidProblemError(f"groups has shape {self.groups.shape}, must be {(num, len(names))}")
        for j in np.flatnonzero(self._misplaced()):
            check_groups(self.stage, self.ids[j], self.groups[j])
        self._check_moves()
        self._check_devices()

    def _misplaced(self) -> npt.NDArray[np.bool_]:
        """Return a mask of the requests that `check_groups` rejects, shape [N]."""
        wrong: npt.NDArray[np.bool_] = (self.groups < 0).any(axis=1) | (
            self.groups.sum(axis=1) != self.stage.heads.head_groups
        )
        if self.stage.primary is not None:
            wrong |= self.groups[:, self.stage.primary.device] % self.stage.primary_groups != 0
        return wrong

    def _check_moves(self) -> None:
        index = {name: j for j, name in enumerate(self.ids)}
        away = np.zeros_like(self.groups)
        for move in self.moves:
            if move.request not in index or move.groups < 1 or move.source == move.target:
                raise InvalidProblemError(f"move {move.number}: no {move.groups} groups of {move.request} can move so")
            for device in (move.source, move.target):
                if not 0 <= device < len(self.devices):
                    raise InvalidProblemError(f"move {move.number}: {device} is none of {len(self.devices)} devices")
            away[index[move.request], move.source] += move.groups
        if np.any(away > self.groups):
            j, i = np.argwhere(away > self.groups)[0]
            raise InvalidProblemError(
                f"request {self.ids[j]}: {away[j, i]} groups are leaving {self.devices[i].name}, "
                f"which holds {self.groups[j, i]}"
            )
        if len({move.number for move in self.moves}) < len(self.moves):
            raise InvalidProblemError("two moves have the same number")

    def _check_devices(self) -> None:
        for device, used, held in zip(self.devices, self.used_blocks(), self.groups.sum(axis=0), strict=True):
            if used > device.total_blocks:
                raise InvalidProblemError(f"{device.name}: {used} KV blocks are in use of {device.total_blocks}")
            if held and device.status is DeviceStatus.LOST:
                raise InvalidProblemError(f"{device.name} is lost, but {held} head groups are said to be there")

    def context_blocks(self) -> IntArray:
        """Return the KV blocks per layer of one head group of each request, shape [N]."""
        return -(-self.context_tokens // self.stage.heads.block_tokens)

    def expected_blocks(self) -> IntArray:
        """Return the same blocks once the request has produced all expected tokens, shape [N]."""
        return -(-(self.context_tokens + self.remaining_tokens) // self.stage.heads.block_tokens)

    def used_blocks(self) -> IntArray:
        """Return the KV blocks in use on each device, including those of moves under way, shape [D]."""
        return self._blocks_on_devices(self.context_blocks())

    def total_blocks(self) -> IntArray:
        """Return the blocks of each device, shape [D]."""
        return np.array([device.total_blocks for device in self.devices], np.int64)

    def takes_groups(self) -> npt.NDArray[np.bool_]:
        """Return a mask of the devices that are ok, shape [D]."""
        return np.array([device.status is DeviceStatus.OK for device in self.devices])

    def incoming(self) -> IntArray:
        """Return the head groups of each request that moves bring to each device, shape [N, D]."""
        index = {name: j for j, name in enumerate(self.ids)}
        coming = np.zeros_like(self.groups)
        for move in self.moves:
            coming[index[move.request], move.target] += move.groups
        return coming

    def load(self) -> DeviceLoad:
        """Return the load that new requests join; devices that accept no groups have no free blocks."""
        heads = self.stage.heads
        free = self.total_blocks() - self._blocks_on_devices(self.expected_blocks())
        return DeviceLoad(
            heads=self.groups.sum(axis=0) * heads.queries_per_group,
            kv_bytes=(self.context_tokens @ self.groups).astype(np.float64) * heads.kv_bytes_per_token,
            free_blocks=np.where(self.takes_groups(), free, 0),
        )

    def _blocks_on_devices(self, blocks: IntArray) -> IntArray:
        used: IntArray = blocks @ (self.groups + self.incoming())
        return used


def check_groups(stage: Stage, request: str, groups: IntArray) -> None:
    """Raise InvalidProblemError unless every head group of a request has exactly one device; groups [D]."""
    if groups.min() < 0 or groups.sum() != stage.heads.head_groups:
        raise InvalidProblemError(
            f"request {request} has {groups.tolist()} head groups on the devices, must be "
            f"{stage.heads.head_groups} in all"
        )
    primary = stage.primary
    if primary is not None and groups[primary.device] % stage.primary_groups:
        raise InvalidProblemError(
            f"request {request}: {groups[primary.device]} head groups on {stage.devices[primary.device]}, "
            f"which takes {stage.primary_groups} at a time"
        )
