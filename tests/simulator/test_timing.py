"""Iterations take the cost model's time when they carry what it assumes, and more when they carry more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.simulator.pool_timing import PoolTiming
from hetis.simulator.timing import StageTiming
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.check.setting import Setting
from hetis.solver.check.timing import stage_seconds
from hetis.solver.cluster import Link
from hetis.solver.dispatch.loaded_stage import costs_of, running_load
from hetis.solver.engine_rules import EngineRules
from hetis.solver.model import DraftShape
from hetis.solver.placement.families import run_by
from hetis.solver.plan import ReplicaPlan
from hetis.solver.problem import PlacementProblem
from tests.models import shape_of
from tests.simulator.small_plans import pipeline, small_problem
from tests.solver.instances import PLUGIN, make_compressed, make_model, make_node, make_problem, make_workload

MOE = shape_of(num_experts=4, active_experts=2, expert_intermediate=256, shared_experts=1, first_dense_layers=1)


def setting_of(problem: PlacementProblem, one: ReplicaPlan) -> Setting:
    return Setting(
        problem=problem,
        moments=problem.workload.moments(block_tokens=problem.assumptions.block_tokens),
        micro_batch=one.micro_batch,
        in_flight=one.in_flight,
        chunk_tokens=one.chunk_tokens,
    )


@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("pool", [None, (1, 1), (2, 1)])
@pytest.mark.parametrize("mixed_factor", [None, 3.0])
def test_average_contents_take_the_seconds_of_the_cost_model(
    moe: dict[str, Any] | None, pool: tuple[int, int] | None, mixed_factor: float | None
) -> None:
    # The oracle is the checker's derivation of u: nc iterations with a full chunk, nd without, all at the mean context.
    problem = small_problem(model=make_model(moe=moe), workload=make_workload((300, 60)), mixed_factor=mixed_factor)
    rules = EngineRules(name="vllm-hetis", max_stages=2, plugin=PLUGIN)
    problem = replace(problem, family=run_by(problem.family, rules))
    one = pipeline(problem, 3, 3, micro_batch=6, chunk_tokens=64, pool=pool)
    setting, shape = setting_of(problem, one), replica_shape(one, problem, Fleet.of(problem.cluster))
    b, C, moments = one.micro_batch, one.chunk_tokens, setting.moments
    for position, stage in enumerate(shape.stages):
        is_first, is_last = position == 0, position == len(shape.stages) - 1
        timing = StageTiming(problem, stage, is_first=is_first, is_last=is_last)
        attended = moments.prefill_pairs / moments.mean_prompt
        chunk = C, C * attended, attended + C / 2
        with_chunk = timing.seconds(b, b * moments.resident_context, *chunk, b + 1)
        plain = timing.seconds(b, b * moments.resident_context, 0, 0.0, 0.0, b)
        if stage.pool is not None:
            workers = PoolTiming(problem, timing, cards=stage.pool.cards)
            groups = np.zeros(1 + stage.pool.cards, np.int64)
            groups[0] = b * (problem.model.head_groups - stage.pool.head_groups)
            groups[1:] = b * stage.pool.head_groups // stage.pool.cards
            tokens = np.multiply(groups, moments.resident_context)
            attention, mixed = (
                workers.attention_s(workers.device_seconds(groups, tokens, beside_chunk=beside), groups)
                for beside in (False, True)
            )
            shipped = np.where(groups > 0, C * stage.pool.head_groups / stage.pool.cards, 0.0)
            layer_s = (with_chunk - timing.beside_layers_s(b + C, b + 1)) / timing.layers
            with_chunk += timing.layers * (mixed + workers.late_s(shipped, groups, layer_s + mixed))
            plain += timing.layers * attention
        expected = stage_seconds(setting, stage, is_first=is_first, is_last=is_last)
        assert setting.per_request(with_chunk, plain) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_ranks_take_the_seconds_of_the_cost_model(tp: int) -> None:
    problem = make_problem(
        [make_node("big", "big", gpus=4, nic=Link(bytes_per_s=3e8, latency_s=1e-5))],
        workload=make_workload((300, 60)),
    )
    one = pipeline(problem, 6, micro_batch=16, chunk_tokens=64)
    ranks = tuple(f"big/{i}" for i in range(tp))
    kept = max(1, problem.model.head_groups // tp)
    one = replace(one, stages=(replace(one.stages[0], tp=tp, devices=ranks, kv_head_groups_kept=kept),))
    setting, shape = setting_of(problem, one), replica_shape(one, problem, Fleet.of(problem.cluster))
    timing, moments = StageTiming(problem, shape.stages[0], is_first=True, is_last=True), setting.moments
    attended = moments.prefill_pairs / moments.mean_prompt
    with_chunk = timing.seconds(16, 16 * moments.resident_context, 64, 64 * attended, attended + 32, 17)
    plain = timing.seconds(16, 16 * moments.resident_context, 0, 0.0, 0.0, 16)
    expected = stage_seconds(setting, shape.stages[0], is_first=True, is_last=True)
    assert setting.per_request(with_chunk, plain) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("draft", [None, DraftShape(tokens=2, acceptance=0.5)])
@pytest.mark.parametrize("tp", [1, 4])
def test_compressed_attention_takes_the_seconds_of_the_cost_model_at_the_mean_context(
    tp: int, draft: DraftShape | None
) -> None:
    """Every rank keeps the whole window and scores all keys, and several streams of the residual pass a stage."""
    problem = make_problem(
        [make_node("big", "big", gpus=4)],
        workload=make_workload((300, 60)),
        model=replace(make_compressed(), draft=draft),
    )
    fits = (replace(fit, pieces=(replace(fit.pieces[0], flop_s=1e-12),)) for fit in problem.profiles["big"].fits)
    problem = replace(problem, profiles={"big": replace(problem.profiles["big"], fits=tuple(fits))})  # all counts
    one = pipeline(problem, 6, micro_batch=16, chunk_tokens=64)
    ranks = tuple(f"big/{i}" for i in range(tp))
    one = replace(one, stages=(replace(one.stages[0], tp=tp, devices=ranks, kv_head_groups_kept=1),))
    setting, shape = setting_of(problem, one), replica_shape(one, problem, Fleet.of(problem.cluster))
    timing, moments = StageTiming(problem, shape.stages[0], is_first=True, is_last=True), setting.moments
    read = problem.model.read_tokens(moments.prefill_pairs / moments.mean_prompt)
    decoding = 16 * problem.model.read_tokens(moments.resident_context)
    with_chunk = timing.seconds(16, decoding, 64, 64 * read, read + 32, 17)
    plain = timing.seconds(16, decoding, 0, 0.0, 0.0, 16)
    expected = stage_seconds(setting, shape.stages[0], is_first=True, is_last=True)
    assert setting.per_request(with_chunk, plain) == pytest.approx(expected, rel=1e-9)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0, 4000)), min_size=3, max_size=3),
    st.sampled_from([make_model(), make_model(kv_heads=4)]),
)
def test_dispatch_sees_the_times_that_the_simulator_charges(loads: list[tuple[int, float]], model: object) -> None:
    problem = small_problem()
    one = pipeline(problem, 6, pool=(2, 1))
    (stage,) = replica_shape(one, problem, Fleet.of(problem.cluster)).stages
    timing = PoolTiming(problem, StageTiming(problem, stage, is_first=True, is_last=True), cards=2)
    groups = np.array([pairs for pairs, _ in loads], np.int64)
    tokens = np.array([pairs * context for pairs, context in loads])
    seen, heads = timing.stage(("primary", "one", "two")), problem.model.queries_per_group
    costs = costs_of(seen)
    running = running_load(costs, groups * heads, tokens * problem.model.kv_bytes_per_token_group())
    own = timing.device_seconds(groups, tokens)
    exchange_s = seen.transfer_byte_s * seen.heads.exchange_bytes_per_head * heads * groups + seen.transfer_s
    np.testing.assert_allclose(running.base.max(axis=1)[groups > 0], (own + exchange_s)[groups > 0], rtol=1e-9)


@given(st.integers(0, 30), st.floats(0, 1000), st.integers(0, 64), st.integers(0, 200))
def test_more_work_never_takes_less_time(decoding: int, context: float, chunk: int, past: int) -> None:
    problem = small_problem()
    (shape,) = replica_shape(pipeline(problem, 6), problem, Fleet.of(problem.cluster)).stages
    timing = StageTiming(problem, shape, is_first=True, is_last=True)

    def seconds(decoding: int, context: float, chunk: int, past: int) -> float:
        pairs, read = chunk * (past + (chunk + 1) / 2), past + chunk + 0.5 if chunk else 0.0
        return timing.seconds(decoding, decoding * context, chunk, pairs, read, decoding)

    base = seconds(decoding, context, chunk, past)
    for more in ((decoding + 1, context, chunk, past), (decoding, context + 5, chunk, past),
                 (decoding, context, chunk + 1, past), (decoding, context, chunk, past + 9)):  # fmt: skip
        assert seconds(*more) >= base * (1 - 1e-12)
