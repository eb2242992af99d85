"""Reports on the engine as the contract's messages."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hetis.runtime.measured.calibration import device_seconds
from hetis.runtime.vllm.binding import Binding
from hetis.runtime.vllm.scheduler import SchedulerSide
from hetis.solver.dispatch.snapshot import DeviceStatus as OwnStatus
from hetis.v1.head_map_pb2 import HeadMap, HeadMapDevice, Move, MoveInFlight, RunningRequest
from hetis.v1.report_pb2 import DeviceLoad, DeviceReport, DeviceStatus, StageLoad
from hetis.v1.stage_pb2 import StageDevice, StageModel

_STATUS = {
    OwnStatus.OK: DeviceStatus.DEVICE_STATUS_OK,
    OwnStatus.DRAINING: DeviceStatus.DEVICE_STATUS_DRAINING,
    OwnStatus.LOST: DeviceStatus.DEVICE_STATUS_LOST,
}


def stage_load(side: SchedulerSide, binding: Binding) -> StageLoad:
    """Return the load of the replica's stage, with its times as planned and as measured."""
    allocator, costs = side.allocator, side.costs
    load = allocator.state.load()
    measured = device_seconds(costs.stage, load.heads.astype(np.float64), load.kv_bytes)
    devices = []
    for planned in binding.model.devices:
        device = binding.index[planned.name]
        heads, kv_bytes = int(load.heads[device]) * binding.cards, float(load.kv_bytes[device]) * binding.cards
        total, used = blocks(side, binding, device)
        devices.append(
            DeviceLoad(
                device=planned.name,
                heads=heads,
                kv_bytes=round(kv_bytes),
                total_blocks=total,
                used_blocks=used,
                status=_STATUS[allocator.state.devices[device].status],
                observed_s=float(measured[device]) if costs.is_measured else 0.0,
                predicted_s=planned_s(binding.model, planned, heads, kv_bytes),
            )
        )
    remaining = sum(allocator.state.remaining_tokens(name) for name in allocator.running)
    return StageLoad(stage=binding.model.stage, copy=binding.model.copy, devices=devices, remaining_tokens=remaining)


def blocks(side: SchedulerSide, binding: Binding, device: int) -> tuple[int, int]:
    """Return a device's blocks, as far as the plan lets it use them, and its used blocks, in the plan's unit."""
    total, used = side.allocator.totals(device)
    return total * binding.planned_blocks, used * binding.planned_blocks


def head_map(side: SchedulerSide, binding: Binding, in_flight: Iterable[tuple[str, Move]]) -> HeadMap:
    """Return the head map with the moves ``in_flight``, given with the ids of their changes."""
    allocator, model = side.allocator, binding.model
    position = {binding.index[device.name]: i for i, device in enumerate(model.devices)}
    devices = [
        HeadMapDevice(
            name=device.name,
            total_blocks=blocks(side, binding, binding.index[device.name])[0],
            status=_STATUS[allocator.state.devices[binding.index[device.name]].status],
        )
        for device in model.devices
    ]
    requests = []
    for name in allocator.running:
        owners = allocator.devices(name)
        if any(owner not in position for owner in owners):
            continue  # on a worker that the plan does not have: nobody may move its groups
        requests.append(
            RunningRequest(
                id=str(allocator.number(name)),
                context_tokens=allocator.state.context_tokens(name),
                remaining_tokens=allocator.state.remaining_tokens(name),
                owners=[position[owner] for owner in owners] * binding.cards,
            )
        )
    known = {request.id for request in requests}
    return HeadMap(
        stage=model.stage,
        copy=model.copy,
        devices=devices,
        requests=requests,
        moves=[MoveInFlight(change_id=one, move=move) for one, move in in_flight if move.request in known],
    )


def device_reports(side: SchedulerSide, binding: Binding, node: str) -> list[DeviceReport]:
    """Return the KV of the GPUs of one node. The GPUs of a device share its KV evenly."""
    reports = []
    for planned in binding.model.devices:
        total, used = blocks(side, binding, binding.index[planned.name])
        for gpu in planned.gpus:
            where, _, index = gpu.rpartition("/")
            if where == node and index.isdecimal():
                each = len(planned.gpus)
                reports.append(DeviceReport(index=int(index), total_blocks=total // each, used_blocks=used // each))
    return reports


def planned_s(model: StageModel, device: StageDevice, heads: int, kv_bytes: float) -> float:
    """Return the seconds per layer of attention and exchange by the plan's coefficients; the formula of
    ``stage.proto``.
    """
    if not heads or not device.pieces:
        return 0.0
    cards = max(len(device.gpus), 1) if device.is_primary else 1
    share = min(cards, model.heads.head_groups)
    seconds = max(p.head_s * heads / cards + p.kv_byte_s * kv_bytes / share + p.call_s for p in device.pieces)
    if device.is_primary:
        return seconds
    return seconds + device.transfer_byte_s * model.heads.exchange_bytes_per_head * heads + device.transfer_s
