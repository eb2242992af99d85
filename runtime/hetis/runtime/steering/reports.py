"""What the engine is like, in the contract's words."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hetis.runtime.engine.engine import Engine
from hetis.runtime.steering.binding import STATUS, StageBinding
from hetis.solver.dispatch.problem import FloatArray
from hetis.solver.dispatch.problem import Stage as StageCosts
from hetis.v1.head_map_pb2 import HeadMap, HeadMapDevice, Move, MoveInFlight, RunningRequest
from hetis.v1.report_pb2 import DeviceLoad, DeviceReport, StageLoad
from hetis.v1.stage_pb2 import StageDevice, StageModel


def stage_load(engine: Engine, binding: StageBinding, observed: StageCosts | None) -> StageLoad:
    """``observed``: what attention was measured to cost on the stage's devices. None: it was not measured."""
    placement = binding.part.placement
    load, group = placement.state.load(), placement.group
    costs = None if observed is None else group.costs(observed)
    devices = []
    for planned in binding.model.devices:
        place = binding.index[planned.name]
        here = list(group.devices(place))
        heads, kv_bytes = int(load.heads[here].sum()), float(load.kv_bytes[here].sum())
        total, used = binding.blocks(place)
        devices.append(
            DeviceLoad(
                device=planned.name,
                heads=heads,
                kv_bytes=round(kv_bytes),
                total_blocks=total,
                used_blocks=used,
                status=STATUS[binding.status(place)],
                observed_s=0.0 if costs is None else measured_s(costs, place, heads, kv_bytes),
                predicted_s=planned_s(binding.model, planned, heads, kv_bytes),
            )
        )
    remaining = sum(engine.expected_tokens(number) for number in binding.part.placement.requests)
    return StageLoad(stage=binding.model.stage, copy=binding.model.copy, devices=devices, remaining_tokens=remaining)


def head_map(engine: Engine, binding: StageBinding, in_flight: Iterable[tuple[str, Move]]) -> HeadMap:
    """``in_flight``: moves under way, with their changes.

    Without requests that are not whole units on a primary with several ranks: their blocks are no room for others.
    """
    placement, model = binding.part.placement, binding.model
    seen = placement.group.snapshot(placement.state.snapshot())
    position = {binding.index[device.name]: i for i, device in enumerate(model.devices)}
    devices = [(device.name, seen.devices[binding.index[device.name]]) for device in model.devices]
    return HeadMap(
        stage=model.stage,
        copy=model.copy,
        devices=[
            HeadMapDevice(name=name, total_blocks=device.total_blocks, status=STATUS[device.status])
            for name, device in devices
        ],
        requests=[
            RunningRequest(
                id=str(number),
                incarnation=engine.running[number].incarnation,
                context_tokens=placement.tokens(number),
                remaining_tokens=engine.expected_tokens(number),
                owners=[position[placement.group.place(owner)] for owner in placement.heads(number)],
            )
            for number in map(int, seen.ids)
        ],
        moves=[MoveInFlight(change_id=change_id, move=move) for change_id, move in in_flight],
    )


def device_reports(binding: StageBinding, node: str) -> list[DeviceReport]:
    """KV of the GPUs of one node, those of a device each with an even share."""
    reports = []
    for planned in binding.model.devices:
        total, used = binding.blocks(binding.index[planned.name])
        for gpu in planned.gpus:
            where, _, index = gpu.rpartition("/")
            if where == node and index.isdecimal():
                each = len(planned.gpus)
                reports.append(DeviceReport(index=int(index), total_blocks=total // each, used_blocks=used // each))
    return sorted(reports, key=lambda report: report.index)


def planned_s(model: StageModel, device: StageDevice, heads: int, kv_bytes: float) -> float:
    """Seconds per layer of attention and exchange by the plan's coefficients; the formula of ``stage.proto``."""
    if not heads:
        return 0.0
    cards = max(len(device.gpus), 1) if device.is_primary else 1
    share = min(cards, model.heads.head_groups)
    seconds = max(p.head_s * heads / cards + p.kv_byte_s * kv_bytes / share + p.call_s for p in device.pieces)
    if device.is_primary:
        return seconds
    return seconds + device.transfer_byte_s * model.heads.exchange_bytes_per_head * heads + device.transfer_s


def measured_s(costs: StageCosts, device: int, heads: int, kv_bytes: float) -> float:
    """The same by the coefficients that the engine dispatches with, those of a primary of several ranks a card's."""
    if not heads:
        return 0.0
    cards, share, away = 1, 1, True
    if costs.primary is not None and costs.primary.device == device:
        cards, share, away = costs.primary.tp, costs.primary_groups, False
    own = heads / cards, kv_bytes / share
    pieces: FloatArray = costs.head_s[device] * own[0] + costs.kv_byte_s[device] * own[1] + costs.call_s[device]
    exchange_s = costs.transfer_byte_s[device] * costs.heads.exchange_bytes_per_head * heads + costs.transfer_s[device]
    return float(np.max(pieces) + away * exchange_s)
