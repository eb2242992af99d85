"""The rules of an engine (`EngineRules`), checked on a plan's replicas alone."""

from __future__ import annotations

from collections.abc import Iterator

from hetis.solver.check.fleet import Fleet
from hetis.solver.check.violation import Rule, Violation
from hetis.solver.model import ModelSpec
from hetis.solver.plan import ReplicaPlan, Role
from hetis.solver.problem import EngineRules, PlacementProblem


def check_engine(replica: ReplicaPlan, where: str, problem: PlacementProblem, fleet: Fleet) -> list[Violation]:
    """Check that the replica is a pipeline as the family's engine runs it; nothing if any engine is allowed."""
    rules = problem.family.engine
    if rules is None:
        return []
    wrong = [
        *_pipeline(replica, rules, problem.model, fleet),
        *_precision(replica, problem.model),
        *_attention_workers(replica, rules, problem.model),
    ]
    return [Violation(rule=Rule.ENGINE, where=where, message=f"{message} ({rules.name})") for message in wrong]


def _pipeline(replica: ReplicaPlan, rules: EngineRules, model: ModelSpec, fleet: Fleet) -> Iterator[str]:
    depth, sizes = len(replica.stages), {stage.tp for stage in replica.stages}
    if depth > rules.max_stages:
        yield f"has {depth} stages, may have {rules.max_stages}"
    elif depth > (most := rules.stages_of(replica.role, model)):
        if replica.role is Role.UNIFIED:
            yield f"has {depth} stages and drafts tokens, may have {most} then"
        else:
            yield f"has {depth} stages and is to {replica.role} only: KV is handed over with {most} there"
    if len(sizes) > 1:
        yield f"has stages of TP {', '.join(map(str, sorted(sizes)))}, must have one TP size"
    if any(stage.copies > 1 for stage in replica.stages) and not replica.expert_parallel:
        yield "has stages with copies"
    if replica.in_flight != depth and not replica.expert_parallel:
        yield f"has {replica.in_flight} micro-batches in flight, must have one for each of its {depth} stages"
    names = replica.devices()
    if rules.max_gpus is not None and len(names) > rules.max_gpus:
        yield f"has {len(names)} GPUs, may have {rules.max_gpus}"
    fewest = min((stage.num_layers for stage in replica.stages), default=rules.min_layers)
    if fewest < rules.min_layers:
        yield f"has a stage of {fewest} layers, must have at least {rules.min_layers} in each"
    nodes = fleet.nodes_of(name for name in names if name in fleet.devices)
    if rules.max_nodes is not None and len(nodes) > rules.max_nodes:
        yield f"lies on {len(nodes)} nodes ({', '.join(nodes)}), may lie on {rules.max_nodes}"
    zones = fleet.zones_of(name for name in names if name in fleet.devices)
    if len(zones) > 1:
        yield f"lies in {len(zones)} zones ({', '.join(zones)}), must lie in 1"


def _precision(replica: ReplicaPlan, model: ModelSpec) -> Iterator[str]:
    own = {(m.weights, m.weight_bytes, m.kv_bytes) for m in (model.on(stage.gpu) for stage in replica.stages)}
    if len(own) > 1:
        types = ", ".join(dict.fromkeys(stage.gpu for stage in replica.stages))
        yield f"has stages in {len(own)} precisions on {types}, must have one"


def _attention_workers(replica: ReplicaPlan, rules: EngineRules, model: ModelSpec) -> Iterator[str]:
    pools, depth = replica.attention_workers, len(replica.stages)
    if not pools:
        return
    kv_bytes = model.on(replica.stages[0].gpu).kv_bytes if replica.stages else 2
    if kv_bytes != 2:
        yield f"has attention workers and KV of {kv_bytes:g} bytes an element, which must be 2"
    if replica.role is not Role.UNIFIED:
        yield f"has attention workers and is to {replica.role} only"
    if depth > rules.max_pooled_stages:
        yield f"has attention workers at {depth} stages, may have them at {rules.max_pooled_stages}"
    if {pool.stage for pool in pools} != set(range(depth)):
        yield "has attention workers at some stages, must have them at all or none"
    for what, values in (
        ("numbers", {len(pool.devices) for pool in pools}),
        ("GPU types", {pool.gpu for pool in pools}),
        ("head groups", {pool.kv_head_groups for pool in pools}),
    ):
        if len(values) > 1:
            yield f"has attention workers of different {what} at its stages: {', '.join(sorted(map(str, values)))}"
