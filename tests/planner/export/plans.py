"""Eleven plans for a model of four layers, each with some feature that the others lack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hetis.formats.documents import to_data
from hetis.solver.model import ModelSpec
from hetis.solver.plan import KvRoute, Plan, ReplicaPlan, Role, StagePlan
from tests.engines.plans import MODEL, POOL, WITH_EXPERTS, plan_of, sharing, stage_of, staged

WHOLE = stage_of(kv_head_groups_kept=8)


def made_of(*replicas: ReplicaPlan, routes: tuple[KvRoute, ...] = ()) -> Plan:
    """Return a plan of these replicas that names its model."""
    plan = replace(plan_of(WHOLE), replicas=replicas, kv_routes=routes)
    return replace(plan, inputs={"documents": {"model": to_data(model_of(plan))}})


def model_of(plan: Plan) -> ModelSpec:
    """Return the model that a plan serves, with experts if its copies share them."""
    return WITH_EXPERTS if any(one.expert_parallel for one in plan.replicas) else MODEL


def on(*devices: str, tp: int = 1, first: int = 0, layers: int = 4, gpu: str = "L4", copies: int = 1) -> StagePlan:
    """Return a stage that keeps all its heads."""
    kept = 8 // tp
    return stage_of(
        gpu=gpu, tp=tp, copies=copies, first_layer=first, num_layers=layers, devices=devices, kv_head_groups_kept=kept
    )


def replica(*stages: StagePlan, **changes: Any) -> ReplicaPlan:
    return plan_of(*stages, **changes).replicas[0]


UNEVEN = (on("a/1", "a/0", tp=2, layers=3, gpu="H100"), on("c/2", "c/3", tp=2, first=3, layers=1))
THREE = (on("a/0", layers=2), on("b/0", first=2, layers=1), on("c/0", first=3, layers=1))
PREFILL = replica(*UNEVEN, role=Role.PREFILL, micro_batch=0, in_flight=2, tpot_s=0.0, rate=3.0)
DECODES = tuple(
    replica(on(f"d/{i}"), role=Role.DECODE, chunk_tokens=0, ttft_s=0.0, rate=rate) for i, rate in enumerate((2.0, 1.0))
)
PLANS: Mapping[str, Plan] = {
    "one GPU": made_of(replica(WHOLE)),
    "ranks in another order": made_of(replica(on("a/3", "a/1", tp=2))),
    "stages of a node": made_of(replica(on("a/0", layers=3, gpu="A100"), on("a/1", first=3, layers=1))),
    "stages of two nodes": made_of(replica(*UNEVEN, in_flight=2)),
    "attention workers": made_of(replica(stage_of(), attention_workers=(POOL,))),
    "workers of stages": made_of(staged().replicas[0]),
    "unlike replicas": made_of(
        replica(on("a/0", "a/1", tp=2), rate=6.0), replica(on("a/2"), rate=1.5), replica(on("b/0"), rate=2.5)
    ),
    "prefill and decode": made_of(
        PREFILL, *DECODES, routes=(KvRoute(prefill=0, decode=1, rate=2.0), KvRoute(prefill=0, decode=2, rate=1.0))
    ),
    "prefill in one stage": made_of(
        replace(PREFILL, stages=(on("a/0", "a/1", tp=2),), in_flight=1),
        *DECODES,
        routes=(KvRoute(prefill=0, decode=1, rate=2.0), KvRoute(prefill=0, decode=2, rate=1.0)),
    ),
    "three nodes twice": made_of(
        replica(*THREE, in_flight=3),
        replica(*(replace(s, devices=(s.devices[0].replace("/0", "/1"),)) for s in THREE), in_flight=3),
    ),
    "copies that share experts": made_of(
        replica(on("a/0", "a/1", "a/2", "a/3", copies=4), in_flight=4, expert_parallel=True, kv_tokens=4096)
    ),
}
CARDS_SHARED = made_of(sharing().replicas[0])
STAGE_COPIES = replica(on("e/0", layers=3), on("f/0", "f/1", first=3, layers=1, copies=2), rate=5.0)
WITH_WORKERS = {"attention workers", "workers of stages"}


def apart(prefill: str, decode: str, own: Mapping[str, Mapping[str, str]] | None = None) -> Plan:
    """Return a plan of a prefill and a decode replica on GPUs of these types, which may be the fleet's ``own``."""
    sender = replace(PREFILL, stages=(on("a/0", gpu=prefill),), in_flight=1)
    receiver = replace(DECODES[0], stages=(on("d/0", gpu=decode),))
    plan = made_of(sender, receiver, routes=(KvRoute(prefill=0, decode=1, rate=2.0),))
    documents = plan.inputs["documents"]
    return replace(plan, inputs={"documents": {**documents, "cluster": {"gpu_types": own}}}) if own else plan
