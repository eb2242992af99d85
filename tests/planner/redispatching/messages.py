"""Random problems of the solver as the messages that a planner receives."""

from __future__ import annotations

from collections.abc import Iterable

from hetis.planner.convert.stages import card_of, evenly
from hetis.solver.dispatch.dispatch_problem import IntArray, Stage
from hetis.solver.dispatch.snapshot import DeviceSnapshot, StateSnapshot
from hetis.solver.redispatch.redispatch_problem import RedispatchProblem
from hetis.v1 import head_map_pb2, report_pb2, stage_pb2


def owners_of(stage: Stage, groups: IntArray) -> list[int]:
    """Return the owner of every head group of a request with ``groups`` [D] of them on the devices.

    A tensor-parallel primary of n cards takes equally many from each card; all other devices take any.
    """
    counts = groups.tolist()
    owners = [-1] * stage.heads.head_groups
    primary = None if stage.primary is None else stage.primary.device
    if primary is not None:
        for group in evenly(range(len(owners)), counts[primary], card_of(stage), {}):
            owners[group] = primary
    rest = iter([i for i, count in enumerate(counts) if i != primary for _ in range(count)])
    return [owner if owner >= 0 else next(rest) for owner in owners]


def _status(device: DeviceSnapshot) -> report_pb2.DeviceStatus.ValueType:
    return report_pb2.DeviceStatus.Value(f"DEVICE_STATUS_{device.status.name}")


def stage_message(problem: RedispatchProblem) -> stage_pb2.StageModel:
    stage = problem.snapshot.stage
    heads, primary = stage.heads, stage.primary
    return stage_pb2.StageModel(
        num_layers=problem.num_layers,
        heads=stage_pb2.HeadShape(
            head_groups=heads.head_groups,
            queries_per_group=heads.queries_per_group,
            kv_bytes_per_token=heads.kv_bytes_per_token,
            exchange_bytes_per_head=heads.exchange_bytes_per_head,
            block_tokens=heads.block_tokens,
        ),
        devices=[
            stage_pb2.StageDevice(
                name=name,
                gpus=[f"{name}/{r}" for r in range(primary.tp if primary and i == primary.device else 1)],
                is_primary=stage.has_primary_at(i),
                pieces=[
                    stage_pb2.AttentionPiece(head_s=a, kv_byte_s=b, call_s=c)
                    for a, b, c in zip(stage.head_s[i], stage.kv_byte_s[i], stage.call_s[i], strict=True)
                ],
                transfer_byte_s=stage.transfer_byte_s[i],
                transfer_s=stage.transfer_s[i],
                link_byte_s=problem.link_byte_s[i],
                high_water=problem.snapshot.devices[i].high_water,
                total_blocks=problem.snapshot.devices[i].total_blocks,
            )
            for i, name in enumerate(stage.devices)
        ],
        nic_byte_s=primary.nic_byte_s if primary else 0.0,
        nic_s=primary.nic_s if primary else 0.0,
    )


def head_map_message(snapshot: StateSnapshot) -> head_map_pb2.HeadMap:
    return head_map_pb2.HeadMap(
        devices=[
            head_map_pb2.HeadMapDevice(name=one.name, total_blocks=one.total_blocks, status=_status(one))
            for one in snapshot.devices
        ],
        requests=[
            head_map_pb2.RunningRequest(
                id=name,
                incarnation=j,
                context_tokens=int(snapshot.context_tokens[j]),
                remaining_tokens=int(snapshot.remaining_tokens[j]),
                owners=owners_of(snapshot.stage, snapshot.groups[j]),
            )
            for j, name in enumerate(snapshot.ids)
        ],
    )


def load_message(
    head_map: head_map_pb2.HeadMap, model: stage_pb2.StageModel, *, slowness: dict[str, float] | None = None
) -> report_pb2.StageLoad:
    """The sums of a head map; with ``slowness`` also times, longer than predicted by that factor."""
    heads, byte_s = model.heads, {}
    load = report_pb2.StageLoad(stage=head_map.stage, copy=head_map.copy)
    for i, device in enumerate(head_map.devices):
        owned = [(request, request.owners[:].count(i)) for request in head_map.requests]
        tokens = sum(request.context_tokens * groups for request, groups in owned)
        byte_s[device.name] = 1.0
        load.devices.add(
            device=device.name,
            heads=heads.queries_per_group * sum(groups for _, groups in owned),
            kv_bytes=int(tokens * heads.kv_bytes_per_token),
            total_blocks=device.total_blocks,
            used_blocks=sum(-(-request.context_tokens // heads.block_tokens) * groups for request, groups in owned),
            status=device.status,
            observed_s=(slowness or {}).get(device.name, 0.0) * 1e-3,
            predicted_s=1e-3 if slowness else 0.0,
        )
    return load


def apply_moves(head_map: head_map_pb2.HeadMap, moves: Iterable[head_map_pb2.Move]) -> None:
    """Flip all moves, as an engine does."""
    place = {device.name: i for i, device in enumerate(head_map.devices)}
    running = {request.id: request for request in head_map.requests}
    for move in moves:
        for group in move.head_groups:
            assert running[move.request].owners[group] == place[move.source]
            running[move.request].owners[group] = place[move.target]
