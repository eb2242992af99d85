"""Random valid values of every kind of document."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from hetis.formats import catalogue
from hetis.formats.dispatch.new_requests import NewRequestPart, NewRequests
from hetis.formats.tenants import FleetTenantPart, FleetTenants
from hetis.solver.cluster import Cluster, GpuSlots, GpuType, Link, Network, NodeGroup
from hetis.solver.plan import (
    LEAST_DEMAND_RPS,
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
from hetis.solver.profile import Fit, FitScope, Mixed, Op, Piece, Profile, Provenance, Source
from hetis.solver.workload import LengthBin, RequestClass, Workload
from tests.formats.model_strategies import NOT_NEGATIVE, POSITIVE, SMALL, TITLES, models

BANDWIDTHS = st.floats(min_value=0.125, max_value=1e18)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
LINKS = st.builds(Link, bytes_per_s=BANDWIDTHS, latency_s=NOT_NEGATIVE)
PRICES = st.none() | st.floats(min_value=0, max_value=1e6)

KNOWN_GPUS = {entry.gpu.name: entry.gpu for entry in catalogue.gpus()}


@st.composite
def gpu_types(draw: st.DrawFn, name: str) -> GpuType:
    return GpuType(
        name=name,
        architecture=draw(TITLES),
        memory_bytes=draw(st.integers(min_value=1, max_value=2**50)),
        mem_bytes_per_s=draw(BANDWIDTHS),
        fp16_flops=draw(POSITIVE),
        fp8_flops=draw(st.none() | POSITIVE),
        pcie_bytes_per_s=draw(BANDWIDTHS),
        nvlink_bytes_per_s=draw(st.none() | BANDWIDTHS),
        usd_per_hour=draw(PRICES),
        vendor=draw(st.sampled_from(("NVIDIA", "AMD", "Huawei"))),
    )


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    own = {name: draw(gpu_types(name)) for name in draw(st.sets(TITLES, max_size=2))}
    available = sorted(KNOWN_GPUS | own)
    groups = []
    # Names without a final number, so that no group `a` of many collides with a single node `a-1`.
    names = draw(st.sets(NAMES.map(lambda name: f"{name}x"), min_size=1, max_size=4))
    for name in sorted(names):
        types = draw(st.sets(st.sampled_from(available), min_size=1, max_size=3))
        numbered = draw(st.booleans())
        slots = tuple(
            GpuSlots(
                gpu=gpu,
                count=draw(st.integers(1, 8)),
                usd_per_hour=draw(PRICES),
                reserved_bytes=draw(st.integers(0, (KNOWN_GPUS | own)[gpu].memory_bytes - 1)),
            )
            for gpu in sorted(types)
        )
        num_gpus = sum(one.count for one in slots)
        groups.append(
            NodeGroup(
                name=name,
                gpus=slots,
                count=draw(st.integers(1, 1000)) if numbered else 1,
                numbered=numbered,
                zone=draw(st.just("default") | NAMES),
                nic=draw(st.none() | LINKS),
                intra_link=draw(st.none() | LINKS),
                indices=tuple(draw(st.permutations(range(num_gpus)))) if num_gpus < 20 and draw(st.booleans()) else (),
                resource=draw(st.sampled_from(("", "nvidia.com/gpu.shared"))),
            )
        )
    zones = sorted({group.zone for group in groups})
    nodes = sorted(group.node_name(0) for group in groups)
    zone_pairs = [(a, b) for i, a in enumerate(zones) for b in zones[i:]]
    node_pairs = [(b, a) for i, a in enumerate(nodes) for b in nodes[i + 1 :]]
    network = Network(
        default=draw(LINKS),
        zone_default=draw(st.none() | LINKS),
        between_zones={pair: draw(LINKS) for pair in zone_pairs if draw(st.booleans())},
        between_nodes={pair: draw(LINKS) for pair in node_pairs if draw(st.booleans())},
    )
    used = {slots.gpu for group in groups for slots in group.gpus}
    types_used = {name: gpu for name, gpu in KNOWN_GPUS.items() if name in used and name not in own}
    return Cluster(name=draw(TITLES), node_groups=tuple(groups), gpu_types=types_used | own, network=network)


LENGTHS = st.floats(min_value=1, max_value=1e6)


@st.composite
def request_classes(draw: st.DrawFn) -> tuple[RequestClass, ...]:
    """Return no classes, or two or three whose bounds ascend."""
    bounds = sorted(draw(st.sets(st.integers(1, 100_000), max_size=2)))
    if not bounds:
        return ()
    limits = st.none() | st.floats(min_value=1e-6, max_value=1e3)
    return tuple(
        RequestClass(
            name=f"class {number}", max_prompt_tokens=most, ttft_limit_s=draw(limits), tpot_limit_s=draw(limits)
        )
        for number, most in enumerate([*bounds, None])
    )


WORKLOADS = st.builds(
    Workload,
    name=TITLES,
    bins=st.lists(
        st.builds(
            LengthBin, prompt_tokens=LENGTHS, output_tokens=LENGTHS, weight=st.floats(min_value=1e-9, max_value=1e9)
        ),
        min_size=1,
        max_size=5,
    ).map(tuple),
    rate_rps=st.none() | st.floats(min_value=1e-6, max_value=1e6),
    clipped_ratio=st.floats(min_value=0, max_value=1),
    prefix_hit_rate=st.just(0.0) | st.floats(min_value=0, max_value=1, exclude_max=True),
    burstiness=st.just(1.0) | st.floats(min_value=0, max_value=10),
    classes=request_classes(),
)

PIECES = st.builds(Piece, **dict.fromkeys(("fixed_s", "flop_s", "byte_s", "token_s", "head_s", "wire"), NOT_NEGATIVE))
PROVENANCES = st.builds(
    Provenance,
    source=st.sampled_from(Source),
    origin=TEXTS,
    held_out_mape=st.none() | st.floats(min_value=0, max_value=10),
)
SCOPES = st.builds(
    FitScope,
    model=st.none() | TITLES,
    tp=st.none() | SMALL,
    head_dim=st.none() | SMALL,
    queries_per_group=st.none() | SMALL,
    weights=st.none() | st.sampled_from(("bf16", "fp8", "int8", "int4", "mxfp4", "nvfp4")),
    weight_bytes=st.none() | st.floats(min_value=0.1, max_value=4),
    state_flops=st.none() | st.floats(min_value=1, max_value=1e9),
)


MIXED = st.builds(Mixed, factor=st.floats(0, 100), provenance=PROVENANCES)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    ops = [Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION, Op.ALL_REDUCE, Op.TRANSFER]
    return Profile(
        gpu=draw(TITLES),
        usable_bytes=draw(st.integers(1, 2**50)),
        reserve_bytes=draw(st.integers(0, 2**40)),
        fits=tuple(
            Fit(
                op=op,
                pieces=tuple(draw(st.lists(PIECES, min_size=1, max_size=2))),
                provenance=draw(PROVENANCES),
                scope=draw(SCOPES),
                mixed=draw(st.none() | MIXED) if op is Op.DECODE_ATTENTION else None,
            )
            for op in [*ops, *draw(st.lists(st.sampled_from(Op), max_size=2))]
        ),
    )


DEVICES = st.lists(TEXTS, min_size=1, max_size=3).map(tuple)
COUNTS = st.integers(0, 1000)
STAGES = st.builds(
    StagePlan,
    gpu=TITLES,
    tp=SMALL,
    copies=SMALL,
    first_layer=COUNTS,
    num_layers=COUNTS,
    devices=DEVICES,
    kv_head_groups_kept=COUNTS,
)


def pools_of(stages: int) -> st.SearchStrategy[AttentionWorkerPool]:
    return st.builds(
        AttentionWorkerPool,
        stage=st.integers(0, stages - 1),
        gpu=TITLES,
        devices=DEVICES,
        kv_head_groups=COUNTS,
        shared=st.booleans(),
    )


def routes_of(num_replicas: int) -> st.SearchStrategy[list[KvRoute]]:
    numbers = st.integers(0, max(0, num_replicas - 1))
    route = st.builds(KvRoute, prefill=numbers, decode=numbers, rate=NOT_NEGATIVE)
    return st.lists(route, max_size=2 if num_replicas else 0)


def replicas_of(role: Role, stages: int) -> st.SearchStrategy[ReplicaPlan]:
    return st.builds(
        ReplicaPlan,
        rate=NOT_NEGATIVE,
        ttft_s=NOT_NEGATIVE,
        tpot_s=NOT_NEGATIVE,
        micro_batch=st.just(0) if role is Role.PREFILL else SMALL,
        in_flight=SMALL,
        chunk_tokens=st.just(0) if role is Role.DECODE else SMALL,
        kv_tokens=COUNTS,
        stages=st.lists(STAGES, min_size=stages, max_size=stages).map(tuple),
        attention_workers=st.lists(pools_of(stages), max_size=2).map(tuple),
        role=st.just(role),
        expert_parallel=st.booleans(),
        kv_zones=st.lists(TITLES, max_size=2).map(tuple),
    )


REPLICAS = st.tuples(st.sampled_from(Role), st.integers(1, 2)).flatmap(lambda one: replicas_of(*one))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    kind = draw(st.sampled_from(ObjectiveKind))
    limits = st.none() | st.floats(min_value=1e-6, max_value=1e6)
    demands = st.none() | st.floats(min_value=LEAST_DEMAND_RPS, max_value=1e6)
    objective = Objective(kind=kind, ttft_limit_s=draw(limits), tpot_limit_s=draw(limits), demand_rps=draw(demands))
    proven = draw(st.booleans())
    finite = st.floats(min_value=-1e9, max_value=1e9)
    result = SolveResult(
        status=draw(st.sampled_from(Status)),
        objective=kind,
        value=draw(finite),
        bound=draw(finite) if proven else math.inf if objective.maximises else -math.inf,
        gap=draw(NOT_NEGATIVE) if proven else math.inf,
        unit=objective.unit,
        solve_s=draw(NOT_NEGATIVE),
    )
    price = st.builds(
        ClassPrice,
        gpu=TITLES,
        zone=TITLES,
        gpus_per_node=SMALL,
        available=COUNTS,
        used=COUNTS,
        as_attention_workers=COUNTS,
        dual=finite,
    )
    replicas = draw(st.lists(REPLICAS, max_size=2))
    return Plan(
        strategy=draw(TITLES),
        family=draw(TEXTS),
        result=result,
        objective=objective,
        replicas=tuple(replicas),
        kv_routes=tuple(draw(routes_of(len(replicas)))),
        prices=tuple(draw(st.lists(price, max_size=2))),
        runners_up=tuple(draw(st.lists(st.builds(RunnerUp, shape=TEXTS, rate=finite, reason=TEXTS), max_size=2))),
        notes=tuple(draw(st.lists(TEXTS, max_size=2))),
        inputs=draw(st.dictionaries(TEXTS, JSON_VALUES, max_size=3)),
    )


REQUESTS = st.lists(
    st.builds(NewRequestPart, id=TITLES, context_tokens=st.integers(1, 10**9), output_tokens=st.integers(0, 10**9)),
    max_size=4,
    unique_by=lambda request: request.id,
).map(lambda requests: NewRequests(requests=tuple(requests)))
LIMITS = st.none() | st.just("none") | st.floats(1e-6, 1e4).map("{!r}s".format)
TENANTS = st.builds(
    FleetTenants,
    tenants=st.lists(
        st.builds(
            FleetTenantPart,
            name=st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True).filter(lambda name: not name.endswith("-")),
            model=TITLES,
            workload=TITLES,
            weight=st.floats(1e-3, 1e3),
            worth=st.just(2.5),
            objective=st.sampled_from(["goodput", "throughput"]),
            ttft=LIMITS,
            tpot=LIMITS,
        ),
        min_size=1,
        max_size=3,
        unique_by=lambda tenant: tenant.name,
    ).map(tuple),
)
VALUES = clusters() | models() | WORKLOADS | profiles() | plans() | REQUESTS | TENANTS
