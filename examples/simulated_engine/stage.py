"""One copy of a stage of a simulated replica: owners of head groups, KV blocks in use, and rules of admission."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

from hetis.runtime.moves.engine import planned_s
from hetis.v1.head_map_pb2 import HeadMap, HeadMapDevice, Move, MoveInFlight, RunningRequest
from hetis.v1.report_pb2 import DeviceLoad, DeviceStatus, StageLoad
from hetis.v1.stage_pb2 import StageModel

if TYPE_CHECKING:
    from hetis.solver.dispatch.dispatch_problem import Stage
    from hetis.solver.dispatch.dispatcher import Dispatcher

MOST_KEPT = 64  # dispatchers kept: one per stage and set of speeds
GROWTH_BLOCKS = 4  # blocks reserved for the growth of a new request


@dataclass(slots=True, kw_only=True)
class SimulatedRequest:
    """A request of a simulated replica."""

    id: str  # unique in its replica
    context_tokens: int  # tokens that a decode step attends to
    remaining_tokens: int  # tokens still to be generated
    arrived_s: float
    incarnation: int = 0  # number of times that the request lost its KV
    copies: tuple[int, ...] = ()  # the copy of each stage that it runs on. Empty while it waits.
    begun_s: float | None = None  # time of the first token. None: not yet.
    made_tokens: int = 0  # output tokens so far


@dataclass(slots=True)
class StageRun:
    """The head map of one copy of one stage, at the engine that owns it."""

    model: StageModel  # devices of the stage and the cost of attention on them
    # The device of each head group, for every running request
    owners: dict[str, list[int]] = field(default_factory=dict)
    requests: dict[str, SimulatedRequest] = field(default_factory=dict)  # the running requests
    status: list[DeviceStatus.ValueType] = field(default_factory=list)  # status of every device
    reserved: dict[str, list[Move]] = field(default_factory=dict)  # moves that hold blocks at their target, by change
    # Measured factor by which each device's attention takes longer than the model predicts
    slowness: list[float] = field(default_factory=list)
    index: dict[str, int] = field(init=False)  # positions of the devices, by name

    def __post_init__(self) -> None:
        self.index = {device.name: i for i, device in enumerate(self.model.devices)}
        self.status = self.status or [DeviceStatus.DEVICE_STATUS_OK] * len(self.model.devices)
        self.slowness = self.slowness or [1.0] * len(self.model.devices)

    @property
    def primary_groups(self) -> int:
        """The number of head groups that the primary takes together."""
        return min(len(self.model.devices[0].gpus) or 1, self.model.heads.head_groups)

    def blocks(self, context_tokens: int) -> int:
        """Return the KV blocks per layer that one head group with this context takes."""
        return -(-context_tokens // self.model.heads.block_tokens)

    def used_blocks(self) -> list[int]:
        """Return the used blocks per device and layer: what owners hold and what moves have reserved."""
        used = [0] * len(self.model.devices)
        for name, owners in self.owners.items():
            blocks = self.blocks(self.requests[name].context_tokens)
            for owner in owners:
                used[owner] += blocks
        for moves in self.reserved.values():
            for move in moves:
                context = self.requests[move.request].context_tokens
                used[self.index[move.target]] += self.blocks(context) * len(move.head_groups)
        return used

    def free_blocks(self) -> list[int]:
        """Return the blocks free for new requests per device and layer: none on a device that accepts nothing."""
        return [
            device.total_blocks - used if status == DeviceStatus.DEVICE_STATUS_OK else 0
            for device, used, status in zip(self.model.devices, self.used_blocks(), self.status, strict=True)
        ]

    def heads_and_bytes(self) -> tuple[list[int], list[float]]:
        """Return, per device, the query heads and the KV bytes that a layer of a step reads."""
        shape = self.model.heads
        heads, kv_bytes = [0] * len(self.model.devices), [0.0] * len(self.model.devices)
        for name, owners in self.owners.items():
            read = shape.kv_bytes_per_token * self.requests[name].context_tokens
            for owner in owners:
                heads[owner] += shape.queries_per_group
                kv_bytes[owner] += read
        return heads, kv_bytes

    def attention_s(self) -> list[float]:
        """Return, per device, the seconds of attention per layer that the profile predicts, including transfer."""
        heads, kv_bytes = self.heads_and_bytes()
        return [planned_s(self.model, device, heads[i], kv_bytes[i]) for i, device in enumerate(self.model.devices)]

    # --- requests

    def admit(self, request: SimulatedRequest, owners: list[int]) -> None:
        self.requests[request.id], self.owners[request.id] = request, owners

    def drop(self, request: str) -> None:
        """Remove a request and its blocks. Its moves are void."""
        del self.requests[request], self.owners[request]
        for change, moves in self.reserved.items():
            self.reserved[change] = [move for move in moves if move.request != request]

    def overfull(self) -> int | None:
        """Return a device that holds more blocks than it has, or None if all fit."""
        used = zip(self.used_blocks(), self.model.devices, strict=True)
        return next((i for i, (blocks, device) in enumerate(used) if blocks > device.total_blocks), None)

    # --- reports

    def load(self) -> StageLoad:
        heads, kv_bytes = self.heads_and_bytes()
        used, predicted = self.used_blocks(), self.attention_s()
        devices = [
            DeviceLoad(
                device=device.name,
                heads=heads[i],
                kv_bytes=round(kv_bytes[i]),
                total_blocks=device.total_blocks,
                used_blocks=used[i],
                status=self.status[i],
                observed_s=predicted[i] * self.slowness[i],
                predicted_s=predicted[i],
            )
            for i, device in enumerate(self.model.devices)
        ]
        remaining = sum(request.remaining_tokens for request in self.requests.values())
        return StageLoad(stage=self.model.stage, copy=self.model.copy, devices=devices, remaining_tokens=remaining)

    def head_map(self) -> HeadMap:
        return HeadMap(
            stage=self.model.stage,
            copy=self.model.copy,
            devices=[
                HeadMapDevice(name=device.name, total_blocks=device.total_blocks, status=status)
                for device, status in zip(self.model.devices, self.status, strict=True)
            ],
            requests=[
                RunningRequest(
                    id=name,
                    incarnation=request.incarnation,
                    context_tokens=request.context_tokens,
                    remaining_tokens=request.remaining_tokens,
                    owners=self.owners[name],
                )
                for name, request in self.requests.items()
            ],
            moves=[
                MoveInFlight(change_id=change, move=move) for change, moves in self.reserved.items() for move in moves
            ],
        )

    def check(self) -> None:
        """Check that each head group has one owner, that lost devices hold nothing, and that blocks suffice."""
        groups, num = self.model.heads.head_groups, len(self.model.devices)
        assert self.owners.keys() == self.requests.keys(), "owners and requests differ"
        for name, owners in self.owners.items():
            assert len(owners) == groups, f"{name} has {len(owners)} owners, not {groups}"
            assert all(0 <= owner < num for owner in owners), f"{name} is owned by no device"
            lost = DeviceStatus.DEVICE_STATUS_LOST
            assert all(self.status[owner] != lost for owner in owners), f"{name} has KV on a lost device"
        assert self.overfull() is None, "a device holds more blocks than it has"
        for moves in self.reserved.values():
            for move in moves:
                owners = self.owners[move.request]
                source = self.index[move.source]
                assert all(owners[g] == source for g in move.head_groups), (
                    "a source lost head groups that it had not handed over"
                )


class AdmissionRule(Protocol):
    """Decides where the head groups of a new request go."""

    def warm_up(self) -> None:
        """Do in advance what is slow the first time. May take a minute."""

    def owners(self, stage: StageRun, request: SimulatedRequest) -> list[int] | None:
        """Return the device of each head group, or None if the request does not fit now."""


class ProportionalAdmission:
    """Gives each head group to the device with the smallest share of used blocks."""

    def warm_up(self) -> None:
        pass

    def owners(self, stage: StageRun, request: SimulatedRequest) -> list[int] | None:
        free = stage.free_blocks()
        totals = [device.total_blocks for device in stage.model.devices]
        need = stage.blocks(request.context_tokens + _growth(stage, request))
        units = [stage.primary_groups if device.is_primary else 1 for device in stage.model.devices]
        left, counts = stage.model.heads.head_groups, [0] * len(free)
        while left:
            fits = [i for i in range(len(free)) if units[i] <= left and free[i] >= need * units[i] and totals[i]]
            if not fits:
                return None
            best = max(fits, key=lambda i: (free[i] - need * units[i]) / totals[i])
            counts[best] += units[best]
            free[best] -= need * units[best]
            left -= units[best]
        return owners_of(counts)


class SolverAdmission:
    """Uses `hetis.solver.dispatch`: the slowest device finishes as early as possible, at the measured speeds."""

    def __init__(self) -> None:
        self._dispatchers: dict[tuple[bytes, tuple[float, ...]], Dispatcher] = {}

    def warm_up(self) -> None:
        from hetis.solver.dispatch.dispatcher import compile_dispatch

        compile_dispatch()

    def owners(self, stage: StageRun, request: SimulatedRequest) -> list[int] | None:
        import numpy as np

        from hetis.solver.dispatch.dispatch_problem import DeviceLoad, Requests
        from hetis.solver.dispatch.dispatcher import Dispatcher

        key = (stage.model.SerializeToString(deterministic=True), tuple(stage.slowness))
        if key not in self._dispatchers:
            if len(self._dispatchers) >= MOST_KEPT:
                self._dispatchers.clear()
            self._dispatchers[key] = Dispatcher(solver_stage(stage.model, stage.slowness))
        heads, kv_bytes = stage.heads_and_bytes()
        whole = partial(np.array, dtype=np.int64)
        load = DeviceLoad(heads=whole(heads), kv_bytes=np.array(kv_bytes), free_blocks=whole(stage.free_blocks()))
        context, growth = whole([request.context_tokens]), whole([_growth(stage, request)])
        new = Requests(ids=(request.id,), context_tokens=context, growth_tokens=growth)
        plan = self._dispatchers[key].dispatch(load, new)
        return None if plan.unplaced else owners_of([int(count) for count in plan.groups[0]])


def best_admission() -> AdmissionRule:
    """Return the dispatcher if numba, which compiles it, is installed, and the simple rule otherwise."""
    return SolverAdmission() if find_spec("numba") else ProportionalAdmission()


def owners_of(counts: list[int]) -> list[int]:
    return [device for device, count in enumerate(counts) for _ in range(count)]


def solver_stage(model: StageModel, slowness: Sequence[float]) -> Stage:
    """Return the solver's value for a stage whose devices take ``slowness`` times as long as the model predicts.

    A device with fewer pieces than others repeats its last.
    """
    import numpy as np

    from hetis.solver.dispatch.dispatch_problem import HeadShape, Primary, Stage

    most = max(len(device.pieces) for device in model.devices)

    def pieces(name: str) -> list[list[float]]:
        return [
            [slow * getattr(device.pieces[min(k, len(device.pieces) - 1)], name) for k in range(most)]
            for device, slow in zip(model.devices, slowness, strict=True)
        ]

    slow = np.array(slowness)
    primary = next((i for i, device in enumerate(model.devices) if device.is_primary), None)
    cards = 1 if primary is None else max(len(model.devices[primary].gpus), 1)
    nic_byte_s, nic_s = model.nic_byte_s, model.nic_s
    return Stage(
        heads=HeadShape(**{field.name: getattr(model.heads, field.name) for field in fields(HeadShape)}),
        devices=tuple(device.name for device in model.devices),
        head_s=np.array(pieces("head_s")),
        kv_byte_s=np.array(pieces("kv_byte_s")),
        call_s=np.array(pieces("call_s")),
        transfer_byte_s=np.array([device.transfer_byte_s for device in model.devices]) * slow,
        transfer_s=np.array([device.transfer_s for device in model.devices]) * slow,
        primary=None if primary is None else Primary(device=primary, tp=cards, nic_byte_s=nic_byte_s, nic_s=nic_s),
    )


def _growth(stage: StageRun, request: SimulatedRequest) -> int:
    return min(request.remaining_tokens, GROWTH_BLOCKS * stage.model.heads.block_tokens)
