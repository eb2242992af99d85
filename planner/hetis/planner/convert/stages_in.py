"""A stage of the API as the solver reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from hetis.solver.dispatch.problem import FloatArray, HeadShape, Primary, Stage
from hetis.solver.errors import InvalidProblemError
from hetis.v1 import report_pb2, stage_pb2

HIGH_WATER = 0.9  # StageDevice.high_water if it is 0
_AS_PROFILED: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTerms:
    """The data about one copy of one stage that dispatch and re-dispatch need; ``stage`` is part of a problem.

    Attributes:
        stage: devices and the costs of attention on them.
        num_layers: a head group occupies, and moves in, all of them.
        link_byte_s: seconds per byte of KV moved into or out of each device, shape [D].
        high_water: share of each device's KV blocks above which head groups should leave.
        gpus: of each device, as ``node/index``.
        index: position of each device by name.
    """

    stage: Stage
    num_layers: int
    link_byte_s: FloatArray
    high_water: tuple[float, ...]
    gpus: tuple[tuple[str, ...], ...]
    index: Mapping[str, int]

    def statuses(
        self, conditions: Mapping[str, report_pb2.DeviceStatus.ValueType]
    ) -> tuple[report_pb2.DeviceStatus.ValueType, ...]:
        """Return the worst known status of any GPU of each device; ``conditions`` are by GPU, missing ones are OK."""
        ok = report_pb2.DEVICE_STATUS_OK
        return tuple(max((conditions.get(gpu, ok) for gpu in gpus), default=ok) for gpus in self.gpus)


def stage_from_proto(message: stage_pb2.StageModel, *, slowness: Mapping[str, float] = _AS_PROFILED) -> StageTerms:
    """Return the stage for the solver.

    Args:
        slowness: ratio of measured to predicted times by device name; 1 if missing. All terms are scaled, including the
            exchange, which is part of the measured times.

    Raises:
        InvalidProblemError: the stage contradicts itself.
    """
    if not message.devices:
        raise InvalidProblemError("a stage needs at least one device")
    if missing := [device.name for device in message.devices if not device.pieces]:
        raise InvalidProblemError(f"{missing[0]}: a device needs at least one piece")
    primaries = [i for i, device in enumerate(message.devices) if device.is_primary]
    if len(primaries) > 1:
        raise InvalidProblemError(f"{len(primaries)} devices are the primary, must be one at most")
    factor = np.array([slowness.get(device.name, 1.0) for device in message.devices])
    most = max(len(device.pieces) for device in message.devices)
    rows = [[*device.pieces, *[device.pieces[-1]] * (most - len(device.pieces))] for device in message.devices]
    names = tuple(device.name for device in message.devices)
    return StageTerms(
        stage=Stage(
            heads=_heads(message.heads),
            devices=names,
            head_s=np.array([[piece.head_s for piece in row] for row in rows]) * factor[:, None],
            kv_byte_s=np.array([[piece.kv_byte_s for piece in row] for row in rows]) * factor[:, None],
            call_s=np.array([[piece.call_s for piece in row] for row in rows]) * factor[:, None],
            transfer_byte_s=np.array([device.transfer_byte_s for device in message.devices]) * factor,
            transfer_s=np.array([device.transfer_s for device in message.devices]) * factor,
            primary=None
            if not primaries
            else Primary(
                device=primaries[0],
                tp=len(message.devices[primaries[0]].gpus) or 1,
                nic_byte_s=message.nic_byte_s,
                nic_s=message.nic_s,
            ),
        ),
        num_layers=message.num_layers,
        link_byte_s=np.array([device.link_byte_s for device in message.devices]),
        high_water=tuple(device.high_water or HIGH_WATER for device in message.devices),
        gpus=tuple(tuple(device.gpus) for device in message.devices),
        index={name: i for i, name in enumerate(names)},
    )


def _heads(heads: stage_pb2.HeadShape) -> HeadShape:
    return HeadShape(
        head_groups=heads.head_groups,
        queries_per_group=heads.queries_per_group,
        kv_bytes_per_token=heads.kv_bytes_per_token,
        exchange_bytes_per_head=heads.exchange_bytes_per_head,
        block_tokens=heads.block_tokens,
    )
