"""A stage as the contract describes it, as the solver reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from hetis.solver.dispatch.problem import FloatArray, HeadShape, Primary, Stage
from hetis.solver.errors import InvalidProblemError
from hetis.v1 import report_pb2, stage_pb2

HIGH_WATER = 0.9  # StageDevice.high_water, where it says 0
_AS_PROFILED: Mapping[str, float] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageTerms:
    """What dispatch and re-dispatch need of one copy of one stage; all but ``stage`` are beside it in a problem.

    Attributes:
        stage: devices and what attention costs on them.
        num_layers: a head group lies, and moves, in all of them.
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
        """The worst that is known of any GPU of each device; ``conditions`` by GPU, OK where it says nothing."""
        ok = report_pb2.DEVICE_STATUS_OK
        return tuple(max((conditions.get(gpu, ok) for gpu in gpus), default=ok) for gpus in self.gpus)


def stage_from_proto(message: stage_pb2.StageModel, *, slowness: Mapping[str, float] = _AS_PROFILED) -> StageTerms:
    """The same stage for the solver.

    Args:
        slowness: by device name, what measured times are to predicted ones; 1 where it says nothing. All terms are
            scaled, exchange included: it is in the measured times.

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
