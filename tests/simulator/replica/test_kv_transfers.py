"""Prefill and decode on separate replicas, with KV sent between them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.simulator.events import Events
from hetis.simulator.simulate import Builder, simulate
from hetis.simulator.values import Fault, RequestLog, Settings
from hetis.solver.cluster import Link, Network
from hetis.solver.engine_rules import EngineRules
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import GpuPrecision
from hetis.solver.placement.families import run_by
from hetis.solver.plan import KvRoute, Plan, Role
from hetis.solver.problem import PlacementProblem
from tests.simulator.small_plans import equal_requests, pipeline, plan_of, small_problem, with_role
from tests.solver.instances import make_model, make_workload


def split_plan(problem: PlacementProblem, *, shares: tuple[float, ...] = (1.0,), pool: bool = False) -> Plan:
    """One prefill replica on big-0 and big-1, and a decode replica on two more cards for each share."""
    prefill = with_role(pipeline(problem, 3, 3, in_flight=2), Role.PREFILL)
    decodes = [
        with_role(pipeline(problem, 2, 4, first=2 * n + 2, micro_batch=6, pool=(1, 1) if pool else None), Role.DECODE)
        for n in range(len(shares))
    ]
    routes = tuple(KvRoute(prefill=0, decode=n + 1, rate=share) for n, share in enumerate(shares))
    return plan_of(prefill, *decodes, routes=routes)


@given(
    st.integers(1, 60), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.sampled_from([11_500_000, 60_000_000])
)
@settings(max_examples=30)
def test_every_prompt_is_sent_once_and_all_blocks_come_back(
    prompt: int, output: int, count: int, pool: bool, usable_bytes: int
) -> None:
    problem = small_problem(model=make_model(kv_heads=4), usable_bytes=usable_bytes)
    plan = split_plan(problem, shares=(2.0, 1.0), pool=pool)
    run = simulate(plan, problem, equal_requests(count, prompt=prompt, output=output, every_s=1e-3), Settings())
    assert not np.isnan(run.finished_s).any()
    assert run.kv_transfers == (count if output > 1 else 0) + run.num_preemptions
    assert np.all(run.replica == 0) if output == 1 else np.all(run.replica > 0)
    assert run.generated_tokens == count * output


@pytest.mark.parametrize(("prompt", "ahead"), [(64, 1), (24, 2), (4, 8)])
def test_decoders_keep_seats_for_all_prompts_of_the_chunks_under_way(prompt: int, ahead: int) -> None:
    """Two chunks of 32 tokens are in flight, and so are two micro-batches that decode."""
    problem = small_problem(workload=make_workload((prompt, 12)))
    builder = Builder(split_plan(problem), problem, RequestLog(), Events(), Settings())
    assert builder.replicas()[1].batching.ahead == ahead


def test_traffic_follows_the_shares_of_the_routes() -> None:
    problem = small_problem()
    run = simulate(
        split_plan(problem, shares=(3.0, 1.0)), problem, equal_requests(80, prompt=9, output=9, every_s=0.05)
    )
    assert np.bincount(run.replica).tolist() == [0, 60, 20]


@pytest.mark.parametrize(("router", "decoded"), [("nginx", [0, 9, 3]), ("fewest-tokens", [0, 6, 6])])
def test_the_emptiest_decode_replica_gets_the_next_prompt_where_queues_decide(
    router: Literal["nginx", "fewest-tokens"], decoded: list[int]
) -> None:
    plan, requests = split_plan(problem := small_problem(), shares=(3.0, 1.0)), equal_requests(12, prompt=9, output=60)
    run = simulate(plan, problem, requests, Settings(router=router))
    assert np.bincount(run.replica).tolist() == decoded


def test_the_mixed_pool_takes_prompts_once_the_prompt_pool_has_a_batch_waiting() -> None:
    # Ten prompts of 900 tokens at once: three leave more than 2,048 tokens waiting for the prompt pool, then three for
    # the mixed one.
    problem = small_problem()
    plan = plan_of(*split_plan(problem).replicas, pipeline(problem, 6, first=6), routes=split_plan(problem).kv_routes)
    run = simulate(plan, problem, equal_requests(10, prompt=900, output=5), Settings(router="fewest-tokens"))
    assert np.bincount(run.replica).tolist() == [0, 7, 3]


def test_nothing_is_given_to_a_prefill_replica_without_routes() -> None:
    problem = small_problem()
    plan = split_plan(problem)
    idle = with_role(pipeline(problem, 6, first=6, rate=100.0), Role.PREFILL)
    run = simulate(replace(plan, replicas=(*plan.replicas, idle)), problem, equal_requests(20, prompt=9, output=9))
    assert not np.isnan(run.finished_s).any()
    assert set(run.replica.tolist()) == {1}
    with pytest.raises(InvalidProblemError, match="no replica that takes prompts"):
        simulate(plan_of(idle), problem, equal_requests(1, prompt=9, output=9))


def test_a_prefill_replica_gets_what_its_routes_take_and_not_what_it_could_do() -> None:
    problem = small_problem()
    split = split_plan(problem)
    fast = replace(split.replicas[0], rate=9.0)  # its route takes one request/s, as many as the unified one serves
    plan = replace(split, replicas=(fast, split.replicas[1], pipeline(problem, 6, first=6)))
    run = simulate(plan, problem, equal_requests(40, prompt=9, output=9, every_s=0.01), Settings(router="weighted"))
    assert np.bincount(run.replica).tolist() == [0, 20, 20]


@pytest.mark.parametrize("prefix_tokens", [0, 20])
def test_a_slow_link_between_zones_limits_the_rate(prefix_tokens: int) -> None:
    # Everything else is far faster: requests leave at the link's bytes per second over the KV bytes of a prompt, which
    # has as much KV from the prefix cache as without it.
    problem = small_problem()
    groups = tuple(replace(g, zone="there" if g.name == "small" else "here") for g in problem.cluster.node_groups)
    link = Link(bytes_per_s=2e6, latency_s=1e-4)
    network = Network(default=problem.cluster.network.default, zone_default=link)
    problem = replace(problem, cluster=replace(problem.cluster, node_groups=groups, network=network))
    plan = split_plan(problem)
    decode = plan.replicas[1]
    stages = tuple(
        replace(stage, gpu="small", devices=tuple(name.replace("big", "small") for name in stage.devices))
        for stage in decode.stages
    )
    prefill = replace(plan.replicas[0], kv_zones=("here", "there"))
    plan = replace(plan, replicas=(prefill, replace(decode, stages=stages)))
    requests = [replace(one, prefix_tokens=prefix_tokens) for one in equal_requests(60, prompt=30, output=2)]
    run = simulate(plan, problem, requests)
    assert run.prefilled_tokens == 60 * (30 - prefix_tokens)
    kv_bytes = 30 * problem.model.kv_bytes_per_token()
    finished = np.sort(run.finished_s)
    assert (finished[50] - finished[10]) / 40 == pytest.approx(kv_bytes / link.bytes_per_s, rel=0.02)


def test_kv_is_sent_in_the_precision_of_the_replicas() -> None:
    problem = small_problem()
    link = Link(bytes_per_s=2e5, latency_s=1e-6)
    problem = replace(problem, cluster=replace(problem.cluster, network=Network(default=link, zone_default=link)))
    own = GpuPrecision(gpu="big", weights="bf16", weight_bytes=2.0, kv_bytes=1.0)
    family = run_by(problem.family, EngineRules(name="vllm"))
    narrow = replace(problem, model=replace(problem.model, precisions=(own,)), family=family)
    ends = [
        with_role(pipeline(problem, 6, first=n, in_flight=1), role)
        for n, role in enumerate((Role.PREFILL, Role.DECODE))
    ]
    plan = plan_of(*ends, routes=(KvRoute(prefill=0, decode=1, rate=1.0),))
    requests = equal_requests(60, prompt=30, output=2)
    wide_s, narrow_s = (
        np.diff(np.sort(simulate(plan, one, requests).finished_s)[[10, 50]])[0] for one in (problem, narrow)
    )
    assert wide_s == pytest.approx(2 * narrow_s, rel=0.02)


@pytest.mark.parametrize(
    ("prefill", "decodes", "layers"),
    [((3, 3), [(1, 5)], 5.0), ((5, 1), [(3, 3), (3, 3)], 5.0)],
    ids=["the receiving card", "the sending card"],
)
def test_a_slow_card_limits_the_rate(prefill: tuple[int, ...], decodes: list[tuple[int, ...]], layers: float) -> None:
    # The card of the stage with the most layers passes their KV of every prompt, one after the other. Handmade profiles
    # take 1.1 times the seconds of the bytes.
    problem = small_problem()
    link = Link(bytes_per_s=2e5, latency_s=1e-6)
    problem = replace(problem, cluster=replace(problem.cluster, network=Network(default=link, zone_default=link)))
    sender = with_role(pipeline(problem, *prefill, in_flight=8), Role.PREFILL)
    takers = [with_role(pipeline(problem, *one, first=2 * n + 2), Role.DECODE) for n, one in enumerate(decodes)]
    routes = tuple(KvRoute(prefill=0, decode=n + 1, rate=1.0) for n in range(len(decodes)))
    run = simulate(plan_of(sender, *takers, routes=routes), problem, equal_requests(60, prompt=30, output=2))
    kv_bytes = 30 * problem.model.kv_bytes_per_token() * layers / problem.model.num_layers
    finished = np.sort(run.finished_s)
    assert (finished[50] - finished[10]) / 40 == pytest.approx(1.1 * kv_bytes / link.bytes_per_s, rel=0.01)


@pytest.mark.parametrize(
    ("pair", "layers"), [(("big-0", "big-2"), 5.0), (("big-1", "big-3"), 3.0), (("big-2", "big-4"), 0)]
)
def test_a_slow_link_to_the_other_replica_limits_the_rate(pair: tuple[str, str], layers: float) -> None:
    """The stages at its ends, on nodes 0 with 1 and 2 with 3, pay for an explicit link, and others do not."""
    problem = small_problem()
    link, slow = Link(bytes_per_s=1e9, latency_s=1e-6), Link(bytes_per_s=2e5, latency_s=1e-6)
    network = Network(default=link, zone_default=link, between_nodes={pair: slow})
    slower = replace(problem, cluster=replace(problem.cluster, network=network))
    sender = with_role(pipeline(problem, 5, 1, in_flight=8), Role.PREFILL)
    taker = with_role(pipeline(problem, 3, 3, first=2), Role.DECODE)
    plan = plan_of(sender, taker, routes=(KvRoute(prefill=0, decode=1, rate=1.0),))
    finished = np.sort(simulate(plan, slower, equal_requests(60, prompt=30, output=2)).finished_s)
    kv_bytes = 30 * problem.model.kv_bytes_per_token() * layers / problem.model.num_layers
    each_s = (finished[50] - finished[10]) / 40
    assert each_s == pytest.approx(1.1 * kv_bytes / slow.bytes_per_s, rel=0.01) if layers else each_s < 1e-3


@pytest.mark.parametrize("at_s", [0.02, 0.03, 0.05, 0.07])
def test_a_worker_may_be_lost_while_kv_is_on_its_way_to_it(at_s: float) -> None:
    problem = small_problem(model=make_model(kv_heads=4))
    faults = (Fault(at_s=at_s, device="small-0/0"), Fault(at_s=at_s + 0.05, device="small-0/0", joins=True))
    prefill = with_role(pipeline(problem, 6, first=5), Role.PREFILL)
    decode = with_role(pipeline(problem, 6, micro_batch=8, pool=(2, 2)), Role.DECODE)
    plan = plan_of(prefill, decode, routes=(KvRoute(prefill=0, decode=1, rate=1.0),))
    requests = equal_requests(50, prompt=100, output=50, every_s=1e-3)
    run = simulate(plan, problem, requests, Settings(dispatch=False, redispatch=False, faults=faults))
    assert run.num_preemptions > 0
    assert not np.isnan(run.finished_s).any()
    assert run.generated_tokens == 50 * 50


@pytest.mark.parametrize(("device", "prompt"), [("big-0/0", 400), ("big-2/0", 30)])
def test_a_failure_on_either_side_costs_no_request(device: str, prompt: int) -> None:
    problem = small_problem()
    faults = (Fault(at_s=0.05, device=device), Fault(at_s=0.3, device=device, joins=True))
    requests = equal_requests(60, prompt=prompt, output=30)
    run = simulate(split_plan(problem), problem, requests, Settings(faults=faults))
    assert run.num_preemptions > 0
    assert not np.isnan(run.finished_s).any()
    assert np.all(run.first_token_s < run.finished_s)
    assert run.generated_tokens == 60 * 30
