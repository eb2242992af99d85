"""Search and simulator get the same seconds and bytes as the checker, which shares no code with them."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.simulator.pool_timing import PoolTiming
from hetis.simulator.timing import StageTiming
from hetis.solver import cost, mixes
from hetis.solver.check import memory, timing
from hetis.solver.check.replica_shapes import PoolShape, StageShape, slowest
from hetis.solver.check.setting import Setting, divides, head_groups_per_rank
from hetis.solver.cluster import Link, Network
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.model import DraftShape, ModelSpec
from hetis.solver.placement.replicas import template as of_search
from hetis.solver.placement.replicas.stage_cost import kept_bytes
from hetis.solver.placement.replicas.tables import CostTables
from hetis.solver.placement.replicas.tabulation import build_cost_tables
from hetis.solver.placement.replicas.template import Template, TemplateStage
from hetis.solver.plan import Role
from hetis.solver.problem import Assumptions, PlacementProblem
from hetis.solver.profile import Fit, Op, Piece, Profile
from hetis.solver.workload import Workload
from tests.models import replace, shape_of
from tests.solver.best_replicas import fits_memory, setting_of
from tests.solver.instances import (
    MADE_UP,
    PLUGIN,
    make_compressed,
    make_model,
    make_node,
    make_problem,
    make_profile,
    make_workload,
    mixed_by,
)

JUDGED = ("hetis.solver.cost", "hetis.solver.mixes", "hetis.solver.placement", "hetis.simulator")
MODELS = (
    make_model(q_heads=8, kv_heads=4),
    make_model(q_heads=8, kv_heads=2, tie_embeddings=True),
    replace(make_model(q_heads=8, kv_heads=8), sliding_window=100),
    replace(
        make_model(q_heads=8, kv_heads=4),
        sliding_window=90,
        sliding_layers=3,
        activation_bytes=4.0,
        norms_span_heads=True,
    ),
    make_model(
        q_heads=8,
        kv_heads=4,
        moe=shape_of(num_experts=8, active_experts=2, expert_intermediate=256, shared_experts=1, first_dense_layers=2),
    ),
    replace(make_model(q_heads=8, kv_heads=4), sliding_window=60, sliding_layers=5, windows_free_kv=False),
    replace(
        make_model(
            q_heads=8, kv_heads=2, moe=shape_of(num_experts=8, active_experts=2, expert_intermediate=256, every=2)
        ),
        linear=shape_of(layers=5, params=30_000, state_bytes=9_000.0, token_flops=70_000.0),
        gated_attention=True,
        vision_params=50_000,
    ),
    replace(
        make_model(q_heads=8, kv_heads=8),
        mla=shape_of(kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, q_lora_rank=32),
        indexer=shape_of(top_tokens=64, heads=4, head_dim=8, key_bytes=12.0),
    ),
    replace(
        make_model(q_heads=8, kv_heads=8),
        mla=shape_of(kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, q_lora_rank=32),
        indexer=shape_of(top_tokens=32, heads=4, head_dim=64, key_bytes=68.0, layers=3),
    ),
    replace(
        make_model(q_heads=8, kv_heads=2, moe=shape_of(num_experts=8, active_experts=2, expert_intermediate=256)),
        draft=DraftShape(tokens=2, acceptance=0.5),
    ),
    replace(
        make_model(
            q_heads=8, kv_heads=2, moe=shape_of(num_experts=8, active_experts=2, expert_intermediate=16, every=2)
        ),
        linear=shape_of(layers=3, params=30_000, state_bytes=90_000.0, token_flops=70_000.0),
        sliding_window=50,
        sliding_layers=2,
        draft=DraftShape(tokens=2, acceptance=0.5),
    ),
)
COMPRESSED = (
    make_compressed(q_heads=8),
    replace(make_compressed(q_heads=8), kv_bytes=1.0, draft=DraftShape(tokens=2, acceptance=0.5)),
    replace(
        make_compressed(q_heads=8), moe=shape_of(num_experts=8, active_experts=2, expert_intermediate=256), kv_bytes=1.0
    ),
)
WORKLOADS = (
    make_workload((120, 40)),
    make_workload((300, 20), (60, 90)),
    make_workload((900, 5), (20, 200)),
    replace(make_workload((300, 20), (60, 90)), prefix_hit_rate=0.4),
    replace(make_workload((900, 5), (20, 200)), prefix_hit_rate=0.97),
)
FAMILY = Family(
    max_pool=6, tp_sizes=(1, 2, 4, 8), micro_batches=(1, 3, 16), in_flight=(1, 2, 5, 8),
    chunk_tokens=(48, 256), roles=(Role.UNIFIED, Role.PREFILL, Role.DECODE),
)  # fmt: skip


OF_AN_ENGINE = replace(
    FAMILY, in_flight=tuple(range(1, 9)), engine=EngineRules(name="vllm-hetis", max_stages=8, plugin=PLUGIN)
)


def imports(path: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_oracle_and_checker_import_nothing_of_what_they_judge() -> None:
    checker = Path(memory.__file__).parent.glob("*.py")
    oracle = (Path(__file__).with_name(f"{name}.py") for name in ("oracle", "best_replicas", "device_classes"))
    for path in (*oracle, *checker):
        assert not [one for one in imports(path) if one.startswith(JUDGED)], path.name


# --- random stages


@st.composite
def pieces(draw: st.DrawFn, op: Op) -> Piece:
    """Draw coefficients such that each one matters, and none alone decides."""
    share = st.floats(0.2, 1.5)
    wired = op in (Op.ALL_REDUCE, Op.TRANSFER)
    return Piece(
        fixed_s=draw(share) * 2e-5,
        flop_s=draw(share) * 5e-13,
        byte_s=draw(share) * (2e-9 if wired else 5e-11),
        token_s=draw(share) * 1e-6,
        head_s=draw(share) * 1e-7,
        wire=draw(share) if wired else 0.0,
    )


@st.composite
def profiles(draw: st.DrawFn, gpu: str) -> Profile:
    mixed = mixed_by(draw(st.sampled_from((None, 0.3, 1.7))))
    fits = tuple(
        Fit(
            op=op,
            pieces=tuple(draw(st.lists(pieces(op), min_size=1, max_size=2))),
            provenance=MADE_UP,
            mixed=mixed if op is Op.DECODE_ATTENTION else None,
        )
        for op in Op
    )
    return Profile(gpu=gpu, usable_bytes=draw(st.integers(8, 60)) * 1_000_000, reserve_bytes=1_000_000, fits=fits)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A stage of a replica, and its position."""

    problem: PlacementProblem
    role: Role
    b: int
    M: int
    C: int
    stage: StageShape
    is_first: bool
    is_last: bool
    d: int = 1  # copies that share their experts

    @property
    def setting(self) -> Setting:
        return setting_of(self.problem, role=self.role, b=self.b, M=self.M, C=self.C, d=self.d)


def problem_of(draw: st.DrawFn, models: Sequence[ModelSpec] = MODELS) -> PlacementProblem:
    nic = Link(bytes_per_s=draw(st.floats(2e7, 2e9)), latency_s=draw(st.floats(1e-6, 1e-4)))
    far = Link(bytes_per_s=draw(st.floats(2e7, 2e9)), latency_s=2e-4)
    nodes = [
        make_node("a", "A", gpus=8, nodes=4, zone="east"),
        make_node("b", "B", gpus=8, nodes=2, zone="east", nic=nic),
        make_node("w", "A", gpus=8, nodes=2, zone="west"),
    ]
    return make_problem(
        nodes,
        profiles={gpu: draw(profiles(gpu)) for gpu in ("A", "B")},
        model=draw(st.sampled_from(models)),
        workload=draw(st.sampled_from(WORKLOADS)),
        network=Network(default=Link(bytes_per_s=8e8, latency_s=3e-5), zone_default=far),
        assumptions=Assumptions(block_tokens=draw(st.sampled_from([1, 16]))),
        family=draw(st.sampled_from((FAMILY, OF_AN_ENGINE))),
    )


@st.composite
def drawn(draw: st.DrawFn, models: Sequence[ModelSpec] = MODELS) -> Drawn:
    problem, role = problem_of(draw, models), draw(st.sampled_from(Role))
    model = problem.model
    tp = draw(st.sampled_from([n for n in (1, 2, 4, 8) if divides(model, n)]))
    links = st.builds(Link, bytes_per_s=st.floats(2e7, 2e9), latency_s=st.floats(1e-6, 1e-4))
    pool = None
    if role is not Role.PREFILL and tp <= model.head_groups and model.heads_can_move and draw(st.booleans()):
        groups = draw(st.integers(1, head_groups_per_rank(model, tp)))
        pool = PoolShape(gpu="B", cards=draw(st.integers(1, 5)), head_groups=groups, link=draw(links))
    stage = StageShape(
        gpu="A", tp=tp, copies=draw(st.integers(1, 3)), layers=draw(st.integers(1, 3)), intra_link=draw(links),
        hop_link=draw(links), pool=pool, kv_link=draw(links) if role is Role.PREFILL else None,
    )  # fmt: skip
    shared = [d for d in (2, 4, 8) if model.experts is not None and d * tp <= 8 and pool is None]
    d = draw(st.sampled_from([1, *shared]))
    return Drawn(
        problem,
        role,
        b=0 if role is Role.PREFILL else draw(st.sampled_from([1, 3, 16])),
        M=draw(st.sampled_from([1, 2, 5, 8])) if d == 1 else d,
        C=0 if role is Role.DECODE else draw(st.sampled_from([48, 256])),
        stage=stage if d == 1 else replace(stage, copies=d),
        is_first=d > 1 or draw(st.booleans()),
        is_last=d > 1 or draw(st.booleans()),
        d=d,
    )


STAGES = pytest.mark.parametrize("stages", [drawn(), drawn(COMPRESSED)], ids=["any model", "compressed"])


def near(value: float) -> object:
    return pytest.approx(value, rel=1e-9, abs=1e-15)


@STAGES
@given(data=st.data())
def test_the_simulator_takes_the_mean_iteration_for_as_long(
    stages: st.SearchStrategy[Drawn], data: st.DataObject
) -> None:
    one = data.draw(stages)
    setting, ends, s = one.setting, {"is_first": one.is_first, "is_last": one.is_last}, one.stage
    if one.role is not Role.UNIFIED or (s.pool is not None and (one.b * s.pool.head_groups * s.tp) % s.pool.cards):
        return  # KV of prefill and decode replicas has events of its own; cards differ by a (request, group) pair
    if s.pool is not None and one.problem.model.prefix_layers and one.is_first:
        return  # there, the late time is the mean over all layers
    model, moments, b, C = one.problem.model, setting.moments, one.b, one.C
    steps = model.emitted_tokens
    if one.d > 1:
        return  # depends on the mean over all copies; see tests/simulator/replica/test_lockstep.py
    found = StageTiming(one.problem, s, **ends, steps=steps)
    a = moments.prefill_pairs / moments.mean_computed
    read = model.read_tokens(a)
    context = model.read_tokens(moments.resident_context)
    if steps != 1.0 and abs(C / steps - round(C / steps)) > 1e-9:
        steps = found.steps = 1.0  # a whole iteration at once
    with_chunk = found.seconds(b, b * context, round(C / steps), C / steps * read, read + C / 2, b + 1)
    plain = found.seconds(b, b * context, 0, 0.0, 0.0, b)
    if s.pool is not None:
        workers = PoolTiming(one.problem, found, cards=s.pool.cards)
        on_card = b * s.pool.head_groups * s.tp // s.pool.cards
        groups = np.array([b * (model.head_groups - s.pool.head_groups * s.tp), *[on_card] * s.pool.cards], np.int64)
        tokens = np.multiply(groups, context)
        attention = workers.attention_s(workers.device_seconds(groups, tokens), groups)
        mixed = workers.attention_s(workers.device_seconds(groups, tokens, beside_chunk=True), groups)
        shipped = np.array([0.0, *[C * s.pool.head_groups * s.tp / s.pool.cards] * s.pool.cards])
        layer_s = (with_chunk - found.beside_layers_s(b + C, b + 1)) / found.layers
        with_chunk += found.layers * (mixed + workers.late_s(shipped, groups, layer_s + mixed))
        plain += found.layers * attention
    expected = timing.stage_seconds(setting, s, **ends)
    assert steps * (setting.chunk_iterations * with_chunk + setting.plain_iterations * plain) == near(expected)


# --- templates of the search


def configurations(costs: CostTables) -> list[tuple[int, int, int]]:
    """Return every scope, mix and index of micro-batches in flight; copies that share experts have one each."""
    return [
        (scope, mix, f)
        for scope, part in enumerate(costs.scopes)
        for mix, of_mix in enumerate(costs.mixes)
        for f, in_flight in enumerate(costs.problem.family.in_flight)
        if part.serves(of_mix) and (in_flight == 1 or of_mix.attention_dp == 1)
    ]


@st.composite
def templates(draw: st.DrawFn, models: Sequence[ModelSpec] = MODELS) -> tuple[PlacementProblem, CostTables, Template]:
    """Draw any replica of one or two stages from the tables of a problem."""
    problem = problem_of(draw, models)
    costs = build_cost_tables(problem)
    scope_index, mix_index, in_flight_index = draw(st.sampled_from(configurations(costs)))
    scope, mix = costs.scopes[scope_index], costs.mixes[mix_index]
    t, model = scope.tables, problem.model
    ranks = [
        s
        for s, (i, _) in enumerate(costs.ranks)
        if costs.classes[i].zone in scope.zones and costs.rank_dp[s] == mix.attention_dp
    ]
    stages = []
    alone = mix.attention_dp > 1
    for layers in draw(st.sampled_from([(4 - model.prefix_layers,), (2, 2)][: 1 if alone else 2])):
        s = draw(st.sampled_from(ranks))
        stage = TemplateStage(s, layers)
        pools = [q for q in range(len(costs.classes)) if t.pool_start[s, q] >= 0]
        if mix.role is not Role.PREFILL and pools and draw(st.booleans()):
            cards, groups = draw(st.sampled_from(costs.pool_sizes)), draw(st.integers(1, int(t.rank_groups[s])))
            stage = replace(stage, pool_class=draw(st.sampled_from(pools)), pool_cards=cards, pool_groups=groups)
        stages.append(stage)
    template = Template(scope_index, mix_index, in_flight_index, tuple(stages), math.inf)
    return problem, costs, template


REPLICAS = pytest.mark.parametrize("replicas", [templates(), templates(COMPRESSED)], ids=["any model", "compressed"])


def named(problem: PlacementProblem, costs: CostTables, template: Template) -> tuple[Setting, list[StageShape]]:
    """Return the same replica in the checker's terms."""
    network, mix = problem.cluster.network, costs.mixes[template.mix]
    zones = costs.scopes[template.scope].zones
    d = mix.attention_dp
    M = problem.family.in_flight[template.in_flight_index] * d
    setting = setting_of(problem, role=mix.role, b=mix.micro_batch, M=M, C=mix.chunk_tokens, d=d)
    between = [network.zone_link(x, y) for x in zones for y in zones]
    stages = []
    for one in template.stages:
        own, tp = costs.classes[costs.ranks[one.rank][0]], costs.ranks[one.rank][1] // d
        nics = {group.name: group.nic or network.default for group in problem.cluster.node_groups}
        nic = nics[own.groups[0].name]
        board = problem.cluster.gpu_types[own.gpu]
        intra = Link(bytes_per_s=board.nvlink_bytes_per_s or board.pcie_bytes_per_s, latency_s=0.0)
        hop = slowest([nic, *between])
        far = [network.zone_link(zones[0], z) for z in (problem.cluster.zones() if mix.sends_afar else zones)]
        pool = None
        if one.pool_class >= 0:
            other = costs.classes[one.pool_class]
            link = slowest([nic, nics[other.groups[0].name], network.zone_link(own.zone, own.zone)])
            pool = PoolShape(gpu=other.gpu, cards=one.pool_cards, head_groups=one.pool_groups, link=link)
        stages.append(
            StageShape(
                gpu=own.gpu, tp=tp, copies=d, layers=one.layers, intra_link=intra, hop_link=hop, pool=pool,
                kv_link=slowest([hop, *far]) if mix.role is Role.PREFILL else None,
            )
        )  # fmt: skip
    return setting, stages


@REPLICAS
@given(data=st.data())
def test_the_search_tabulates_the_same_seconds(
    replicas: st.SearchStrategy[tuple[PlacementProblem, CostTables, Template]], data: st.DataObject
) -> None:
    check_seconds(*data.draw(replicas))


def test_the_search_tabulates_what_a_stage_with_a_pool_keeps_beside_a_chunk() -> None:
    """Its own head groups take longer than those on the worker, but only beside a chunk."""
    profiles = {"A": make_profile("A", mixed_factor=30.0), "B": make_profile("B", mixed_factor=90.0)}
    link = Link(bytes_per_s=1e10, latency_s=1e-6)
    nodes = [make_node("a", "A", nic=link), make_node("b", "B", nic=link)]
    problem = make_problem(nodes, profiles=profiles, workload=make_workload((300, 60)))
    costs = build_cost_tables(problem)
    own, worker = (next(i for i, c in enumerate(costs.classes) if c.gpu == gpu) for gpu in "AB")
    stage = TemplateStage(costs.ranks.index((own, 1)), problem.model.num_layers)
    pooled = replace(stage, pool_class=worker, pool_cards=1, pool_groups=1)
    for scope, mix, f in configurations(costs):
        if costs.mixes[mix].role is Role.UNIFIED and costs.mixes[mix].attention_dp == 1:
            for mine in (stage, pooled):
                check_seconds(problem, costs, Template(scope, mix, f, (mine,), math.inf))


def check_seconds(problem: PlacementProblem, costs: CostTables, template: Template) -> None:
    setting, stages = named(problem, costs, template)
    last, d = len(stages) - 1, setting.attention_dp
    ends = [{"is_first": i == 0, "is_last": i == last} for i in range(len(stages))]
    seconds = of_search.times_of(template, of_search.stage_seconds(costs, template)).tolist()
    stage_s = [timing.stage_seconds(setting, s, **at) for s, at in zip(stages, ends, strict=True)]
    assert seconds == [near(u / d) for u in stage_s]  # for copies that iterate together, the part of each
    if setting.role is Role.UNIFIED:
        chunks = of_search.times_of(template, of_search.stage_seconds(costs, template, with_chunk=True)).tolist()
        assert chunks == [near(timing.chunk_seconds(setting, s, **at)) for s, at in zip(stages, ends, strict=True)]
    t_s = timing.seconds_between_completions(setting, stages, stage_s)
    assert of_search.interval_of(costs, template) == near(t_s)
    mix, M = costs.mixes[template.mix], setting.in_flight // d
    assert mixes.tpot_per_interval(setting.model, mix, M) == near(timing.tpot_per_t(setting))
    assert mixes.chunks_ahead(costs.moments, problem.assumptions, mix) == near(timing.chunks_ahead(setting))
    if mix.role is Role.PREFILL:
        assert of_search.landing_s(costs, template) == near(timing.replica_landing_seconds(setting, stages))


@pytest.mark.parametrize("model", MODELS, ids=range(len(MODELS)))
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_ranks_of_a_group_share_out_the_weights(model: ModelSpec, tp: int) -> None:
    shape = cost.rank_shape(model, tp)
    assert shape is not None
    problem = make_problem([make_node("a", "A")], model=model)
    link = Link(bytes_per_s=1e11, latency_s=1e-6)
    rank = cost.DeviceCost(model, problem.profiles["A"], problem.workload.moments(), shape, link)
    assert rank.prefix_bytes() == near(model.prefix_layers * model.dense_layer_params() * model.weight_bytes / tp)
    assert rank.layer_bytes() == near(model.layer_params() * model.weight_bytes / tp)
    assert rank.embedding_bytes() == near(model.embedding_params * model.embedding_bytes / tp)


@REPLICAS
@given(data=st.data())
def test_the_search_finds_the_same_room(
    replicas: st.SearchStrategy[tuple[PlacementProblem, CostTables, Template]], data: st.DataObject
) -> None:
    found = data.draw(replicas)
    _, costs, template = found
    setting, stages = named(*found)
    last, repeated = len(stages) - 1, setting.model.num_layers - setting.model.prefix_layers
    t = costs.scopes[template.scope].tables
    for i, (stage, one) in enumerate(zip(stages, template.stages, strict=True)):
        ends = {"is_first": i == 0, "is_last": i == last}
        fixed = of_search.fixed_bytes(costs, template, i) + one.layers * float(t.layer_bytes[one.rank])
        fixed += setting.problem.profiles[stage.gpu].reserve_bytes
        assert fixed == near(memory.rank_fixed_bytes(setting, stage, **ends))
        kept = kept_bytes(t, template.mix, template.in_flight_index, one.rank, one.pool_groups)
        layers = stage.layers + (setting.model.prefix_layers if i == 0 else 0)
        layers += setting.model.draft_layers if i == last else 0
        assert fixed + layers * kept == near(memory.rank_bytes(setting, stage, **ends))
        held = range(1, repeated + 1)
        fits = [layers for layers in held if fits_memory(setting, replace(stage, layers=layers), **ends)]
        assert of_search.room_layers(costs, template, i) == max(fits, default=0)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_both_know_the_same_latencies_whether_prompts_wait_or_not(workload: Workload) -> None:
    problem = make_problem([make_node("a", "A")], workload=workload)
    for b, M, C in itertools.product((1, 8, 64), (1, 2, 8, 32), (16, 256, 2048)):
        setting = setting_of(problem, role=Role.UNIFIED, b=b, M=M, C=C)
        mix = mixes.mix_of(setting.model, setting.moments, micro_batch=b, chunk_tokens=C)
        chunks = mixes.chunks_ahead(setting.moments, problem.assumptions, mix)
        assert chunks == near(timing.chunks_ahead(setting))
