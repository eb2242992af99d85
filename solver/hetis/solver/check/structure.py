"""Structure of a plan: roles, devices, layers, head groups and an engine's rules, but no seconds and no bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from hetis.solver.check.fleet import Fleet
from hetis.solver.check.setting import divides, head_groups_per_rank
from hetis.solver.check.violation import Rule, Violation
from hetis.solver.model import ModelSpec
from hetis.solver.plan import AttentionWorkerPool, Plan, ReplicaPlan, Role, StagePlan
from hetis.solver.problem import EngineRules, PlacementProblem

# --- roles: the settings, the place and the GPU types that they require


def check_role(replica: ReplicaPlan, where: str, problem: PlacementProblem, fleet: Fleet) -> Iterator[Violation]:
    """Check that the family has the role, and that the replica's zone and KV destinations suit it."""
    if replica.role not in problem.family.roles:
        message = f"is {replica.role}, the family has {', '.join(problem.family.roles)} replicas"
        yield Violation(rule=Rule.ROLE, where=where, message=message)
    zones = fleet.zones_of(name for name in replica.devices() if name in fleet.devices)
    if replica.role is not Role.UNIFIED and len(zones) > 1:
        message = f"is {replica.role} and lies in {len(zones)} zones ({', '.join(zones)}), must lie in 1"
        yield Violation(rule=Rule.ROLE_ZONE, where=where, message=message)
    allowed = [(zones, "its own zone"), (fleet.zones, "all zones")]
    if replica.role is not Role.PREFILL:
        allowed = [((), "none")]
    if len(set(replica.kv_zones)) < len(replica.kv_zones) or all(
        set(replica.kv_zones) != set(names) for names, _ in allowed
    ):
        must = " or ".join(f"{word} ({', '.join(names)})" if names else word for names, word in allowed)
        message = f"kv_zones of a {replica.role} replica are {', '.join(replica.kv_zones) or 'none'}, must be {must}"
        yield Violation(rule=Rule.KV_ZONES, where=where, message=message)


def check_types_of_roles(plan: Plan, problem: PlacementProblem) -> list[Violation]:
    """Check that all replicas of a role use one GPU type if the family requires that."""
    if not problem.family.one_type_per_role:
        return []
    types: defaultdict[Role, set[str]] = defaultdict(set)
    for replica in plan.replicas:
        types[replica.role] |= {stage.gpu for stage in replica.stages}
        types[replica.role] |= {pool.gpu for pool in replica.attention_workers}
    return [
        Violation(
            rule=Rule.ROLE_TYPE,
            where="plan",
            message=f"{role} replicas use {len(gpus)} GPU types ({', '.join(sorted(gpus))}), the family allows 1",
        )
        for role, gpus in types.items()
        if role is not Role.UNIFIED and len(gpus) > 1
    ]


# --- the rules of an engine (`EngineRules`)


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


NONE = (0,)  # the only value of a size that a role does not have
SHARING_STRATEGIES = ("hetis-paper",)  # published heuristics whose attention workers serve a whole replica


def check_devices_once(plan: Plan) -> list[Violation]:
    """Check that each device serves one place in the plan; a shared card serves one place per stage of its replica."""
    first_seen: dict[str, str] = {}
    violations = []
    for number, replica in enumerate(plan.replicas):
        where = f"replica {number}"
        for name in _places(replica):
            if name in first_seen:
                message = f"device {name} is already used in {first_seen[name]}"
                violations.append(Violation(rule=Rule.DEVICE_ONCE, where=where, message=message))
            first_seen.setdefault(name, where)
    return violations


def _places(replica: ReplicaPlan) -> Iterator[str]:
    """Yield the device names of a replica once per use; sharing by pools of different stages counts as one use."""
    for stage in replica.stages:
        yield from stage.devices
    shared: set[str] = set()
    for pool in replica.attention_workers:
        if not pool.shared:
            yield from pool.devices
            continue
        yield from (name for i, name in enumerate(pool.devices) if name not in shared or name in pool.devices[:i])
        shared.update(pool.devices)


def check_replica_structure(
    replica: ReplicaPlan, where: str, problem: PlacementProblem, fleet: Fleet
) -> list[Violation]:
    """Check everything that must hold before the numbers of a replica have any meaning."""
    violations = list(check_role(replica, where, problem, fleet))
    violations += _check_setting(replica, where, problem)
    violations += _check_layers(replica, where, problem)
    violations += _check_one_type(replica, where, problem)
    for position, stage in enumerate(replica.stages):
        there, shares = f"{where} stage {position}", replica.expert_parallel
        violations += _check_stage(stage, there, problem, fleet, shares_experts=shares)
    violations += _check_pools(replica, where, problem, fleet)
    violations += _check_expert_parallel(replica, where, problem, fleet)
    violations += check_engine(replica, where, problem, fleet)
    return violations


def _check_setting(replica: ReplicaPlan, where: str, problem: PlacementProblem) -> Iterator[Violation]:
    family = problem.family
    for name, value, allowed in (
        ("micro_batch", replica.micro_batch, NONE if replica.role is Role.PREFILL else family.micro_batches),
        ("in_flight", replica.in_flight, (replica.attention_dp,) if replica.expert_parallel else family.in_flight),
        ("chunk_tokens", replica.chunk_tokens, NONE if replica.role is Role.DECODE else family.chunk_tokens),
    ):
        if value not in allowed or (value < 1 and allowed is not NONE):
            message = f"{name} is {value}, must be one of {_listed(allowed)}"
            yield Violation(rule=Rule.SETTING, where=where, message=message)
    engines = replica.attention_dp  # copies that share their experts are engines of their own
    in_flight, most = replica.in_flight // max(1, engines), family.engine_settings.max_num_seqs
    at_once = max(1, replica.micro_batch) * in_flight
    if most is not None and at_once > most:
        message = (
            f"runs {at_once} requests at once ({in_flight} micro-batches of {max(1, replica.micro_batch)}), "
            f"its engine runs at most {most}"
        )
        yield Violation(rule=Rule.MAX_NUM_SEQS, where=where, message=message)
    copies = sum(stage.copies for stage in replica.stages)
    if 1 < replica.in_flight < copies:
        message = f"has {replica.in_flight} micro-batches in flight, must have 1 or at least its {copies} stage copies"
        yield Violation(rule=Rule.IN_FLIGHT, where=where, message=message)


def _check_layers(replica: ReplicaPlan, where: str, problem: PlacementProblem) -> Iterator[Violation]:
    model, expected = problem.model, 0
    for position, stage in enumerate(replica.stages):
        there = f"{where} stage {position}"
        if stage.first_layer != expected:
            message = f"starts at layer {stage.first_layer}, must start at {expected}"
            yield Violation(rule=Rule.LAYERS, where=there, message=message)
        elif not model.allowed_cut(stage.first_layer):
            message = f"starts at layer {stage.first_layer}, where {model.name} must not be cut"
            yield Violation(rule=Rule.CUT, where=there, message=message)
        least = 1 + (model.prefix_layers if position == 0 else 0)
        if stage.num_layers < least:
            message = f"holds {stage.num_layers} layers, must hold at least {least}"
            yield Violation(rule=Rule.STAGE_LAYERS, where=there, message=message)
        expected = stage.first_layer + stage.num_layers
    if expected != model.num_layers:
        message = f"stages end at layer {expected}, {model.name} has {model.num_layers} layers"
        yield Violation(rule=Rule.LAYERS, where=where, message=message)
    if replica.stages and not problem.family.uneven_layers:
        yield from _check_equal_layers(replica, where, model.prefix_layers)


def _check_equal_layers(replica: ReplicaPlan, where: str, prefix_layers: int) -> Iterator[Violation]:
    """Check equal layers without prefix layers, which are part of the first stage in any split."""
    layers = [stage.num_layers - (prefix_layers if i == 0 else 0) for i, stage in enumerate(replica.stages)]
    if max(layers) - min(layers) > 1:
        message = f"stages hold {min(layers)} to {max(layers)} layers, may differ by 1 at most"
        yield Violation(rule=Rule.EQUAL_LAYERS, where=where, message=message)


def _check_one_type(replica: ReplicaPlan, where: str, problem: PlacementProblem) -> Iterator[Violation]:
    types = {stage.gpu for stage in replica.stages} | {pool.gpu for pool in replica.attention_workers}
    if len(types) > 1 and not problem.family.mixed_types:
        message = f"uses {len(types)} GPU types ({_listed(sorted(types))}), the family allows 1"
        yield Violation(rule=Rule.ONE_TYPE, where=where, message=message)


def _check_expert_parallel(
    replica: ReplicaPlan, where: str, problem: PlacementProblem, fleet: Fleet
) -> Iterator[Violation]:
    """Check the one stage whose copies share their experts."""
    if not replica.expert_parallel:
        return
    model, family = problem.model, problem.family
    if len(replica.stages) != 1 or replica.attention_workers:
        message = (
            f"shares experts among copies with {len(replica.stages)} stages and {len(replica.attention_workers)} pools "
            "of attention workers, must have 1 stage and none"
        )
        yield Violation(rule=Rule.EXPERTS, where=where, message=message)
        return
    stage, allowed = replica.stages[0], family.attention_dp_of(model)
    ranks = stage.tp * stage.copies
    if stage.copies not in allowed:
        most = _listed(allowed) or "none, for it has no experts"
        message = f"shares experts among {stage.copies} copies, {model.name} may have {most}"
        yield Violation(rule=Rule.EXPERTS, where=where, message=message)
    elif ranks not in family.tp_sizes:
        message = f"shares experts among {ranks} GPUs, must be one of {_listed(family.tp_sizes)}"
        yield Violation(rule=Rule.EXPERTS, where=where, message=message)
    elif model.moe is not None and model.moe.num_experts % ranks:
        message = f"shares {model.moe.num_experts} experts among {ranks} GPUs, which must divide them"
        yield Violation(rule=Rule.EXPERTS, where=where, message=message)
    nodes = fleet.nodes_of(name for name in stage.devices if name in fleet.devices)
    if len(nodes) > 1:
        message = f"shares experts among {len(nodes)} nodes ({_listed(nodes)}), must lie on 1"
        yield Violation(rule=Rule.TP_NODE, where=where, message=message)


def _check_stage(
    stage: StagePlan, where: str, problem: PlacementProblem, fleet: Fleet, *, shares_experts: bool = False
) -> Iterator[Violation]:
    family = problem.family
    if stage.tp not in family.tp_sizes or not divides(problem.model, stage.tp):
        message = (
            f"TP size is {stage.tp}, must be one of {_listed(family.tp_sizes)} that divides {problem.model.q_heads} "
            f"query heads and divides or is divided by {problem.model.head_groups} head groups"
        )
        yield Violation(rule=Rule.TP_SIZE, where=where, message=message)
    if not 1 <= stage.copies <= family.max_copies and not shares_experts:
        message = f"has {stage.copies} copies, must have 1 to {family.max_copies}"
        yield Violation(rule=Rule.COPIES, where=where, message=message)
    if len(stage.devices) != stage.tp * stage.copies:
        message = f"has {len(stage.devices)} devices, must have {stage.tp * stage.copies}"
        yield Violation(rule=Rule.DEVICE_COUNT, where=where, message=message)
        return
    unknown_or_wrong = list(_check_device_types(stage.devices, stage.gpu, where, fleet))
    yield from unknown_or_wrong
    if any(violation.rule is Rule.KNOWN_DEVICE for violation in unknown_or_wrong):
        return
    zones = fleet.zones_of(stage.devices)
    if len(zones) > 1:
        message = f"lies in {len(zones)} zones ({_listed(zones)}), must lie in 1"
        yield Violation(rule=Rule.STAGE_ZONE, where=where, message=message)
    for copy in range(stage.copies):
        nodes = fleet.nodes_of(stage.devices[copy * stage.tp : (copy + 1) * stage.tp])
        if len(nodes) > 1:
            message = f"TP group {copy} lies on {len(nodes)} nodes ({_listed(nodes)}), must lie on 1"
            yield Violation(rule=Rule.TP_NODE, where=where, message=message)


def _check_device_types(names: tuple[str, ...], gpu: str, where: str, fleet: Fleet) -> Iterator[Violation]:
    for name in names:
        device = fleet.devices.get(name)
        if device is None:
            message = f"device {name} is not among the {len(fleet.devices)} devices of the cluster"
            yield Violation(rule=Rule.KNOWN_DEVICE, where=where, message=message)
        elif device.gpu != gpu:
            message = f"device {name} is a {device.gpu}, must be a {gpu}"
            yield Violation(rule=Rule.GPU_TYPE, where=where, message=message)


def _check_pools(replica: ReplicaPlan, where: str, problem: PlacementProblem, fleet: Fleet) -> Iterator[Violation]:
    served: dict[int, AttentionWorkerPool] = {}
    for number, pool in enumerate(replica.attention_workers):
        there = f"{where} attention workers {number}"
        if pool.shared and problem.family.name not in SHARING_STRATEGIES:
            message = f"are shared, strategy {problem.family.name} gives every stage its own"
            yield Violation(rule=Rule.SHARED_POOL, where=there, message=message)
        if replica.role is Role.PREFILL:
            message = "belong to a prefill replica, which has no decode attention to give away"
            yield Violation(rule=Rule.POOL_STAGE, where=there, message=message)
        elif not 0 <= pool.stage < len(replica.stages):
            message = f"serve stage {pool.stage}, the replica has {len(replica.stages)} stages"
            yield Violation(rule=Rule.POOL_STAGE, where=there, message=message)
        elif pool.stage in served:
            message = f"are the second pool of stage {pool.stage}, it may have 1"
            yield Violation(rule=Rule.POOL_STAGE, where=there, message=message)
        else:
            served[pool.stage] = pool
            yield from _check_pool(pool, replica.stages[pool.stage], there, problem, fleet)
    for position, stage in enumerate(replica.stages):
        yield from _check_head_groups(stage, served.get(position), f"{where} stage {position}", replica.role, problem)


def _check_pool(
    pool: AttentionWorkerPool, stage: StagePlan, where: str, problem: PlacementProblem, fleet: Fleet
) -> Iterator[Violation]:
    yield from _check_pool_size(pool, stage, where, problem.family.max_pool)
    unknown_or_wrong = list(_check_device_types(pool.devices, pool.gpu, where, fleet))
    yield from unknown_or_wrong
    names = (*pool.devices, *stage.devices)
    if all(name in fleet.devices for name in names):
        stage_zones, zones = fleet.zones_of(stage.devices), fleet.zones_of(pool.devices)
        if not set(zones) <= set(stage_zones):
            message = f"lie in {_listed(zones)}, their stage in {_listed(stage_zones)}"
            yield Violation(rule=Rule.POOL_ZONE, where=where, message=message)


def _check_pool_size(pool: AttentionWorkerPool, stage: StagePlan, where: str, max_pool: int) -> Iterator[Violation]:
    num_devices, copies = len(pool.devices), max(1, stage.copies)
    if num_devices % copies:
        message = f"are {num_devices} devices, must be a multiple of the stage's {copies} copies"
        yield Violation(rule=Rule.DEVICE_COUNT, where=where, message=message)
    elif not 1 <= num_devices <= max_pool:
        message = f"are {num_devices} for one stage, must be 1 to {max_pool}"
        yield Violation(rule=Rule.POOL_SIZE, where=where, message=message)


def _check_head_groups(
    stage: StagePlan, pool: AttentionWorkerPool | None, where: str, role: Role, problem: PlacementProblem
) -> Iterator[Violation]:
    model = problem.model
    if not divides(model, stage.tp):
        return
    groups, kept = head_groups_per_rank(model, stage.tp), stage.kv_head_groups_kept
    given = pool.kv_head_groups if pool is not None else 0
    if kept < 0 or kept + given != groups:
        message = f"keeps {kept} and gives away {given} head groups per rank, a rank has {groups}"
        yield Violation(rule=Rule.HEAD_GROUPS, where=where, message=message)
    elif kept and role is Role.DECODE and not problem.family.decode_keeps_heads:
        message = f"keeps {kept} head groups per rank, attention workers have all of them where a replica decodes only"
        yield Violation(rule=Rule.HEAD_GROUPS, where=where, message=message)
    elif pool is not None and not 1 <= given <= groups:
        message = f"gives {given} head groups per rank to attention workers, must give 1 to {groups}"
        yield Violation(rule=Rule.HEAD_GROUPS, where=where, message=message)
    elif pool is not None and stage.tp > model.head_groups:
        message = f"has attention workers at TP size {stage.tp}, above the {model.head_groups} head groups"
        yield Violation(rule=Rule.HEAD_GROUPS, where=where, message=message)
    elif pool is not None and not model.heads_can_move:
        message = f"has attention workers, but layers of {model.name} keep more than the KV of single heads, or less"
        yield Violation(rule=Rule.HEAD_GROUPS, where=where, message=message)


def _listed(values: tuple[object, ...] | list[str]) -> str:
    return ", ".join(map(str, values))
