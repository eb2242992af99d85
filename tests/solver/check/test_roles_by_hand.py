"""What the checker derives of prefill and decode replicas, worked out by hand."""

from __future__ import annotations

import math

import pytest

from hetis.solver.check.memory import kv_tokens_of_a_copy, prompt_tokens_of_a_copy, staged_prompts_of_a_copy
from hetis.solver.check.setting import Setting
from hetis.solver.check.timing import least_slack
from hetis.solver.cluster import Link, Network
from hetis.solver.mixes import chunk_spread, regime_of, regimes
from hetis.solver.plan import AttentionWorkerPool, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.profile import Fit, Op, Piece, Profile
from tests.models import replace, shape_of
from tests.solver.check.test_roles import WHOLE
from tests.solver.claimed_plans import derived_of, unclaimed
from tests.solver.instances import (
    MADE_UP,
    make_model,
    make_node,
    make_problem,
    make_workload,
)


def token_problem(*, link: Link | None = None, **model: object) -> PlacementProblem:
    """A millisecond per token of dense work, a microsecond per byte of a message; the rest takes no time.

    P = 128, O = 40; a token's KV in one layer and group is 2 * 64 * 2 = 256 bytes, in both groups 512.
    """
    pieces = {Op.DENSE: Piece(token_s=1e-3), Op.TRANSFER: Piece(byte_s=1e-6, wire=1.0)}
    ops = (Op.DENSE, Op.PREFILL_ATTENTION, Op.DECODE_ATTENTION, Op.ALL_REDUCE, Op.TRANSFER)
    fits = tuple(Fit(op=op, pieces=(pieces.get(op, Piece()),), provenance=MADE_UP) for op in ops)
    profile = Profile(gpu="A", usable_bytes=50_000_000, reserve_bytes=1_000_000, fits=fits)
    network = Network(default=link or Link(bytes_per_s=1e9, latency_s=0.01))
    return make_problem(
        [make_node("a", "A", gpus=4)],
        profiles={"A": profile},
        network=network,
        workload=make_workload((128, 40)),
        model=make_model(**model),  # type: ignore[arg-type]
    )


ALONE = replace(WHOLE, devices=("a/0",))
PREFILL = unclaimed(ALONE, in_flight=1, role=Role.PREFILL, kv_zones=("default",))
DECODE = unclaimed(ALONE, in_flight=1, role=Role.DECODE)


def test_prefill_replica_takes_the_time_worked_by_hand() -> None:
    derived = derived_of(PREFILL, token_problem())
    # nc = 2, nd = 0. Computing: 2 * 64 ms = 128 ms a layer. Sending: 64 * 512 = 32768 bytes take 32.768 us on the wire
    # and 32.768 ms besides, twice 65.6 ms: hidden behind it. LM head of one token, twice.
    assert derived.t_s == pytest.approx(6 * 0.128 + 2 * 0.001)
    assert derived.tpot_per_t == 0.0
    # q = 0.9; p_wait = 0.9^(sqrt(4) - 1); wait = 2 RT / (1 - 0.9) / 2 * ln 18, RT = t / 2; the p95 prompt has 2 chunks.
    assert derived.ttft_s(derived.t_s) == pytest.approx(
        derived.t_s * (1.0 + 0.5 / 0.1 * math.log(18)) + derived.landing_s
    )
    assert derived.landing_s == pytest.approx(0.032768 + 32768e-9 + 0.01)


def test_prefill_replica_waits_for_a_slow_wire() -> None:
    problem = token_problem(link=Link(bytes_per_s=1e5, latency_s=0.0))
    derived = derived_of(PREFILL, problem)
    send_s = 0.032768 + 0.32768
    assert derived.t_s == pytest.approx(6 * 2 * send_s + 2 * 0.001)
    assert derived.landing_s == pytest.approx(send_s)


def test_decode_replica_takes_the_time_worked_by_hand() -> None:
    derived = derived_of(DECODE, token_problem())
    # nd = 10 iterations of 4 tokens: 40 ms a layer; but a prompt's KV, 128 * 512 bytes, takes 65.536 ms to arrive.
    arriving_s = 0.065536 + 65536e-9
    assert derived.t_s == pytest.approx(6 * arriving_s + 10 * 0.004)
    assert derived.tpot_per_t == pytest.approx(0.1)
    assert (derived.ttft_s(derived.t_s), derived.landing_s) == (0.0, 0.0)


HALVES = replace(ALONE, num_layers=3), replace(ALONE, first_layer=3, num_layers=3, devices=("a/1",))


def test_iterations_of_a_decode_pipeline_hardly_hold_one_another_up() -> None:
    problem = token_problem(link=Link(bytes_per_s=1e12, latency_s=0.0))
    # 10 iterations of 4 tokens: 3 layers of 4 ms, and on the last stage an LM head of 4 ms and a hop of 4 * 512 bytes.
    # But KV takes 65.536 ms a layer to arrive, longer than 10 * 4 ms.
    last_s = 3 * 0.065536 + 10 * (0.004 + 0.002048)
    for in_flight in (2, 3, 4):  # K = 2
        derived = derived_of(unclaimed(*HALVES, in_flight=in_flight, role=Role.DECODE), problem)
        assert derived.t_s == pytest.approx(1.02 * last_s, rel=1e-5)


def test_chunks_of_long_prompts_hold_one_another_up_in_a_tight_pipeline() -> None:
    link = Link(bytes_per_s=1e12, latency_s=0.0)
    problem = replace(token_problem(link=link), workload=make_workload((3840, 40)))
    # 60 chunks of 64 tokens: 3 layers of 64 ms, an LM head of one token and a hop of 32768 bytes.
    last_s = 60 * (3 * 0.064 + 0.001 + 0.032768)
    # A layer takes a token 2 * 589824 FLOPs and 4 * 4 * 64 for every token it attends to: 1920.5 in the mean, with a
    # standard deviation of 3840 / sqrt(12), near enough. So chunks differ by 0.361, of which 0.8 are lost.
    spread = 1024 * math.sqrt(3840**2 / 3 - 1920**2) / (2 * 589824 + 1024 * 1920.5)
    for in_flight, slack in ((2, 0.8 * spread), (3, 0.8 * spread), (4, 0.02)):
        derived = derived_of(unclaimed(*HALVES, in_flight=in_flight, role=Role.PREFILL, kv_zones=("default",)), problem)
        assert derived.t_s == pytest.approx((1 + slack) * last_s, rel=1e-5)


def test_short_prompts_leave_a_tight_prefill_pipeline_its_least_slack() -> None:
    problem = replace(token_problem(link=Link(bytes_per_s=1e12, latency_s=0.0)), workload=make_workload((64, 40)))
    one = unclaimed(*HALVES, in_flight=2, role=Role.PREFILL, kv_zones=("default",))
    assert derived_of(one, problem).t_s == pytest.approx(1.02 * (3 * 0.064 + 0.001 + 0.032768), rel=1e-5)


@pytest.mark.parametrize("window", [None, 512])
@pytest.mark.parametrize("lengths", [((128, 40),), ((4096, 40),), ((16, 5), (30_000, 300))])
def test_search_and_checker_know_the_same_slack(lengths: tuple[tuple[int, int], ...], window: int | None) -> None:
    model = replace(make_model(), sliding_window=window)
    problem = replace(token_problem(), model=model, workload=make_workload(*lengths))
    moments = problem.workload.moments()
    for role in Role:
        of_role = regimes(problem.assumptions, role, chunk_spread(model, moments))
        for in_flight, num_copies in ((1, 1), (2, 2), (3, 2), (4, 2), (4, 1)):
            setting = Setting(
                problem=problem, moments=moments, micro_batch=4, in_flight=in_flight, chunk_tokens=64, role=role
            )
            found = regime_of(of_role, in_flight=in_flight, num_copies=num_copies)
            assert tuple(found) == pytest.approx(least_slack(setting, num_copies), rel=1e-12)


def test_attention_workers_of_a_decode_replica_receive_their_groups_themselves() -> None:
    stage = replace(ALONE, kv_head_groups_kept=1)
    pool = AttentionWorkerPool(stage=0, gpu="A", devices=("a/1", "a/2"), kv_head_groups=1)
    fast = token_problem(link=Link(bytes_per_s=1e12, latency_s=0.0))
    derived = derived_of(unclaimed(stage, pools=(pool,), in_flight=1, role=Role.DECODE), fast)
    # The exchange: 4 pairs * 2 heads * 384 bytes leave in 3.072 ms, 10 times: with 40 ms 70.72 ms. KV of one group
    # takes 32.768 ms to the stage, half as long to either card.
    assert derived.t_s == pytest.approx(6 * 0.07072 + 0.04, rel=1e-6)
    nothing_kept = replace(stage, kv_head_groups_kept=0)
    one = replace(pool, devices=("a/1",), kv_head_groups=2)
    all_given = unclaimed(nothing_kept, pools=(one,), in_flight=1, role=Role.DECODE)
    # Nothing arrives at the stage; both groups of a prompt at the only card: 65.536 ms, less than 40 + 61.44 ms.
    assert derived_of(all_given, fast).t_s == pytest.approx(6 * 0.10144 + 0.04, rel=1e-6)
    # P L G kvb bytes for one request, but 61,440 bytes of exchange take as long for each byte: a longer prompt.
    long = replace(fast, workload=make_workload((512, 40)))
    assert derived_of(all_given, long).t_s == pytest.approx(6 * 0.262144 + 0.04, rel=1e-6)


def test_groups_held_by_several_ranks_travel_once() -> None:
    problem = token_problem(link=Link(bytes_per_s=1e12, latency_s=0.0), kv_heads=1)
    stage = replace(ALONE, tp=4, devices=("a/0", "a/1", "a/2", "a/3"), kv_head_groups_kept=1)
    derived = derived_of(replace(DECODE, stages=(stage,)), problem)
    assert derived.t_s == pytest.approx(6 * 0.04 + 0.04)  # 128 * 256 bytes take 32.8 ms, hidden behind 40 ms
    narrow = token_problem(link=Link(bytes_per_s=128 * 256 / 0.05, latency_s=0.0), kv_heads=1)
    assert derived_of(replace(DECODE, stages=(stage,)), narrow).t_s == pytest.approx(6 * (0.05 + 0.032768) + 0.04)


def test_prefix_layers_send_their_kv_too() -> None:
    moe = shape_of(num_experts=4, active_experts=2, expert_intermediate=256, first_dense_layers=1)
    problem = token_problem(link=Link(bytes_per_s=1e5, latency_s=0.0), moe=moe)
    assert derived_of(PREFILL, problem).t_s == pytest.approx(6 * 2 * (0.032768 + 0.32768) + 0.002)


def test_memory_of_both_roles_is_worked_by_hand() -> None:
    problem = token_problem()
    layer = 2 * (256 * 64 * 12 + 3 * 256 * 512)
    weights = 1e6 + 6 * layer + 2 * 512_000
    prefill = derived_of(PREFILL, problem)
    # Chunks of 64 tokens; logits of one; one prompt in flight, half of it there on average, and a chunk; another one of
    # 128 tokens that has not landed yet.
    fixed = weights + 64 * 2 * 2048 + 4 * 1000
    assert prefill.memory[0].num_bytes == pytest.approx(fixed + 3072 * (64 + 64 + 128))
    assert prefill.kv_tokens == pytest.approx((50e6 - fixed) / 3072)
    decode = derived_of(DECODE, problem)
    # Four tokens and their logits; four requests with headroom, and sqrt(4) prompts that arrive.
    fixed = weights + 4 * 2 * 2048 + 16_000
    kv_tokens = 4 * 155.5 + 1.645 * 2 * math.sqrt(1600 / 12) + 2 * 128
    assert decode.memory[0].num_bytes == pytest.approx(fixed + 3072 * kv_tokens)
    assert decode.kv_tokens == pytest.approx((50e6 - fixed) / 3072)


@pytest.mark.parametrize(("in_flight", "seats", "staged"), [(1, 1, 1.0), (1, 4, 2.0), (4, 4, 4.0), (9, 9, 9.0)])
def test_prompts_that_arrive_are_the_root_of_the_seats(in_flight: int, seats: int, staged: float) -> None:
    problem = token_problem()
    setting = setting_of(problem, Role.DECODE, in_flight=in_flight, micro_batch=seats)
    assert staged_prompts_of_a_copy(setting, 1) == pytest.approx(staged)
    # On two copies each holds half of the micro-batches, rounded up.
    halves = math.sqrt(math.ceil(in_flight / 2) * seats)
    assert staged_prompts_of_a_copy(setting, 2) == pytest.approx(halves)


def test_one_prompt_has_not_landed_and_unified_replicas_hand_none_over() -> None:
    problem = token_problem()
    for in_flight in (1, 6):
        prefill = setting_of(problem, Role.PREFILL, in_flight=in_flight, chunk_tokens=64)
        unified = setting_of(problem, Role.UNIFIED, in_flight=in_flight, micro_batch=4, chunk_tokens=64)
        assert (staged_prompts_of_a_copy(prefill, 1), staged_prompts_of_a_copy(unified, 1)) == (1.0, 0.0)


def test_prompts_that_arrive_keep_no_more_than_windows_leave() -> None:
    """Half of the layers slide over 32 of the 128 tokens of a prompt, so that 80 are kept in the mean layer."""
    whole = token_problem()
    freeing = replace(whole, model=replace(whole.model, sliding_window=32, sliding_layers=3))
    for problem, kept in ((whole, 128), (freeing, 80)):
        setting = setting_of(problem, Role.PREFILL, in_flight=1, chunk_tokens=64)
        assert kv_tokens_of_a_copy(setting, 1) - prompt_tokens_of_a_copy(setting, 1) == pytest.approx(kept)


def setting_of(
    problem: PlacementProblem, role: Role, *, in_flight: int, micro_batch: int = 0, chunk_tokens: int = 0
) -> Setting:
    """Return the setting of a replica with this role."""
    moments = problem.workload.moments(block_tokens=problem.assumptions.block_tokens)
    return Setting(
        problem=problem,
        moments=moments,
        micro_batch=micro_batch,
        in_flight=in_flight,
        chunk_tokens=chunk_tokens,
        role=role,
    )
