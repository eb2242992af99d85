"""The explanation of a plan as a message."""

from __future__ import annotations

from hetis.planner.convert.plans import price_to_proto
from hetis.solver.explain import Explanation, IdleGpus, MemoryBar, StageTime
from hetis.solver.plan import Plan, RunnerUp
from hetis.v1 import plan_service_pb2

_PRIMARY = "primary"


def explanation_to_proto(plan: Plan, explanation: Explanation) -> plan_service_pb2.ExplainPlanResponse:
    return plan_service_pb2.ExplainPlanResponse(
        memory=map(_memory, explanation.memory),
        stage_times=map(_stage_time, explanation.stage_times),
        bottlenecks=explanation.bottlenecks,
        idle=map(_idle, explanation.idle),
        attention_workers=explanation.attention_workers,
        prices=map(price_to_proto, plan.prices),
        runners_up=map(_runner_up, plan.runners_up),
        notes=plan.notes,
        kv_routes=explanation.kv_routes,
    )


def _memory(bar: MemoryBar) -> plan_service_pb2.MemoryBar:
    return plan_service_pb2.MemoryBar(
        replica=bar.replica,
        stage=bar.stage,
        is_attention_worker=bar.role != _PRIMARY,
        gpu_type=bar.gpu,
        num_devices=bar.num_devices,
        nominal_bytes=bar.nominal_bytes,
        unusable_bytes=bar.unusable_bytes,
        reserve_bytes=bar.reserve_bytes,
        weight_bytes=bar.weight_bytes,
        kv_bytes=bar.kv_bytes,
        activation_bytes=bar.activation_bytes,
        free_bytes=max(0, bar.free_bytes),  # parts are rounded: a full card may exceed its size by some bytes
    )


def _stage_time(part: StageTime) -> plan_service_pb2.StageTime:
    return plan_service_pb2.StageTime(
        replica=part.replica,
        stage=part.stage,
        gpu_type=part.gpu,
        tp=part.tp,
        copies=part.copies,
        dense_s=part.dense_s,
        all_reduce_s=part.all_reduce_s,
        prefill_attention_s=part.prefill_attention_s,
        decode_attention_s=part.decode_attention_s,
        transfer_s=part.transfer_s,
        head_s=part.head_s,
        other_s=part.other_s,
        total_s=part.total_s,
        is_bottleneck=part.is_bottleneck,
        kv_wait_s=part.kv_wait_s,
        kv_wire_s=part.kv_wire_s,
    )


def _idle(idle: IdleGpus) -> plan_service_pb2.IdleGpus:
    return plan_service_pb2.IdleGpus(gpu_type=idle.gpu, zone=idle.zone, count=idle.count, reason=idle.reason)


def _runner_up(runner: RunnerUp) -> plan_service_pb2.RunnerUp:
    return plan_service_pb2.RunnerUp(shape=runner.shape, rate_rps=runner.rate, reason=runner.reason)
