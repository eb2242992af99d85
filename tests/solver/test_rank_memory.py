"""What an engine takes of a rank: the search and the checker derive the same from an engine's numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.simulator.kv_memory import card_room_bytes
from hetis.solver.check import check_plan
from hetis.solver.check.memory import rank_fixed_bytes, usable_bytes
from hetis.solver.check.replica_shapes import PoolShape, StageShape
from hetis.solver.check.setting import Setting
from hetis.solver.check.violation import Rule
from hetis.solver.cluster import Link, NodeGroup
from hetis.solver.cost import DeviceCost, plain_memory, rank_shape
from hetis.solver.errors import InvalidProblemError
from hetis.solver.mixes import LargestBatch, mix_of
from hetis.solver.plan import Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem
from hetis.solver.rank_memory import RankKind, RankMemory, captured_graphs
from tests.solver.instances import make_node, make_problem

MEMORY = RankMemory(
    usable_bytes=70e9, fixed_bytes=1e9, token_bytes=1e5, held_bytes=2e4, logit_bytes=3.0, request_bytes=4e6,
    graph_bytes=1e7, layer_bytes=5e6,
)  # fmt: skip


@given(
    b=st.integers(0, 64), chunk=st.sampled_from([0, 256, 2048]), m=st.integers(1, 4), is_last=st.booleans(),
)  # fmt: skip
def test_search_and_checker_agree_about_an_engines_numbers(b: int, chunk: int, m: int, is_last: bool) -> None:
    if b == 0 and chunk == 0:
        return
    problem = make_problem([make_node("n", "A")])
    gpu = next(iter(problem.profiles))
    problem = replace(problem, memories={RankKind(gpu, 1): MEMORY})
    moments, link = problem.moments(), Link(bytes_per_s=1e9, latency_s=1e-6)
    role = Role.PREFILL if b == 0 else Role.DECODE if chunk == 0 else Role.UNIFIED
    setting = Setting(
        problem=problem, moments=moments, micro_batch=b, in_flight=m, chunk_tokens=chunk, role=role
    )  # fmt: skip
    stage = StageShape(gpu=gpu, tp=1, copies=1, layers=3, intra_link=link, hop_link=link, pool=None, kv_link=None)
    shape = rank_shape(problem.model, 1)
    assert shape is not None
    cost = DeviceCost(problem.model, problem.profiles[gpu], moments, shape, link, problem.memory_of(gpu, 1))
    batch = LargestBatch.of(mix_of(problem.model, moments, micro_batch=b, chunk_tokens=chunk), m)
    found = MEMORY.fixed_bytes + cost.activation_bytes(batch) + 3 * cost.layer_bytes()
    if is_last:
        found += cost.logit_bytes(batch) + cost.embedding_bytes() + cost.draft_bytes()
    assert found == pytest.approx(rank_fixed_bytes(setting, stage, is_first=False, is_last=is_last))
    assert cost.room_bytes() == MEMORY.usable_bytes - MEMORY.fixed_bytes
    assert usable_bytes(setting, stage) == MEMORY.usable_bytes


def test_graphs_are_captured_for_sizes_up_to_512() -> None:
    """1, 2, 4, then 31 multiples of 8 below 256, then 17 of 16 up to 512 make 51, as in vLLM's logs."""
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    assert len(sizes) == 51
    assert float(captured_graphs(512)) == pytest.approx(2 * 51, abs=1)
    assert np.all(captured_graphs(np.array([600.0, 9000.0])) == captured_graphs(512))


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(InvalidProblemError, match=r"graph_bytes of a rank is -1\.0, must be finite and >= 0"):
        replace(MEMORY, graph_bytes=-1.0)


def test_less_is_used_where_others_hold_what_would_be_free() -> None:
    memory = replace(MEMORY, free_bytes=75e9)
    assert memory.beside(0) is memory
    assert memory.beside(4e9).usable_bytes == 70e9, "71 GB are free"
    assert memory.beside(9e9).usable_bytes == 66e9
    assert memory.beside(90e9).usable_bytes == 0.0
    assert replace(memory, reserved_share=0.5).beside(4e9).usable_bytes == 68e9, "it uses a share of what is free"


def reserving(group: NodeGroup, num_bytes: int) -> NodeGroup:
    return replace(group, gpus=tuple(replace(slots, reserved_bytes=num_bytes) for slots in group.gpus))


@pytest.mark.parametrize("has_engine", [False, True])
def test_gpus_of_one_type_of_which_others_hold_different_memory_are_classes_apart(*, has_engine: bool) -> None:
    """A replica on each of two nodes: that beside others has less room for KV, by as much as they hold."""
    problem = make_problem([make_node("a", "A"), make_node("b", "A")])
    memory, held = replace(plain_memory_of(problem), free_bytes=problem.profiles["A"].usable_bytes), 300_000
    problem = replace(problem, memories={RankKind("A", 1): memory} if has_engine else {})
    same = solve_placement(problem)
    a, b = problem.cluster.node_groups
    apart = replace(problem, cluster=replace(problem.cluster, node_groups=(a, reserving(b, held))))
    plan = solve_placement(apart)
    assert check_plan(same, problem) == check_plan(plan, apart) == ()
    assert len(same.prices) == 1
    assert [price.available for price in plan.prices] == [1, 1]
    tokens = {replica.stages[0].devices[0]: replica.kv_tokens for replica in plan.replicas}
    of_same = same.replicas[0].kv_tokens
    assert tokens["a/0"] == of_same
    layers, groups = problem.model.num_layers, problem.model.head_groups
    per_token = layers * groups * problem.model.kv_bytes_per_token_group()
    assert of_same - tokens["b/0"] == pytest.approx(held / per_token, abs=1)
    assert any(one.rule is Rule.RANK_MEMORY or one.rule is Rule.KV_TOKENS for one in check_plan(same, apart))


def plain_memory_of(problem: PlacementProblem) -> RankMemory:
    shape = rank_shape(problem.model, 1)
    assert shape is not None
    return plain_memory(problem.profiles["A"], problem.model, shape)


def test_attention_workers_hold_less_kv_beside_others() -> None:
    problem = make_problem([make_node("a", "A")])
    profile, link = problem.profiles["A"], Link(bytes_per_s=1e9, latency_s=1e-6)
    pool = PoolShape(gpu="A", cards=1, head_groups=1, link=link, reserved_bytes=1000)
    assert card_room_bytes(problem, pool) == profile.room_bytes - 1000
    assert problem.profile_of("A", 1 << 50).room_bytes < 0
