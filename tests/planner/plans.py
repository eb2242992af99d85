"""Plans made by hand, for code that only reads plans: reports and files. Their numbers prove nothing."""

from __future__ import annotations

from dataclasses import replace

from hetis.solver.placement.explanation.facts import Explanation, IdleGpus, MemoryBar, StageTime
from hetis.solver.plan import (
    AttentionWorkerPool,
    ClassPrice,
    KvRoute,
    Objective,
    ObjectiveKind,
    Plan,
    ReplicaPlan,
    Role,
    RunnerUp,
    SolveResult,
    StagePlan,
    Status,
)

GIB = 2**30


def stage(
    gpu: str, *, tp: int, first: int, layers: int, devices: tuple[str, ...], copies: int = 1, kept: int = 8
) -> StagePlan:
    return StagePlan(
        gpu=gpu, tp=tp, copies=copies, first_layer=first, num_layers=layers, devices=devices, kv_head_groups_kept=kept
    )


def replica(*stages: StagePlan, pools: tuple[AttentionWorkerPool, ...] = (), rate: float = 1.5) -> ReplicaPlan:
    return ReplicaPlan(
        rate=rate,
        ttft_s=1.21,
        tpot_s=0.0998,
        micro_batch=16,
        in_flight=4,
        chunk_tokens=512,
        kv_tokens=123_456,
        stages=stages,
        attention_workers=pools,
    )


def paper_replica() -> ReplicaPlan:
    """The paper's 12 GPUs in one pipeline, two of the P100s as attention workers."""
    return replica(
        stage("A100-PCIe-80GB", tp=4, first=0, layers=52, devices=tuple(f"a100/{i}" for i in range(4)), kept=1),
        stage(
            "RTX-3090",
            tp=2,
            first=52,
            layers=22,
            devices=("r3090-0/0", "r3090-0/1", "r3090-1/0", "r3090-1/1"),
            copies=2,
        ),
        stage("P100-PCIe-12GB", tp=2, first=74, layers=6, devices=("p100/0", "p100/1")),
        pools=(AttentionWorkerPool(stage=0, gpu="P100-PCIe-12GB", devices=("p100/2", "p100/3"), kv_head_groups=1),),
    )


def split_plan() -> Plan:
    """Three equal prefill replicas, two decode replicas, one of them with attention workers, and a unified one."""
    prefill = tuple(
        replace(
            replica(stage("L4", tp=1, first=0, layers=80, devices=(f"l4-{i}/0",)), rate=1.0),
            role=Role.PREFILL, kv_zones=("east", "west"), micro_batch=0, tpot_s=0.0,
        )
        for i in range(3)
    )  # fmt: skip
    decode = tuple(
        replace(one, role=Role.DECODE, chunk_tokens=0, ttft_s=0.0, rate=rate)
        for one, rate in ((paper_replica(), 1.6), (deep_replica(5), 1.0))
    )
    routes = tuple(KvRoute(prefill=i, decode=3 + i // 2, rate=1.0 if i == 2 else 0.8) for i in range(3))
    return replace(plan(*prefill, *decode, paper_replica()), kv_routes=routes)


def deep_replica(num_stages: int, node: int = 0) -> ReplicaPlan:
    """A pipeline of ``num_stages`` stages of four layers."""
    return replica(
        *(
            stage("P100-PCIe-12GB", tp=1, first=4 * i, layers=4, devices=(f"p100-{node}-{i}/0",))
            for i in range(num_stages)
        ),
        rate=0.1,
    )


def large_replicas(count: int) -> tuple[ReplicaPlan, ...]:
    """Many replicas of 30 shapes on nodes with long names."""
    return tuple(
        replica(
            stage(
                "H100-SXM-80GB",
                tp=8,
                first=0,
                layers=50 + number % 30,
                devices=tuple(f"rack-h100-{number}/{i}" for i in range(8)),
            ),
            stage(
                "RTX-PRO-6000-Blackwell-Server",
                tp=1,
                first=50 + number % 30,
                layers=30 - number % 30,
                devices=tuple(f"edge-workstation-{number}/{i}" for i in range(2)),
                copies=2,
            ),
        )
        for number in range(count)
    )


def plan(
    *replicas: ReplicaPlan,
    kind: ObjectiveKind = ObjectiveKind.GOODPUT,
    status: Status = Status.FEASIBLE,
    zones: tuple[str, ...] = ("default",),
) -> Plan:
    objective = Objective(
        kind=kind, demand_rps=None if kind in (ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT) else 4.0
    )
    return Plan(
        strategy="hetis",
        family="stages of any GPU types; any number of layers per stage; TP 1/2/4/8 inside a node; up to 4 copies per "
        "stage; up to 32 attention workers per stage copy",
        result=SolveResult(
            status=status, objective=kind, value=1.35, bound=1.357, gap=0.0052, unit=objective.unit, solve_s=2.31
        ),
        objective=objective,
        replicas=replicas,
        prices=tuple(
            ClassPrice(
                gpu=gpu,
                zone=zone,
                gpus_per_node=4,
                available=available,
                used=used,
                as_attention_workers=workers,
                dual=dual,
            )
            for zone in zones
            for gpu, available, used, workers, dual in (
                ("A100-PCIe-80GB", 4, 4, 0, 0.2871),
                ("RTX-3090", 4, 4, 0, 0.031),
                ("P100-PCIe-12GB", 4, 3, 2, 0.0),
            )
        ),
        runners_up=(
            RunnerUp(
                shape="A100-PCIe-80GB TP4 + 2 RTX-3090 TP2 without attention workers",
                rate=1.48,
                reason="serves 1.48 requests/s for GPUs that are worth 1.51 at the duals",
            ),
        ),
        notes=("modelled, not measured: the profiles of A100-PCIe-80GB, RTX-3090, P100-PCIe-12GB",),
        inputs={
            "documents": {
                "cluster": {"name": "paper"},
                "model": {"name": "meta-llama/Llama-2-70b-hf"},
                "workload": {"name": "azure_conv_2023"},
            }
        },
    )


def explanation(of: Plan) -> Explanation:
    """Bars for every stage and pool of the plan's replicas."""
    memory, times = [], []
    for number, one in enumerate(of.replicas):
        for index, part in enumerate(one.stages):
            memory.append(_memory(number, index, part.gpu, "primary", len(part.devices)))
            times.append(
                StageTime(
                    replica=number,
                    stage=index,
                    gpu=part.gpu,
                    tp=part.tp,
                    copies=part.copies,
                    dense_s=0.3,
                    all_reduce_s=0.05 if part.tp > 1 else 0.0,
                    prefill_attention_s=0.04,
                    decode_attention_s=0.1,
                    transfer_s=0.01,
                    head_s=0.0,
                    other_s=0.02,
                    kv_wait_s=0.0 if one.role is Role.UNIFIED else 0.04,
                    kv_wire_s=0.0 if one.role is Role.UNIFIED else 0.13,
                    total_s=0.52 if one.role is Role.UNIFIED else 0.56,
                    is_bottleneck=index == 0,
                )
            )
        memory += [_memory(number, p.stage, p.gpu, "attention worker", len(p.devices)) for p in one.attention_workers]
    return Explanation(
        memory=tuple(memory),
        stage_times=tuple(times),
        bottlenecks=tuple("stage 1 is busy 0.52 s per request; TPOT binds at 99.8 ms of 100 ms" for _ in of.replicas),
        idle=(
            IdleGpus(
                gpu="P100-PCIe-12GB", zone="default", count=1, reason="their price at the margin is 0: TPOT binds"
            ),
        ),
        attention_workers="Two P100 hold half the KV of stage 1: 1.50 requests/s against 1.42 without them.",
        kv_routes=("Prefill replicas give 3 requests/s, decode replicas 2.6: the decode side limits.",)
        if of.kv_routes
        else (),
    )


def _memory(number: int, index: int, gpu: str, role: str, num_devices: int) -> MemoryBar:
    return MemoryBar(
        replica=number,
        stage=index,
        role=role,
        gpu=gpu,
        num_devices=num_devices,
        nominal_bytes=80 * GIB,
        unusable_bytes=4 * GIB,
        reserve_bytes=2 * GIB,
        weight_bytes=34 * GIB if role == "primary" else 0,
        kv_bytes=30 * GIB,
        activation_bytes=GIB // 2,
        free_bytes=10 * GIB,
    )
