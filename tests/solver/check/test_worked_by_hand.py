"""Seconds, latencies and bytes that the checker derives, worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from hetis.solver.check import Rule
from hetis.solver.cluster import Link, Network
from hetis.solver.plan import (
    AttentionWorkerPool,
)
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit, Op, Piece, Profile
from tests.models import shape_of
from tests.solver.check.test_check import A_STAGE
from tests.solver.claimed_plans import claimed, derived_of, plan_of, rules, unclaimed
from tests.solver.instances import (
    FREE_FAMILY,
    MADE_UP,
    make_model,
    make_node,
    make_problem,
    make_workload,
)

A_MICROSECOND_PER_BYTE = Piece(byte_s=1e-6)


def token_profile(gpu: str, transfer: Piece = A_MICROSECOND_PER_BYTE) -> Profile:
    """A profile with a millisecond per token of dense work and ``byte_s`` per byte sent; the rest takes no time."""
    pieces = {Op.DENSE: Piece(token_s=1e-3), Op.TRANSFER: transfer}
    ops = (Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION, Op.ALL_REDUCE, Op.TRANSFER)
    fits = tuple(Fit(op=op, pieces=(pieces.get(op, Piece()),), provenance=MADE_UP) for op in ops)
    return Profile(gpu=gpu, usable_bytes=50_000_000, reserve_bytes=1_000_000, fits=fits)


def token_problem(
    bytes_per_s: float = 1e9, *, a: Piece = A_MICROSECOND_PER_BYTE, b: Piece = A_MICROSECOND_PER_BYTE
) -> PlacementProblem:
    """Four A and four B with these message times; a link's latency is 10 ms."""
    nodes = [make_node("a", "A", nodes=4), make_node("b", "B", nodes=4)]
    network = Network(default=Link(bytes_per_s=bytes_per_s, latency_s=0.01))
    profiles = {"A": token_profile("A", a), "B": token_profile("B", b)}
    return make_problem(nodes, profiles=profiles, network=network, workload=make_workload((128, 40)))


WHOLE = replace(A_STAGE, tp=1, num_layers=6, devices=("a-0/0",), kv_head_groups_kept=2)


def test_single_stage_takes_the_time_worked_by_hand() -> None:
    derived = derived_of(unclaimed(WHOLE, in_flight=1), token_problem())
    # P = 128, O = 40, b = 4, C = 64: nc = 2 iterations with a chunk, nd = 10 - 2 = 8 without, n_it = 10, phi = 0.2.
    # w = 2 * 68 ms + 8 * 4 ms = 168 ms; six layers 1008 ms; LM head 2 * 5 ms + 8 * 4 ms = 42 ms.
    assert derived.t_s == pytest.approx(1.050)
    assert derived.tpot_per_t == pytest.approx(0.1)  # b M / O
    # q = 0.9 * 0.2 = 0.18; 20 * q^(sqrt(4) - 1) = 3.6; wait = 2 RT / (1 - 0.18) / 2 * ln 3.6. A round trip takes t / 10
    # in the mean, with a chunk 6 * 68 + 5 ms.
    assert derived.ttft_s(derived.t_s) == pytest.approx(0.413 * (2 + math.log(3.6) / 0.82))
    assert derived.ttft_s(10.0) == pytest.approx(1.0 * (2 + math.log(3.6) / 0.82))


def test_short_outputs_leave_seats_empty_and_a_token_takes_a_round_trip() -> None:
    problem = replace(token_problem(), workload=make_workload((128, 4)))
    derived = derived_of(unclaimed(WHOLE, in_flight=1), problem)
    # P = 128, O = 4, b = 4, C = 64: nc = 2 iterations with a chunk, although one is enough for the outputs; nd = 0.
    # A layer takes 2 * 68 ms, the LM head 2 * 5 ms. Of b = 4 seats 2 are taken on average, so TPOT is not b M / O * t.
    assert derived.t_s == pytest.approx(6 * 0.136 + 0.010)
    assert derived.tpot_per_t == pytest.approx(1 / 2)


def test_pipeline_takes_the_time_worked_by_hand() -> None:
    copies = replace(WHOLE, copies=2, num_layers=4, devices=("a-0/0", "a-1/0"))
    last = replace(WHOLE, first_layer=4, num_layers=2, devices=("a-2/0",))
    derived = derived_of(unclaimed(copies, last), token_problem())
    # First: 4 * 168 ms = 672 ms on 2 copies: 336 ms. Last: 2 * 168 + 42 ms, and hops of 512 bytes per token at 1 us:
    # 2 (68 * 0.512 + 10) + 8 (4 * 0.512 + 10) = 186.016 ms: 564.016 ms in all. M = 4, K = 3. A layer takes
    # 68 / 4 = 17 times as long with a chunk, and a fifth of iterations has one: 1 + 16 * 0.2 = 4.2 in the mean, the
    # longest of four 17 - 16 * 0.8^4 = 10.4464. Slack is 0.8 (10.4464 / 4.2 - 1) = 119%.
    slack = 0.8 * (10.4464 / 4.2 - 1)
    assert derived.t_s == pytest.approx((1 + slack) * 0.564016)


def test_attention_workers_take_the_time_worked_by_hand() -> None:
    stage = replace(WHOLE, kv_head_groups_kept=1)
    pool = AttentionWorkerPool(stage=0, gpu="A", devices=("a-1/0", "a-2/0", "a-3/0"), kv_head_groups=1)
    derived = derived_of(unclaimed(stage, pools=(pool,), in_flight=1), token_problem())
    # r = 2 query heads of 64: e = (2 + 1) * 64 * 2 = 384 bytes; b k = 4 pairs: 4 * 2 * 384 = 3072 bytes: 3.072 ms, and
    # the link's 10 ms there and back. A chunk ships 64 * 1 * 256 = 16384 bytes in 16.384 ms: with the exchange less
    # than the 68 ms and 23.072 ms that the layer takes anyhow.
    w_s = 0.168 + 10 * 0.023072
    assert derived.t_s == pytest.approx(6 * w_s + 0.042)
    # The busiest of three cards holds 2 of the 4 requests, one of two groups, 256 bytes per token in 6 layers. One bin:
    # the context is 128 + 20 + 7.5 = 155.5 tokens; its variance is the growth's, 40^2 / 12. phi (64 + 64) = 25.6.
    kv_tokens = 4 * 155.5 + 1.645 * 2 * math.sqrt(1600 / 12) + 25.6
    workers = next(use for use in derived.memory if use.rule is Rule.WORKER_MEMORY)
    assert workers.num_bytes == pytest.approx(1e6 + 6 * 0.5 * kv_tokens * 256)
    # The rank has its own group, and the prompts' part of the other one: later chunks attend to that.
    layer = 2 * (256 * 64 * 12 + 3 * 256 * 512)
    fixed = 1e6 + 68 * 2 * 2048 + 6 * layer + 2 * 512_000 + 16_000 + 6 * 256 * 25.6
    rank = next(use for use in derived.memory if use.rule is Rule.RANK_MEMORY)
    assert rank.num_bytes == pytest.approx(fixed + 6 * 256 * kv_tokens)
    room = min((50e6 - fixed) / (6 * 256), 49e6 / (6 * 0.5 * 256))
    assert derived.kv_tokens == pytest.approx(room)


def test_kv_of_chunks_that_reaches_attention_workers_late_is_waited_for() -> None:
    stage = replace(WHOLE, kv_head_groups_kept=0)
    pool = AttentionWorkerPool(stage=0, gpu="B", devices=("b-0/0",), kv_head_groups=2)
    one = unclaimed(stage, pools=(pool,), in_flight=1)
    # Both groups of 64 tokens are 32768 bytes, the exchange of 8 pairs is 6144 bytes and 20 ms of latency; that also
    # in iterations without a chunk. A byte takes 10 us on the wire and 1 us beside it: 360.448 and 87.584 ms, together
    # longer than 68 + 87.584 ms of computing.
    w_s = 2 * (0.360448 + 0.087584) + 8 * (0.004 + 0.087584)
    wired = Piece(byte_s=1e-6, wire=1.0)
    assert derived_of(one, token_problem(1e5, a=wired, b=wired)).t_s == pytest.approx(6 * w_s + 0.042)
    # The same holds if only the cards are slow, at 10 us per byte.
    w_s = 2 * (0.32768 + 0.08144) + 8 * (0.004 + 0.08144)
    slow_cards = token_problem(b=Piece(byte_s=1e-5))
    assert derived_of(one, slow_cards).t_s == pytest.approx(6 * w_s + 0.042)
    # Two such cards share it, 163.84 and 50.72 ms.
    two = unclaimed(stage, pools=(replace(pool, devices=("b-0/0", "b-1/0")),), in_flight=1)
    w_s = 2 * (0.16384 + 0.05072) + 8 * (0.004 + 0.05072)
    assert derived_of(two, slow_cards).t_s == pytest.approx(6 * w_s + 0.042)


def test_rank_holds_the_bytes_worked_by_hand() -> None:
    derived = derived_of(unclaimed(WHOLE, in_flight=1), token_problem())
    # A layer: attention 256 * 64 * (8 + 4), MLP 3 * 256 * 512 parameters of 2 bytes; tables of 256,000 parameters each;
    # logits 4 * 4 * 1000; activations 68 * 2 * (1024 + 1024). KV of a token: 6 layers * 2 groups * 256 bytes.
    layer = 2 * (256 * 64 * 12 + 3 * 256 * 512)
    fixed = 1e6 + 68 * 2 * 2048 + 6 * layer + 2 * 512_000 + 16_000
    kv_tokens = 4 * 155.5 + 1.645 * 2 * math.sqrt(1600 / 12) + 25.6
    assert derived.memory[0].num_bytes == pytest.approx(fixed + 3072 * kv_tokens)
    assert derived.kv_tokens == pytest.approx((50e6 - fixed) / 3072)


def test_prefix_layers_stay_on_the_first_stage_with_the_weights_of_dense_layers() -> None:
    moe = shape_of(num_experts=4, active_experts=2, expert_intermediate=256, first_dense_layers=1)
    problem = make_problem([make_node("a", "A", nodes=2)], model=make_model(moe=moe), family=FREE_FAMILY)
    first = replace(WHOLE, num_layers=1)
    last = replace(WHOLE, first_layer=1, num_layers=5, devices=("a-1/0",))
    plan = plan_of(problem, unclaimed(first, last))
    assert Rule.STAGE_LAYERS in rules(plan, problem)
    longer = unclaimed(replace(WHOLE, num_layers=2), replace(last, first_layer=2, num_layers=4))
    sound_plan = plan_of(problem, claimed(longer, problem))
    assert rules(sound_plan, problem) == set()
    # Rank of the first stage: a dense layer, an expert layer, the embedding; KV of two layers.
    kv_tokens = 16 * 147.5 + 1.645 * 4 * math.sqrt(1600 / 12) + 4 * 120 / 64 / 10 * (60 + 64)
    attention, router = 256 * 64 * 12, 256 * 4
    params = attention + 3 * 256 * 512 + attention + router + 4 * 3 * 256 * 256
    fixed = 1e6 + 68 * 2 * (1024 + 2 * 512) + 2 * params + 512_000
    assert derived_of(longer, problem).memory[0].num_bytes == pytest.approx(fixed + 2 * 512 * kv_tokens)
