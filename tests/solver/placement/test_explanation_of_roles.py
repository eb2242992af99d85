"""The explanation of prefill and decode replicas, and of cards that several stages share."""

from __future__ import annotations

import pytest

from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.cluster import Link
from hetis.solver.placement.explanation import explain_plan
from hetis.solver.placement.explanation.replica_view import replica_views
from hetis.solver.plan import (
    KvRoute,
    Role,
)
from tests.models import replace
from tests.solver.check import test_roles as test_check_roles
from tests.solver.check.test_check import (
    sound,
    the_problem,
)
from tests.solver.placement.test_explanation import assert_adds_up


def test_replicas_of_every_role_add_up() -> None:
    problem = test_check_roles.the_problem()
    explanation = assert_adds_up(test_check_roles.sound(problem), problem)
    assert [sentence.split(":")[0] for sentence in explanation.bottlenecks] == [
        "replica 0 (prefill)",
        "replica 1 (decode)",
        "replica 2 (decode)",
        "replica 3",
    ]
    assert ", KV leaves in " in explanation.bottlenecks[0]
    assert ", KV arrives in " in explanation.bottlenecks[1]
    assert "KV leaves" not in explanation.bottlenecks[3]
    assert "mean TPOT" not in explanation.bottlenecks[0]
    assert "p95 TTFT" not in explanation.bottlenecks[1]


def test_a_plan_that_leaves_a_zone_idle_is_explained_although_it_might_send_there() -> None:
    """The prefill replica may send KV to all zones; the plan's other devices are in its own zone."""
    problem = test_check_roles.the_problem()
    plan = test_check_roles.sound(problem)
    fleet = Fleet.of(problem.cluster)
    (prefill,) = (one for one in plan.replicas if one.role is Role.PREFILL)
    assert set(prefill.kv_zones) == set(problem.cluster.zones())
    assert len(fleet.zones_of(prefill.devices())) == 1
    alone = replace(plan, replicas=(prefill,), kv_routes=())
    assert explain_plan(alone, problem).bottlenecks[0].startswith("replica 0 (prefill)")


def test_replica_that_waits_for_its_wire_says_so_and_adds_up() -> None:
    problem = test_check_roles.the_problem(between=Link(bytes_per_s=1e6, latency_s=0.1))
    explanation = assert_adds_up(test_check_roles.sound(problem), problem)
    assert "% of which is waiting for it" in explanation.bottlenecks[0]
    assert explanation.stage_times[0].kv_wait_s > 0.5 * explanation.stage_times[0].total_s
    assert explanation.stage_times[3].kv_wire_s == 0.0


def test_kv_over_an_explicit_link_between_replicas_adds_up() -> None:
    problem = test_check_roles.the_problem()
    slow = {("a-0", "b-1"): Link(bytes_per_s=1e6, latency_s=0.1)}
    network = replace(problem.cluster.network, between_nodes=slow)
    linked = replace(problem, cluster=replace(problem.cluster, network=network))
    explanation = assert_adds_up(test_check_roles.sound(problem), linked)
    for stage in explanation.stage_times[:2]:
        assert stage.kv_wait_s > 0.5 * stage.total_s


def test_next_size_of_a_prefill_replica_is_its_chunk() -> None:
    problem = test_check_roles.the_problem(chunk_tokens=(64, 128))
    explanation = explain_plan(test_check_roles.sound(problem), problem)
    assert "the next chunk size, 128, " in explanation.bottlenecks[0]
    assert "the next batch size, 16, " in explanation.bottlenecks[1]


def test_latencies_of_a_view_are_those_of_the_plan() -> None:
    problem = test_check_roles.the_problem()
    plan = test_check_roles.sound(problem)
    for view in replica_views(plan, problem):
        interval_s = view.interval_s(view.times())
        assert 1 / interval_s == pytest.approx(view.replica.rate)
        assert view.ttft_s(interval_s) == pytest.approx(view.replica.ttft_s)
        assert view.tpot_s(interval_s) == pytest.approx(view.replica.tpot_s)


@pytest.mark.parametrize(
    ("share", "says"),
    [
        ((1.0, 0.25), "the prefill side limits, 75.0% of the decode side is unused"),
        ((0.25, 1.0), "the decode side limits, 75.0% of the prefill side is unused"),
        ((1.0, 1.0), "both sides are fully used"),
        ((0.5, 0.5), "neither side is fully used: the permitted pairs or the links between zones limit"),
    ],
)
def test_routes_say_which_side_limits(share: tuple[float, float], says: str) -> None:
    problem = test_check_roles.the_problem()
    plan = test_check_roles.sound(problem)
    flow = 1.0
    prefill, decode = (replace(plan.replicas[i], rate=flow / s) for i, s in zip((0, 2), share, strict=True))
    routes = (KvRoute(prefill=0, decode=1, rate=flow),)
    split = replace(plan, replicas=(prefill, decode), kv_routes=routes)
    sides, link = explain_plan(split, problem).kv_routes
    assert sides.endswith(f"1 go from one to the other: {says}.")
    assert link == (
        "From east to west go 1 prompts/s of 0.4 MiB of KV each, "
        f"{120 * 6 * 2 * 256 / 4e8:.0%} of what the link carries (0.4 GB/s)."
    )


def test_plan_without_roles_has_no_routes_to_explain() -> None:
    problem = the_problem()
    assert explain_plan(sound(problem), problem).kv_routes == ()


def test_shared_cards_show_each_stage_its_part_and_say_when_they_limit() -> None:
    problem, plan = test_check_roles.two_stages_sharing()
    explanation = explain_plan(plan, problem)
    workers = [bar for bar in explanation.memory if bar.role == "attention worker"]
    derived = Rederivation(problem).of(replica_shape(plan.replicas[0], problem, Fleet.of(problem.cluster)))
    both = derived.memory[-1]
    assert sum(bar.kv_bytes for bar in workers) + workers[0].reserve_bytes == pytest.approx(both.num_bytes, abs=3)
    kv_room = sum(bar.kv_bytes + bar.free_bytes for bar in workers)
    assert kv_room == pytest.approx(both.usable_bytes - workers[0].reserve_bytes, abs=3)
    for bar in workers:
        held = bar.reserve_bytes + bar.kv_bytes
        assert bar.unusable_bytes + held + bar.free_bytes == bar.nominal_bytes
    busy, plan = test_check_roles.with_slow_shared_cards()
    (sentence,) = explain_plan(plan, busy).bottlenecks
    assert "the attention workers that its stages share are always busy" in sentence
