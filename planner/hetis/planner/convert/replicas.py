"""Replicas of a plan as messages, and back."""

from __future__ import annotations

from collections.abc import Iterable

from hetis.planner.convert.roles import TO_PROTO, role_of
from hetis.solver.plan import AttentionWorkerPool, ReplicaPlan, StagePlan
from hetis.v1 import replica_pb2

MOST_IN_A_MESSAGE = 1000  # replicas in a PlanResult, see plan.proto


def replicas_to_proto(replicas: Iterable[ReplicaPlan], *, most_bytes: int) -> list[replica_pb2.ReplicaPlan]:
    """Return the first replicas: as many as a message may have, and as fit into ``most_bytes``."""
    messages: list[replica_pb2.ReplicaPlan] = []
    for replica in replicas:
        message = replica_to_proto(replica)
        most_bytes -= message.ByteSize()
        if len(messages) == MOST_IN_A_MESSAGE or most_bytes < 0:
            break
        messages.append(message)
    return messages


def replica_to_proto(replica: ReplicaPlan) -> replica_pb2.ReplicaPlan:
    return replica_pb2.ReplicaPlan(
        rate_rps=replica.rate,
        ttft_s=replica.ttft_s,
        tpot_s=replica.tpot_s,
        micro_batch=replica.micro_batch,
        in_flight=replica.in_flight,
        chunk_tokens=replica.chunk_tokens,
        kv_tokens=replica.kv_tokens,
        stages=(
            replica_pb2.StagePlan(
                gpu_type=stage.gpu,
                tp=stage.tp,
                copies=stage.copies,
                first_layer=stage.first_layer,
                num_layers=stage.num_layers,
                devices=stage.devices,
                kv_head_groups_kept=stage.kv_head_groups_kept,
            )
            for stage in replica.stages
        ),
        attention_workers=(
            replica_pb2.AttentionWorkerPool(
                stage=pool.stage,
                gpu_type=pool.gpu,
                devices=pool.devices,
                kv_head_groups=pool.kv_head_groups,
                shared=pool.shared,
            )
            for pool in replica.attention_workers
        ),
        role=TO_PROTO[replica.role],
        kv_zones=replica.kv_zones,
        expert_parallel=replica.expert_parallel,
    )


def replica_from_proto(message: replica_pb2.ReplicaPlan) -> ReplicaPlan:
    return ReplicaPlan(
        rate=message.rate_rps,
        ttft_s=message.ttft_s,
        tpot_s=message.tpot_s,
        micro_batch=message.micro_batch,
        in_flight=message.in_flight,
        chunk_tokens=message.chunk_tokens,
        kv_tokens=message.kv_tokens,
        stages=tuple(
            StagePlan(
                gpu=stage.gpu_type,
                tp=stage.tp,
                copies=stage.copies,
                first_layer=stage.first_layer,
                num_layers=stage.num_layers,
                devices=tuple(stage.devices),
                kv_head_groups_kept=stage.kv_head_groups_kept,
            )
            for stage in message.stages
        ),
        attention_workers=tuple(
            AttentionWorkerPool(
                stage=pool.stage,
                gpu=pool.gpu_type,
                devices=tuple(pool.devices),
                kv_head_groups=pool.kv_head_groups,
                shared=pool.shared,
            )
            for pool in message.attention_workers
        ),
        role=role_of(message),
        kv_zones=tuple(message.kv_zones),
        expert_parallel=message.expert_parallel,
    )
