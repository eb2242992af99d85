"""The functions of the cost model one by one; `test_agreement` compares their sums with the checker's."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from hetis.solver import cost, mixes
from hetis.solver.check.setting import divides
from hetis.solver.cluster import GpuType, Link
from hetis.solver.plan import Role
from tests.solver.instances import make_compressed, make_model
from tests.solver.test_agreement import STAGES, Drawn, near


def card(one: Drawn, gpu: str, tp: int, attention_dp: int = 1) -> cost.DeviceCost:
    shape = cost.rank_shape(one.problem.model, tp, attention_dp)
    assert shape is not None
    return cost.DeviceCost(
        one.problem.model, one.problem.profiles[gpu], one.setting.moments, shape, one.stage.intra_link
    )


def mix_of(one: Drawn) -> mixes.Mix:
    return mixes.mix_of(
        one.problem.model, one.setting.moments, micro_batch=one.b, chunk_tokens=one.C, attention_dp=one.d
    )  # fmt: skip


@STAGES
@given(data=st.data())
def test_arrays_cost_what_their_elements_cost(stages: st.SearchStrategy[Drawn], data: st.DataObject) -> None:
    one = data.draw(stages)
    rank, link = card(one, one.stage.gpu, one.stage.tp, one.d), one.stage.hop_link
    tokens = np.array([0.0, 1.0, 17.0, 300.0])
    for cost_of in (
        rank.dense_s, rank.reduces_s, rank.prefill_s, rank.step_s, rank.head_s,
        lambda t: rank.transfer_s(t, link), lambda t: rank.hop_s(t, link), lambda t: rank.decode_attention_s(t, 2),
    ):  # fmt: skip
        found = np.broadcast_to(cost_of(tokens), tokens.shape)
        assert found.tolist() == [near(float(cost_of(t))) for t in tokens.tolist()]


@STAGES
@given(data=st.data())
def test_norms_over_all_heads_take_one_more_all_reduce_however_few_its_bytes(
    stages: st.SearchStrategy[Drawn], data: st.DataObject
) -> None:
    one = data.draw(stages)
    rank = card(one, one.stage.gpu, one.stage.tp, one.d)
    plain, spanning = (
        replace(rank, model=replace(one.problem.model, norms_span_heads=spans)).reduces_s(16) for spans in (False, True)
    )
    assert (spanning > plain) == (one.stage.tp > 1)
    assert spanning <= 1.5 * plain


@pytest.mark.parametrize("copies", mixes.BUSIEST)
def test_the_busiest_of_copies_is_the_mean_maximum_of_normal_variables(copies: int) -> None:
    def below(x: float) -> float:
        return (0.5 * math.erfc(-x / math.sqrt(2))) ** copies

    expected, _ = quad(lambda x: 1 - below(x) - below(-x), 0, 12, epsabs=1e-13, epsrel=1e-13)
    assert math.isclose(mixes.BUSIEST[copies], expected, rel_tol=1e-9, abs_tol=1e-9)


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
    assert mixes.Mix(3, 64, 1.0, 3.0).role is Role.UNIFIED
    assert mixes.Mix(3, 0, 0.0, 3.0).role is Role.DECODE
    assert mixes.Mix(0, 64, 1.0, 0.0).role is Role.PREFILL
    assert mixes.Mix(3, 64, 1.0, 3.0).chunk_share == 0.25
    assert math.isclose(mixes.P95_TAIL, 1 / (1 - 0.95))
