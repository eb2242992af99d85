"""Small stages as messages, and replicas that run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hetis.v1 import replica_pb2, report_pb2, stage_pb2

REPLICA = "clusters/c/replicas/r"
BLOCK = 4


def stage_model(
    num_devices: int,
    *,
    stage: int = 0,
    copy: int = 0,
    head_groups: int = 4,
    tp: int = 1,
    byte_s: Sequence[float] | None = None,
    total_blocks: int = 1000,
) -> stage_pb2.StageModel:
    """Devices ``s0c0/d0``..., the first a primary of ``tp`` cards; ``byte_s``: seconds per KV byte of each."""
    rates = list(byte_s or [1e-9] * num_devices)
    model = stage_pb2.StageModel(
        stage=stage,
        copy=copy,
        num_layers=10,
        heads=stage_pb2.HeadShape(
            head_groups=head_groups,
            queries_per_group=2,
            kv_bytes_per_token=512.0,
            exchange_bytes_per_head=8.0,
            block_tokens=BLOCK,
        ),
    )
    for i in range(num_devices):
        name = f"s{stage}c{copy}/d{i}"
        model.devices.append(
            stage_pb2.StageDevice(
                name=name,
                gpus=[f"{name}.{rank}" for rank in range(tp)] if i == 0 else [name],
                is_primary=i == 0,
                pieces=[stage_pb2.AttentionPiece(head_s=1e-8, kv_byte_s=rates[i], call_s=1e-6)],
                transfer_byte_s=0.0 if i == 0 else 1e-10,
                link_byte_s=1e-11,
                total_blocks=total_blocks,
            )
        )
    return model


@dataclass
class Replica:
    """A replica of the fleet."""

    stages: list[stage_pb2.StageModel]
    name: str = REPLICA
    state: replica_pb2.ReplicaState.ValueType = replica_pb2.REPLICA_STATE_SERVING
    generation: int = 1
    primary_node: str = "n"
    conditions: dict[str, report_pb2.DeviceStatus.ValueType] = field(default_factory=dict)
    redispatch: str = ""
