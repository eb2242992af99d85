"""The functions of the cost model one by one, compared with independent arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver import cost
from hetis.solver.check.setting import divides
from hetis.solver.cluster import GpuType, Link
from hetis.solver.plan import Role
from hetis.solver.problem import Assumptions
from tests.solver.arithmetic import groups_of_rank
from tests.solver.instances import make_compressed, make_model
from tests.solver.test_arithmetic import STAGES, Drawn, drawn, near


def card(one: Drawn, gpu: str, tp: int, attention_dp: int = 1) -> cost.DeviceCost:
    shape = cost.rank_shape(one.problem.model, tp, attention_dp)
    assert shape is not None
    return cost.DeviceCost(
        one.problem.model, one.problem.profiles[gpu], one.numbers.moments, shape, one.stage.intra_link
    )


def mix_of(one: Drawn) -> cost.Mix:
    return cost.mix_of(
        one.problem.model, one.numbers.moments, micro_batch=one.b, chunk_tokens=one.C, attention_dp=one.d
    )  # fmt: skip


@STAGES
@given(data=st.data(), tokens=st.integers(1, 700))
def test_one_layer_takes_as_long(stages: st.SearchStrategy[Drawn], data: st.DataObject, tokens: int) -> None:
    one = data.draw(stages)
    numbers, s, link = one.numbers, one.stage, one.stage.hop_link
    rank = card(one, s.gpu, s.tp, one.d)
    all_tokens = mix_of(one).all_tokens
    if one.d > 1:
        assert all_tokens == near(numbers.all_tokens())
    assert rank.dense_s(float(tokens), all_tokens=all_tokens) == near(numbers.dense(s, tokens, False, all_tokens))
    assert rank.dense_s(float(tokens)) == near(numbers.dense(s, tokens, False))
    assert rank.dense_s(float(tokens), prefix_layer=True) == near(numbers.dense(s, tokens, True))
    assert rank.reduce_s(float(tokens)) == near(numbers.reduce(s, tokens))
    assert rank.prefill_s(float(one.C)) == near(numbers.prefill(s))
    rr = rank.shape.queries_per_group
    assert rank.decode_attention_s(float(tokens), rr) == near(numbers.decode(s.gpu, s.tp, tokens, s))
    assert rank.decode_attention_s(0.0, rr) == 0.0
    for num_bytes in (0.0, 1.0, 1e3 * tokens):
        assert rank.transfer_s(num_bytes, link) == near(numbers.message(s.gpu, s.tp, num_bytes, link))
    outputs = float(mix_of(one).decode_tokens)
    step_s, head_s = rank.step_s(float(one.b)), rank.head_s(outputs) + rank.drafting_s(float(one.b))
    ends = {"is_first": True, "is_last": False}
    assert step_s == near(numbers.ends(s, one.b, 0, **ends))
    assert step_s + rank.hop_s(float(one.b), link) == near(numbers.ends(s, one.b, 0, is_first=False, is_last=False))
    assert step_s + head_s == near(numbers.ends(s, one.b, 0, is_first=True, is_last=True))
    assert rank.landing_s(float(one.C), link) == near(numbers.landing_seconds(s, link))


@STAGES
@given(data=st.data())
def test_arrays_cost_what_their_elements_cost(stages: st.SearchStrategy[Drawn], data: st.DataObject) -> None:
    one = data.draw(stages)
    rank, link = card(one, one.stage.gpu, one.stage.tp, one.d), one.stage.hop_link
    tokens = np.array([0.0, 1.0, 17.0, 300.0])
    for cost_of in (
        rank.dense_s, rank.reduce_s, rank.prefill_s, rank.step_s, rank.head_s,
        lambda t: rank.transfer_s(t, link), lambda t: rank.hop_s(t, link), lambda t: rank.decode_attention_s(t, 2),
    ):  # fmt: skip
        found = np.broadcast_to(cost_of(tokens), tokens.shape)
        assert found.tolist() == [near(float(cost_of(t))) for t in tokens.tolist()]


@given(drawn())
def test_attention_workers_take_as_long(one: Drawn) -> None:
    numbers, s, pool = one.numbers, one.stage, one.stage.pool
    if pool is None:
        return
    found = cost.PoolCost(card(one, s.gpu, s.tp), card(one, pool.gpu, 1), pool.link)
    b, k, p = float(one.b), float(pool.head_groups), float(pool.cards)
    assert found.load(b, k, p) == numbers.load(s, pool)
    assert found.exchange_s(b, k, p) == near(numbers.exchange(s, pool))
    worker_s = numbers.decode(pool.gpu, 1, numbers.load(s, pool), s)
    assert found.attention_s(b, k, p) == near(worker_s + numbers.exchange(s, pool))
    assert found.ship_s(float(one.C), k, p) == near(numbers.ship(s, pool))
    on_link = numbers.ship(s, pool) + numbers.exchange(s, pool)
    for share in (0.0, 0.4, 2.0):
        late = max(0.0, on_link - share * on_link)
        assert found.late_s(b, float(one.C), k, p, share * on_link) == near(late)
    prompt_bytes = numbers.moments.mean_prompt * k * s.tp * one.problem.model.kv_bytes_per_token_group()
    assert found.receive_s(k, p) == near(numbers.message(pool.gpu, 1, prompt_bytes / p, pool.link))
    kept = groups_of_rank(one.problem.model, s.tp) - k
    sent = numbers.moments.mean_prompt * kept * s.tp * one.problem.model.kv_bytes_per_token_group()
    found_s = found.primary.kv_transfer_s(numbers.moments.mean_prompt, kept, s.hop_link)
    assert found_s == near(numbers.message(s.gpu, s.tp, sent, s.hop_link))


@STAGES
@given(data=st.data())
def test_memory_and_latencies_are_the_same(stages: st.SearchStrategy[Drawn], data: st.DataObject) -> None:
    one = data.draw(stages)
    numbers, s, model, moments = one.numbers, one.stage, one.problem.model, one.numbers.moments
    rank, mix, assumed = card(one, s.gpu, s.tp, one.d), mix_of(one), one.problem.assumptions
    own = mix.of_a_copy()
    assert (own.chunk_iterations, own.plain_iterations) == (near(numbers.nc), near(numbers.nd))
    assert (own.iterations, own.chunk_share) == (near(numbers.n_it), near(numbers.phi))
    assert (mix.iterations, mix.chunk_share) == (near(numbers.n_it / one.d), near(numbers.phi))
    assert mix.role is one.role
    assert not mix.sends_afar
    held = numbers.held(s.copies)
    assert cost.kv_tokens_per_copy(model, moments, assumed, mix, held) == near(numbers.kv_tokens(s.copies))
    assert cost.prompt_tokens_per_copy(model, moments, mix, held) == near(numbers.prompt_tokens(s.copies))
    assert cost.handed_over_per_copy(mix, held) == near(numbers.staged_prompts(s.copies))
    states = (
        cost.state_bytes_per_copy(model, mix, held)
        / (1 if model.compressed else s.tp)
        * (numbers.layers_of(s, one.is_first) + numbers.drafting(one.is_last))
    )
    assert states == near(numbers.state_bytes(s, one.is_first, one.is_last))
    assert cost.tpot_per_interval(model, mix, one.M // one.d) == near(numbers.tpot_per_t())
    assert cost.ttft_round_trips(moments, assumed, mix, one.M // one.d) == near(numbers.ttft_round_trips())
    batch = cost.LargestBatch.of(mix, held)
    fixed = one.problem.profiles[s.gpu].reserve_bytes + rank.activation_bytes(batch)
    fixed += s.layers * rank.layer_bytes()
    if one.is_first:
        fixed += rank.prefix_bytes() + rank.embedding_bytes() + rank.vision_bytes()
    if one.is_last:
        fixed += rank.draft_bytes() + rank.logit_bytes(batch)
        fixed += 0.0 if one.is_first and model.tie_embeddings else rank.embedding_bytes()
    assert fixed == near(numbers.fixed_bytes(s, is_first=one.is_first, is_last=one.is_last))
    profile = one.problem.profiles[s.gpu]
    assert rank.room_bytes() == profile.usable_bytes - profile.reserve_bytes


@STAGES
@given(data=st.data(), num_copies=st.integers(1, 9))
def test_slack_is_the_same(stages: st.SearchStrategy[Drawn], data: st.DataObject, num_copies: int) -> None:
    one = data.draw(stages)
    numbers, s = one.numbers, one.stage
    spread = cost.chunk_spread(one.problem.model, numbers.moments)
    assert spread == near(numbers.delta())
    of_role = cost.regimes(one.problem.assumptions, one.role, spread)
    regime = cost.regime_of(of_role, in_flight=one.M, num_copies=num_copies)
    if one.d > 1:
        regime = cost.regime_together(one.role, spread, one.d)
    uneven = 0.0
    if one.role is Role.UNIFIED:
        R, phi = numbers.chunk(replace(s, layers=1)) / numbers.plain(replace(s, layers=1)), numbers.phi
        uneven = (R - (R - 1) * (1 - phi) ** one.M) / (1 + (R - 1) * phi) - 1
    assert max(regime.least, regime.unevenness * uneven) == near(numbers.slack(s, num_copies))


@pytest.mark.parametrize("num_copies", [1, 2, 3, 7])
def test_a_regime_holds_up_to_its_most_copies(num_copies: int) -> None:
    of_role = cost.regimes(Assumptions(), Role.UNIFIED, 0.3)
    assert of_role[0] != of_role[1]
    for in_flight in range(max(2, num_copies), 20):

        def regime(copies: int, M: int = in_flight) -> cost.Regime:
            return cost.regime_of(of_role, in_flight=M, num_copies=copies)

        most = cost.most_copies(in_flight, num_copies)
        assert num_copies <= most <= in_flight
        assert regime(most) == regime(num_copies)
        assert most == in_flight or regime(most + 1) != regime(num_copies)
    assert cost.regime_of(of_role, in_flight=1, num_copies=1) == cost.Regime(0.0, 0.0)


@given(st.floats(0.01, 1e6))
def test_unevenness_has_the_level_of_the_next_power(unevenness: float) -> None:
    level = cost.unevenness_level(unevenness)
    assert unevenness <= 1.25**level * (1 + 1e-6)
    assert level == 0 or unevenness > 1.25 ** (level - 1)


def test_powers_themselves_are_levels() -> None:
    assert [cost.unevenness_level(1.25**k) for k in range(40)] == list(range(40))


def test_ranks_share_heads_only_where_they_come_out_even() -> None:
    model = make_model(q_heads=24, kv_heads=4)
    found = {tp: cost.rank_shape(model, tp) for tp in range(1, 25)}
    assert {tp for tp, shape in found.items() if shape is not None} == {1, 2, 4, 8, 12, 24}
    shapes = {tp: (s.tp, s.groups, s.queries_per_group, s.splits_groups) for tp, s in found.items() if s is not None}
    assert shapes == {
        1: (1, 4, 6, True),
        2: (2, 2, 6, True),
        4: (4, 1, 6, True),
        8: (8, 1, 3, False),
        12: (12, 1, 2, False),
        24: (24, 1, 1, False),
    }


def test_ranks_hold_whole_groups_of_a_low_rank_output_projection() -> None:
    model = make_compressed(q_heads=8)  # four groups of two heads
    shapes = [cost.rank_shape(model, n) for n in (1, 2, 4, 8)]
    assert [one and (one.groups, one.queries_per_group) for one in shapes] == [(1, 8), (1, 4), (1, 2), None]
    assert not any(one is not None and one.splits_groups for one in shapes), "compressors serve all heads"
    assert [divides(model, n) for n in (1, 2, 4, 8)] == [True, True, True, False]


def test_cards_of_a_node_talk_over_what_is_named_then_nvlink_then_pcie() -> None:
    board = GpuType(
        name="A", architecture="", memory_bytes=10**9, mem_bytes_per_s=1e12, fp16_flops=1e14, pcie_bytes_per_s=1e10
    )
    named = Link(bytes_per_s=5e8, latency_s=1e-5)
    assert cost.intra_link(board, named) == named
    assert cost.intra_link(board, None) == Link(bytes_per_s=1e10, latency_s=0.0)
    assert cost.intra_link(replace(board, nvlink_bytes_per_s=3e11), None) == Link(bytes_per_s=3e11, latency_s=0.0)


def test_an_iteration_decodes_prefills_or_both() -> None:
    assert cost.Mix(3, 64, 1.0, 3.0).role is Role.UNIFIED
    assert cost.Mix(3, 0, 0.0, 3.0).role is Role.DECODE
    assert cost.Mix(0, 64, 1.0, 0.0).role is Role.PREFILL
    assert cost.Mix(3, 64, 1.0, 3.0).chunk_share == 0.25
    assert math.isclose(cost.P95_TAIL, 1 / (1 - 0.95))
