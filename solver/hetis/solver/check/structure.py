"""Structure of a plan: roles, devices, layers, head groups and an engine's rules, but no seconds and no bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from hetis.solver.check.replica_shapes import Fleet
from hetis.solver.check.setting import divides, head_groups_per_rank
from hetis.solver.check.violation import Broken, Rule, Violation, at
from hetis.solver.engine_rules import EngineRules
from hetis.solver.model import Compressed, ModelSpec
from hetis.solver.plan import AttentionWorkerPool, Plan, ReplicaPlan, Role, StagePlan
from hetis.solver.problem import PlacementProblem

# --- roles: the settings, the place and the GPU types that they require


def _check_role(replica: ReplicaPlan, problem: PlacementProblem, fleet: Fleet) -> Iterator[Broken]:
    """Check that the family has the role, and that the replica's zone and KV destinations suit it."""
    if replica.role not in problem.family.roles:
        yield Rule.ROLE, f"is {replica.role}, the family has {', '.join(problem.family.roles)} replicas"
    zones = fleet.zones_of(name for name in replica.devices() if name in fleet.devices)
    if replica.role is not Role.UNIFIED and len(zones) > 1:
        yield Rule.ROLE_ZONE, f"is {replica.role} and lies in {len(zones)} zones ({', '.join(zones)}), must lie in 1"
    allowed = [(zones, "its own zone"), (fleet.zones, "all zones")]
    if replica.role is not Role.PREFILL:
        allowed = [((), "none")]
    if len(set(replica.kv_zones)) < len(replica.kv_zones) or all(
        set(replica.kv_zones) != set(names) for names, _ in allowed
    ):
        must = " or ".join(f"{word} ({', '.join(names)})" if names else word for names, word in allowed)
        message = f"kv_zones of a {replica.role} replica are {', '.join(replica.kv_zones) or 'none'}, must be {must}"
        yield Rule.KV_ZONES, message


def check_types_of_roles(plan: Plan, problem: PlacementProblem) -> list[Violation]:
    """Check that all replicas of a role use one GPU type if the family requires that."""
    if not problem.family.one_type_per_role:
        return []
    types: defaultdict[Role, set[str]] = defaultdict(set)
    for replica in plan.replicas:
        types[replica.role] |= {part.gpu for part in replica.parts()}
    wrong = (
        (Rule.ROLE_TYPE, f"{role} replicas use {len(gpus)} GPU types ({_listed(sorted(gpus))}), the family allows 1")
        for role, gpus in types.items()
        if role is not Role.UNIFIED and len(gpus) > 1
    )
    return at("plan", wrong)


# --- the rules of an engine (`EngineRules`)


def check_engine(replica: ReplicaPlan, problem: PlacementProblem, fleet: Fleet) -> Iterator[Broken]:
    """Check that the replica is a pipeline as the family's engine runs it; nothing if any engine is allowed."""
    rules = problem.family.engine
    if rules is not None:
        for check in (_pipeline, _precision, _vendor, _engine_pools):
            for message in check(replica, rules, problem.model, fleet):
                yield Rule.ENGINE, f"{message} ({rules.name})"


def _pipeline(replica: ReplicaPlan, rules: EngineRules, model: ModelSpec, fleet: Fleet) -> Iterator[str]:
    depth, sizes = len(replica.stages), {stage.tp for stage in replica.stages}
    if depth > rules.max_stages:
        yield f"has {depth} stages, may have {rules.max_stages}"
    elif depth > (most := rules.stages_of(replica.role, model)):
        if rules.keeps_indexers_together(model) and replica.role is not Role.DECODE:
            yield f"has {depth} stages and layers that share indexers, may have {most} then"
        elif replica.role is Role.UNIFIED:
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


def _precision(replica: ReplicaPlan, rules: EngineRules, model: ModelSpec, fleet: Fleet) -> Iterator[str]:
    own = {(m.weights, m.weight_bytes, m.kv_bytes) for m in (model.on(stage.gpu) for stage in replica.stages)}
    if len(own) > 1:
        types = ", ".join(dict.fromkeys(stage.gpu for stage in replica.stages))
        yield f"has stages in {len(own)} precisions on {types}, must have one"


def _vendor(replica: ReplicaPlan, rules: EngineRules, model: ModelSpec, fleet: Fleet) -> Iterator[str]:
    types = fleet.cluster.gpu_types
    own = dict.fromkeys(types[stage.gpu].vendor for stage in replica.stages if stage.gpu in types)
    if len(own) > 1:
        yield f"has stages on GPUs of {' and '.join(own)}, must have one vendor's"


def _engine_pools(replica: ReplicaPlan, rules: EngineRules, model: ModelSpec, fleet: Fleet) -> Iterator[str]:
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
                violations += at(where, [(Rule.DEVICE_ONCE, f"device {name} is already used in {first_seen[name]}")])
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
    violations = at(where, _check_role(replica, problem, fleet), _check_setting(replica, problem))
    violations += at(where, _check_layers(replica, problem), _check_one_type(replica, problem))
    pools: dict[int, AttentionWorkerPool] = {}
    for number, pool in enumerate(replica.attention_workers):
        violations += at(f"{where} attention workers {number}", _check_pool(pool, replica, pools, problem, fleet))
    first = 0
    for position, stage in enumerate(replica.stages):
        there, pooled = f"{where} stage {position + 1}", pools.get(position)
        least = 1 + (0 if position else problem.model.prefix_layers)
        violations += at(there, _check_stage_layers(stage, first, least, problem.model))
        violations += at(there, _check_stage(stage, problem, fleet))
        violations += at(there, _check_head_groups(stage, pooled, problem))
        first = stage.first_layer + stage.num_layers
    return violations + at(
        where, _check_expert_parallel(replica, problem, fleet), check_engine(replica, problem, fleet)
    )


def _check_setting(replica: ReplicaPlan, problem: PlacementProblem) -> Iterator[Broken]:
    family = problem.family
    for name, value, allowed in (
        ("micro_batch", replica.micro_batch, NONE if replica.role is Role.PREFILL else family.micro_batches),
        ("in_flight", replica.in_flight, (replica.attention_dp,) if replica.expert_parallel else family.in_flight),
        ("chunk_tokens", replica.chunk_tokens, NONE if replica.role is Role.DECODE else family.chunk_tokens),
    ):
        if value not in allowed or (value < 1 and allowed is not NONE):
            yield Rule.SETTING, f"{name} is {value}, must be one of {_listed(allowed)}"
    engines = replica.attention_dp  # copies that share their experts are engines of their own
    in_flight, most = replica.in_flight // max(1, engines), family.engine_settings.max_num_seqs
    at_once = replica.seats // max(1, engines)
    if most is not None and at_once > most:
        message = (
            f"runs {at_once} requests at once ({in_flight} micro-batches of {max(1, replica.micro_batch)}), "
            f"its engine runs at most {most}"
        )
        yield Rule.MAX_NUM_SEQS, message
    if replica.max_num_seqs and (replica.role is Role.PREFILL or replica.max_num_seqs <= replica.planned_seats):
        message = (
            f"max_num_seqs is {replica.max_num_seqs}, must be 0 or more than the {replica.planned_seats} requests that "
            f"a replica that decodes holds at once when it is saturated"
        )
        yield Rule.SETTING, message
    copies = sum(stage.copies for stage in replica.stages)
    if 1 < replica.in_flight < copies:
        message = f"has {replica.in_flight} micro-batches in flight, must have 1 or at least its {copies} stage copies"
        yield Rule.IN_FLIGHT, message


def _check_layers(replica: ReplicaPlan, problem: PlacementProblem) -> Iterator[Broken]:
    model = problem.model
    end = replica.stages[-1].first_layer + replica.stages[-1].num_layers if replica.stages else 0
    if end != model.num_layers:
        yield Rule.LAYERS, f"stages end at layer {end}, {model.name} has {model.num_layers} layers"
    # Equal layers do not count prefix layers, which are part of the first stage in any split.
    layers = [stage.num_layers - (0 if i else model.prefix_layers) for i, stage in enumerate(replica.stages)]
    if layers and not problem.family.uneven_layers and max(layers) - min(layers) > 1:
        yield Rule.EQUAL_LAYERS, f"stages hold {min(layers)} to {max(layers)} layers, may differ by 1 at most"


def _check_stage_layers(stage: StagePlan, first: int, least: int, model: ModelSpec) -> Iterator[Broken]:
    if stage.first_layer != first:
        yield Rule.LAYERS, f"starts at layer {stage.first_layer}, must start at {first}"
    elif not model.allowed_cut(stage.first_layer):
        yield Rule.CUT, f"starts at layer {stage.first_layer}, where {model.name} must not be cut"
    if stage.num_layers < least:
        yield Rule.STAGE_LAYERS, f"holds {stage.num_layers} layers, must hold at least {least}"


def _check_one_type(replica: ReplicaPlan, problem: PlacementProblem) -> Iterator[Broken]:
    types = {part.gpu for part in replica.parts()}
    if len(types) > 1 and not problem.family.mixed_types:
        yield Rule.ONE_TYPE, f"uses {len(types)} GPU types ({_listed(sorted(types))}), the family allows 1"


def _check_expert_parallel(replica: ReplicaPlan, problem: PlacementProblem, fleet: Fleet) -> Iterator[Broken]:
    """Check the one stage whose copies share their experts."""
    if not replica.expert_parallel:
        return
    model, family = problem.model, problem.family
    if len(replica.stages) != 1 or replica.attention_workers:
        message = (
            f"shares experts among copies with {len(replica.stages)} stages and {len(replica.attention_workers)} pools "
            "of attention workers, must have 1 stage and none"
        )
        yield Rule.EXPERTS, message
        return
    stage, allowed = replica.stages[0], family.attention_dp_of(model)
    ranks = stage.tp * stage.copies
    if stage.copies not in allowed:
        most = _listed(allowed) or "none, for it has no experts"
        yield Rule.EXPERTS, f"shares experts among {stage.copies} copies, {model.name} may have {most}"
    elif ranks not in family.tp_sizes:
        yield Rule.EXPERTS, f"shares experts among {ranks} GPUs, must be one of {_listed(family.tp_sizes)}"
    elif model.experts is not None and model.experts.count % ranks:
        yield Rule.EXPERTS, f"shares {model.experts.count} experts among {ranks} GPUs, which must divide them"
    nodes = fleet.nodes_of(name for name in stage.devices if name in fleet.devices)
    if len(nodes) > 1:
        yield Rule.TP_NODE, f"shares experts among {len(nodes)} nodes ({_listed(nodes)}), must lie on 1"


def _check_stage(stage: StagePlan, problem: PlacementProblem, fleet: Fleet) -> Iterator[Broken]:
    family = problem.family
    if stage.tp not in family.tp_sizes or not divides(problem.model, stage.tp):
        message = (
            f"TP size is {stage.tp}, must be one of {_listed(family.tp_sizes)} that divides {problem.model.q_heads} "
            f"query heads and divides or is divided by {problem.model.head_groups} head groups"
        )
        if isinstance(shape := problem.model.attention, Compressed):
            message += f", and divides {shape.o_groups} groups of the output projection"
        yield Rule.TP_SIZE, message
    if stage.copies < 1:
        yield Rule.COPIES, f"has {stage.copies} copies, must have 1 at least"
    if len(stage.devices) != stage.tp * stage.copies:
        yield Rule.DEVICE_COUNT, f"has {len(stage.devices)} devices, must have {stage.tp * stage.copies}"
        return
    unknown_or_wrong = list(_check_device_types(stage.devices, stage.gpu, fleet))
    yield from unknown_or_wrong
    if any(rule is Rule.KNOWN_DEVICE for rule, _ in unknown_or_wrong):
        return
    zones = fleet.zones_of(stage.devices)
    if len(zones) > 1:
        yield Rule.STAGE_ZONE, f"lies in {len(zones)} zones ({_listed(zones)}), must lie in 1"
    for copy in range(stage.copies):
        nodes = fleet.nodes_of(stage.devices[copy * stage.tp : (copy + 1) * stage.tp])
        if len(nodes) > 1:
            yield Rule.TP_NODE, f"TP group {copy} lies on {len(nodes)} nodes ({_listed(nodes)}), must lie on 1"


def _check_device_types(names: tuple[str, ...], gpu: str, fleet: Fleet) -> Iterator[Broken]:
    for name in names:
        device = fleet.devices.get(name)
        if device is None and fleet.leaves_out(name):
            yield Rule.KNOWN_DEVICE, f"device {name} is left out by a constraint"
        elif device is None:
            yield Rule.KNOWN_DEVICE, f"device {name} is not among the {fleet.cluster.num_gpus()} devices of the cluster"
        elif device.gpu != gpu:
            yield Rule.GPU_TYPE, f"device {name} is a {device.gpu}, must be a {gpu}"


def _check_pool(
    pool: AttentionWorkerPool, replica: ReplicaPlan, pools: dict[int, AttentionWorkerPool], problem: PlacementProblem,
    fleet: Fleet,
) -> Iterator[Broken]:  # fmt: skip
    """Check a pool and, if it serves a stage, add it to ``pools``, which are by stage."""
    if pool.shared and problem.family.name not in SHARING_STRATEGIES:
        yield Rule.SHARED_POOL, f"are shared, strategy {problem.family.name} gives every stage its own"
    if replica.role is Role.PREFILL:
        yield Rule.POOL_STAGE, "belong to a prefill replica, which has no decode attention to give away"
        return
    if not 0 <= pool.stage < len(replica.stages):
        yield Rule.POOL_STAGE, f"serve stage {pool.stage + 1}, the replica has {len(replica.stages)} stages"
        return
    if pool.stage in pools:
        yield Rule.POOL_STAGE, f"are the second pool of stage {pool.stage + 1}, it may have 1"
        return
    pools[pool.stage], stage = pool, replica.stages[pool.stage]
    num_devices, copies, most = len(pool.devices), max(1, stage.copies), problem.family.max_pool
    if num_devices % copies:
        yield Rule.DEVICE_COUNT, f"are {num_devices} devices, must be a multiple of the stage's {copies} copies"
    elif not 1 <= num_devices <= most:
        yield Rule.POOL_SIZE, f"are {num_devices} for one stage, must be 1 to {most}"
    yield from _check_device_types(pool.devices, pool.gpu, fleet)
    if all(name in fleet.devices for name in (*pool.devices, *stage.devices)):
        stage_zones, zones = fleet.zones_of(stage.devices), fleet.zones_of(pool.devices)
        if not set(zones) <= set(stage_zones):
            yield Rule.POOL_ZONE, f"lie in {_listed(zones)}, their stage in {_listed(stage_zones)}"


def _check_head_groups(
    stage: StagePlan, pool: AttentionWorkerPool | None, problem: PlacementProblem
) -> Iterator[Broken]:
    model = problem.model
    if not divides(model, stage.tp):
        return
    groups, kept = head_groups_per_rank(model, stage.tp), stage.kv_head_groups_kept
    given = pool.kv_head_groups if pool is not None else 0
    if kept < 0 or kept + given != groups:
        yield Rule.HEAD_GROUPS, f"keeps {kept} and gives away {given} head groups per rank, a rank has {groups}"
    elif pool is not None and not 1 <= given <= groups:
        yield Rule.HEAD_GROUPS, f"gives {given} head groups per rank to attention workers, must give 1 to {groups}"
    elif pool is not None and stage.tp > model.head_groups:
        message = f"has attention workers at TP size {stage.tp}, above the {model.head_groups} head groups"
        yield Rule.HEAD_GROUPS, message
    elif pool is not None and not model.heads_can_move:
        message = f"has attention workers, but layers of {model.name} keep more than the KV of single heads, or less"
        yield Rule.HEAD_GROUPS, message


def _listed(values: tuple[object, ...] | list[str]) -> str:
    return ", ".join(map(str, values))
