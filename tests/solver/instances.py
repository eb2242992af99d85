"""Small problems for tests: handmade (`make_problem`) and random (`problems`).

Sizes are chosen so that memory, links and latency limits all bind now and then: layers of about 1 to 2 MB, cards of 6
to 60 MB, links of 0.1 to 1 GB/s, steps of about a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

from hetis.solver.cluster import Cluster, GpuSlots, GpuType, Link, Network, NodeGroup
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.model import ModelSpec
from hetis.solver.placement.families import run_by
from hetis.solver.plan import Objective, ObjectiveKind
from hetis.solver.plugin_time import PluginTime
from hetis.solver.problem import Assumptions, PlacementProblem
from hetis.solver.profile import Fit, Mixed, Op, Piece, Profile, Provenance, Source
from hetis.solver.workload import LengthBin, Workload
from tests.models import model_of, replace, shape_of

MADE_UP = Provenance(source=Source.MODELLED, origin="made up for tests")
ENGINE = EngineRules(name="vllm-hetis", max_stages=4, max_pooled_stages=3)
SMALL_FAMILY = run_by(Family(max_pool=2, tp_sizes=(1, 2, 4), micro_batches=(1, 4, 16), chunk_tokens=(64,)), ENGINE)
FREE_FAMILY = Family(max_pool=2, tp_sizes=(1, 2, 4), micro_batches=(1, 4, 16), in_flight=(1, 2, 4), chunk_tokens=(64,))
"""The replicas of published heuristics, which know no engine's rules, and of plans that only the checker sees."""
PLUGIN = PluginTime(
    local_s=4e-5,
    exchange_s=7e-5,
    exchange_low_s=3e-5,
    exchange_high_s=9e-5,
    step_s=6e-5,
    sequence_s=5e-6,
    source="tests",
)
NO_LIMITS = Objective(ttft_limit_s=None, tpot_limit_s=None)


def mixed_by(factor: float | None) -> Mixed | None:
    """A factor of decode attention beside a chunk, or none."""
    return None if factor is None else Mixed(factor=factor, provenance=MADE_UP)


def make_profile(
    gpu: str, *, flops: float = 2e12, bytes_per_s: float = 2e10, usable_bytes: int = 30_000_000,
    with_step: bool = True, mixed_factor: float | None = None,
) -> Profile:  # fmt: skip
    """A roofline: one piece for compute, one for memory, with a launch in both."""

    mixed = mixed_by(mixed_factor)

    def roofline(op: Op) -> Fit:
        pieces = (Piece(fixed_s=5e-6, flop_s=1 / flops), Piece(fixed_s=5e-6, byte_s=1 / bytes_per_s))
        return Fit(op=op, pieces=pieces, provenance=MADE_UP, mixed=mixed if op is Op.DECODE_ATTENTION else None)

    def wired(op: Op) -> Fit:
        return Fit(op=op, pieces=(Piece(fixed_s=3e-6, byte_s=1e-11, wire=1.1),), provenance=MADE_UP)

    step = Fit(op=Op.STEP, pieces=(Piece(fixed_s=5e-5, token_s=1e-7),), provenance=MADE_UP)
    fits = [roofline(op) for op in (Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION)]
    fits += [wired(Op.ALL_REDUCE), wired(Op.TRANSFER), *([step] if with_step else [])]
    return Profile(gpu=gpu, usable_bytes=usable_bytes, reserve_bytes=1_000_000, fits=tuple(fits))


def make_gpu(name: str, *, usd_per_hour: float = 1.0) -> GpuType:
    return GpuType(
        name=name,
        architecture="test",
        memory_bytes=32_000_000,
        mem_bytes_per_s=2e10,
        fp16_flops=2e12,
        pcie_bytes_per_s=2e9,
        usd_per_hour=usd_per_hour,
    )


def make_model(
    *,
    num_layers: int = 6,
    q_heads: int = 4,
    kv_heads: int = 2,
    forbidden_cuts: frozenset[int] = frozenset(),
    tie_embeddings: bool = False,
    moe: dict[str, Any] | None = None,
) -> ModelSpec:
    return model_of(
        name="tiny",
        num_layers=num_layers,
        hidden=256,
        intermediate=512,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=256 // q_heads,
        vocab=1000,
        forbidden_cuts=forbidden_cuts,
        tie_embeddings=tie_embeddings,
        moe=moe,
    )


def make_compressed(*, q_heads: int = 4) -> ModelSpec:
    """Return a model with compressed attention: three sparse layers, two heavy ones, and one with a window alone."""
    shape = shape_of(
        window=24,
        sparse_layers=3,
        sparse_ratio=4,
        heavy_layers=2,
        heavy_ratio=32,
        top_entries=20,
        index_heads=2,
        index_head_dim=16,
        index_key_bytes=20.0,
        rope_head_dim=16,
        q_lora_rank=64,
        o_groups=4,
        o_lora_rank=32,
    )
    return replace(make_model(q_heads=q_heads, kv_heads=1), compressed=shape, residual_streams=3)


def make_workload(*lengths: tuple[float, float]) -> Workload:
    """Return a workload of equally frequent (prompt, output) lengths in tokens."""
    bins = tuple(LengthBin(prompt_tokens=p, output_tokens=o, weight=1.0) for p, o in lengths or [(120, 40)])
    return Workload(name="tiny", bins=bins)


def make_node(
    name: str, gpu: str, *, gpus: int = 1, nodes: int = 1, zone: str = "default", nic: Link | None = None
) -> NodeGroup:
    """``nodes`` equal nodes of ``gpus`` cards each."""
    slots = (GpuSlots(gpu=gpu, count=gpus),)
    return NodeGroup(name=name, gpus=slots, count=nodes, numbered=nodes > 1, zone=zone, nic=nic)


def make_problem(
    nodes: Sequence[NodeGroup],
    *,
    profiles: Mapping[str, Profile] | None = None,
    model: ModelSpec | None = None,
    workload: Workload | None = None,
    network: Network | None = None,
    objective: Objective = NO_LIMITS,
    family: Family = SMALL_FAMILY,
    assumptions: Assumptions | None = None,
    usd_per_hour: Mapping[str, float] | None = None,
) -> PlacementProblem:
    """A problem on these nodes; omitted arguments take the values above."""
    names = dict.fromkeys(slots.gpu for group in nodes for slots in group.gpus)
    prices = usd_per_hour or {}
    cluster = Cluster(
        name="tiny",
        node_groups=tuple(nodes),
        gpu_types={name: make_gpu(name, usd_per_hour=prices.get(name, 1.0)) for name in names},
        network=network or Network(default=Link(bytes_per_s=5e8, latency_s=1e-5)),
    )
    return PlacementProblem(
        cluster=cluster,
        model=model or make_model(),
        workload=workload or make_workload(),
        profiles=profiles or {name: make_profile(name) for name in names},
        objective=objective,
        assumptions=assumptions or Assumptions(chooses_utilisation=False),  # what is kept: test_utilisation.py
        family=family,
    )


_MODELS = (
    make_model(num_layers=4),
    make_model(num_layers=6, kv_heads=4),
    make_model(num_layers=5, kv_heads=1),
    make_model(num_layers=6, kv_heads=2, tie_embeddings=True),
    make_model(
        num_layers=5,
        moe=shape_of(num_experts=4, active_experts=2, expert_intermediate=256, shared_experts=1, first_dense_layers=1),
    ),
)
_HEAVY_TAIL = make_workload(*[(40, 20)] * 19, (1500, 20))
_WORKLOADS = (make_workload(), make_workload((300, 20), (60, 60)), make_workload((40, 120)), _HEAVY_TAIL)
_LIMITS = ((None, None), (None, 0.01), (0.1, 0.02), (0.05, None), (0.5, 0.1))  # ttft, tpot


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    max_gpus: int = 5,
    kinds: tuple[ObjectiveKind, ...] = (ObjectiveKind.GOODPUT,),
    family: Family | None = None,
    num_zones: int = 2,
) -> PlacementProblem:
    """Draw tiny problems: up to ``max_gpus`` GPUs of up to 3 types, 4 to 6 layers, with and without limits."""
    nodes = draw(_fleets(max_gpus=max_gpus, num_zones=num_zones))
    types = dict.fromkeys(slots.gpu for group in nodes for slots in group.gpus)
    profiles = {
        name: make_profile(
            name,
            flops=draw(st.sampled_from((3e11, 1e12, 4e12))),
            bytes_per_s=draw(st.sampled_from((3e9, 1e10, 4e10))),
            usable_bytes=draw(st.sampled_from((6, 12, 25, 60))) * 1_000_000,
            with_step=draw(st.booleans()),
            mixed_factor=draw(st.sampled_from((None, 0.5, 2.5))),
        )
        for name in types
    }
    kind = draw(st.sampled_from(kinds))
    ttft_limit_s, tpot_limit_s = draw(st.sampled_from(_LIMITS))
    demand = draw(st.sampled_from((5.0, 60.0, 300.0)))
    needs_demand = kind in (ObjectiveKind.COST, ObjectiveKind.GPUS)
    between = Link(bytes_per_s=draw(st.sampled_from((3e8, 5e9))), latency_s=draw(st.sampled_from((1e-4, 1e-3))))
    chosen = family or draw(_families())
    return make_problem(
        nodes,
        profiles=profiles,
        model=draw(st.sampled_from(_MODELS)),
        workload=replace(draw(st.sampled_from(_WORKLOADS)), prefix_hit_rate=draw(st.sampled_from((0.0, 0.0, 0.6)))),
        network=Network(default=Link(bytes_per_s=5e8, latency_s=2e-5), zone_default=between),
        objective=Objective(
            kind=kind,
            ttft_limit_s=ttft_limit_s,
            tpot_limit_s=tpot_limit_s,
            demand_rps=demand if needs_demand else None,
        ),
        family=chosen,
        usd_per_hour={name: draw(st.sampled_from((0.5, 1.0, 3.0))) for name in types},
    )


@st.composite
def _fleets(draw: st.DrawFn, *, max_gpus: int, num_zones: int) -> list[NodeGroup]:
    """Draw node groups of one type each (sometimes of two), no two of the same type, zone and size."""
    groups: list[NodeGroup] = []
    seen: set[tuple[str, str, int]] = set()
    room = max_gpus
    for number in range(draw(st.integers(1, 3))):
        gpu, zone = draw(st.sampled_from("ABC")), draw(st.sampled_from(("east", "west")[:num_zones]))
        per_node = draw(st.sampled_from([size for size in (1, 1, 2, 2, 4) if size <= room] or [0]))
        if per_node == 0 or (gpu, zone, per_node) in seen:
            continue
        nodes = draw(st.integers(1, min(2, room // per_node)))
        nic = draw(st.sampled_from((None, Link(bytes_per_s=2e8, latency_s=5e-5))))
        group = make_node(f"n{number}", gpu, gpus=per_node, nodes=nodes, zone=zone, nic=nic)
        seen.add((gpu, zone, per_node))
        room -= nodes * per_node
        if room >= nodes and gpu != "C" and ("C", zone, 1) not in seen and draw(st.integers(0, 3)) == 0:
            group = replace(group, gpus=(*group.gpus, GpuSlots(gpu="C", count=1)))
            seen.add(("C", zone, 1))
            room -= nodes
        groups.append(group)
    return groups


@st.composite
def _families(draw: st.DrawFn) -> Family:
    hetis = replace(
        SMALL_FAMILY,
        chunk_tokens=draw(st.sampled_from(((64,), (64,), (16, 256)))),
    )
    hexgen = replace(hetis, name="hexgen", max_pool=0)
    uniform = replace(hexgen, name="uniform", mixed_types=False, uneven_layers=False)
    return draw(st.sampled_from((hetis, hetis, hexgen, uniform)))
