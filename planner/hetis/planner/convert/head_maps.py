"""Head maps of the API as snapshots of the solver, which counts head groups instead of naming them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

import numpy as np

from hetis.planner.convert.stages_in import StageTerms
from hetis.solver.dispatch.problem import IntArray
from hetis.solver.dispatch.snapshot import DeviceSnapshot, DeviceStatus, PreparedMove, StateSnapshot
from hetis.solver.errors import InvalidProblemError
from hetis.v1 import head_map_pb2, report_pb2

_STATUS = {
    report_pb2.DEVICE_STATUS_UNSPECIFIED: DeviceStatus.OK,
    report_pb2.DEVICE_STATUS_OK: DeviceStatus.OK,
    report_pb2.DEVICE_STATUS_DRAINING: DeviceStatus.DRAINING,
    report_pb2.DEVICE_STATUS_LOST: DeviceStatus.LOST,
}
_PROTO = {status: number for number, status in _STATUS.items()}
_NOTHING: Mapping[str, report_pb2.DeviceStatus.ValueType] = MappingProxyType({})


def status_from_proto(status: report_pb2.DeviceStatus.ValueType) -> DeviceStatus:
    """Return the status; unknown and unspecified ones count as OK."""
    return _STATUS.get(status, DeviceStatus.OK)


def status_to_proto(status: DeviceStatus) -> report_pb2.DeviceStatus.ValueType:
    return _PROTO[status]


def snapshot_from_proto(
    message: head_map_pb2.HeadMap,
    terms: StageTerms,
    *,
    conditions: Mapping[str, report_pb2.DeviceStatus.ValueType] = _NOTHING,
    high_water: float | None = None,
    changed: Collection[str] = (),
) -> StateSnapshot:
    """Return a head map's content for the solver.

    Requests with head groups on a lost device are left out, since they will be prefilled again; blocks that they still
    hold elsewhere are deducted from those devices. Devices of the stage that the map does not name have no blocks.

    Args:
        terms: the stage.
        conditions: the planner's status of devices, by GPU; the worse of it and the map's counts.
        high_water: of all devices; None: those of the stage.
        changed: devices that re-dispatch should look at, whatever they hold.

    Raises:
        InvalidProblemError: the map contradicts itself or the stage.
    """
    names = terms.stage.devices
    totals, place = [0] * len(names), list[int]()
    statuses = [status_from_proto(status) for status in terms.statuses(conditions)]
    for device in message.devices:
        i = terms.index.get(device.name)
        if i is None:
            raise InvalidProblemError(f"{device.name} is no device of the stage, which has {', '.join(names)}")
        place.append(i)
        totals[i] = device.total_blocks
        statuses[i] = _worse(statuses[i], status_from_proto(device.status))
    lost = [i for i, status in enumerate(statuses) if status is DeviceStatus.LOST]
    groups = _groups(message, terms, place)
    gone = groups[:, lost].sum(axis=1) > 0
    block_tokens = terms.stage.heads.block_tokens
    for j in np.flatnonzero(gone):
        blocks = -(-message.requests[j].context_tokens // block_tokens)
        totals = [max(0, total - blocks * int(n)) for total, n in zip(totals, groups[j], strict=True)]
    kept = [request for request, is_gone in zip(message.requests, gone, strict=True) if not is_gone]
    return StateSnapshot(
        stage=terms.stage,
        devices=tuple(
            DeviceSnapshot(
                name=name,
                total_blocks=total,
                status=status,
                high_water=high_water or own,
                changed=name in changed,
            )
            for name, total, status, own in zip(names, totals, statuses, terms.high_water, strict=True)
        ),
        ids=tuple(request.id for request in kept),
        context_tokens=np.array([request.context_tokens for request in kept], np.int64),
        remaining_tokens=np.array([request.remaining_tokens for request in kept], np.int64),
        groups=groups[~gone],
        moves=_moves(message, terms, {request.id for request in kept}),
    )


def _worse(one: DeviceStatus, other: DeviceStatus) -> DeviceStatus:
    return max(one, other, key=(DeviceStatus.OK, DeviceStatus.DRAINING, DeviceStatus.LOST).index)


def _groups(message: head_map_pb2.HeadMap, terms: StageTerms, place: list[int]) -> IntArray:
    """Return the number of head groups of each request on each device, shape [N, D]."""
    num, head_groups = terms.stage.num_devices, terms.stage.heads.head_groups
    groups = np.zeros((len(message.requests), num), np.int64)
    for j, request in enumerate(message.requests):
        owners = request.owners
        if len(owners) != head_groups or max(owners) >= len(place):
            raise InvalidProblemError(
                f"request {request.id} has owners {list(owners)}, must be {head_groups} positions in a list of "
                f"{len(place)} devices"
            )
        for owner in owners:
            groups[j, place[owner]] += 1
    return groups


def _moves(message: head_map_pb2.HeadMap, terms: StageTerms, kept: set[str]) -> tuple[PreparedMove, ...]:
    under_way = [one.move for one in message.moves if one.move.request in kept]
    for move in under_way:
        for name in (move.source, move.target):
            if name not in terms.index:
                raise InvalidProblemError(f"{name}, to or from which {move.request} moves, is no device of the stage")
    return tuple(
        PreparedMove(
            number=number,
            request=move.request,
            groups=len(move.head_groups),
            source=terms.index[move.source],
            target=terms.index[move.target],
        )
        for number, move in enumerate(under_way)
    )
