"""Two proofs bound a difference by an interval that contains the true one; changed fleets keep their names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetis.solver.advice import (
    Addition,
    Change,
    ChangeVerdict,
    NodeShape,
    Proven,
    difference,
    with_added,
    without,
)
from hetis.solver.cluster import Cluster, Link, Network
from hetis.solver.errors import BrokenProofError, InvalidProblemError
from tests.solver.instances import make_gpu, make_node, make_problem

numbers = st.floats(0.1, 100.0)
gaps = st.floats(0.0, 0.2)
INFINITE = float("inf")


@given(numbers, numbers, gaps, gaps, gaps, gaps, st.booleans(), st.sampled_from(Change))
def test_the_true_difference_lies_in_the_interval(
    one: float, two: float, a: float, b: float, c: float, d: float, maximises: bool, change: Change
) -> None:
    best0, best1 = one, two
    if change is not Change.OTHER:  # growth never makes the best plan worse, by either objective
        best0, best1 = sorted((one, two), reverse=(change is Change.GROWN) is not maximises)
    sides = []
    for best, short, long in ((best0, a, b), (best1, c, d)):
        low, high = best * (1 - short), best * (1 + long)
        sides.append(Proven(value=low if maximises else high, bound=high if maximises else low))
    found = difference(*sides, maximises=maximises, change=change)
    true, slack = best1 - best0, 1e-9 * (best0 + best1)
    assert found.low - slack <= true <= found.high + slack
    if found.verdict is ChangeVerdict.BETTER:
        assert true > 0 if maximises else true < 0
    if found.verdict is ChangeVerdict.WORSE:
        assert true < 0 if maximises else true > 0


def test_a_difference_smaller_than_the_gaps_is_undecided() -> None:
    before, after = Proven(value=10.0, bound=10.3), Proven(value=10.1, bound=10.4)
    assert difference(before, after, maximises=True, change=Change.OTHER).verdict is ChangeVerdict.UNDECIDED
    grown = difference(before, after, maximises=True, change=Change.GROWN)
    assert grown.verdict is ChangeVerdict.UNDECIDED
    assert grown.low == 0.0  # more GPUs never lower the value


def test_a_side_without_a_bound_leaves_its_end_open() -> None:
    found = difference(
        Proven(value=1.0, bound=1.0), Proven(value=0.0, bound=float("inf")), maximises=True, change=Change.OTHER
    )
    assert (found.low, found.high, found.verdict) == (-1.0, float("inf"), ChangeVerdict.UNDECIDED)


@pytest.mark.parametrize("maximises", [True, False])
@pytest.mark.parametrize("change", Change)
def test_two_fleets_proven_to_have_no_plan_are_the_same(maximises: bool, change: Change) -> None:
    nothing = 0.0 if maximises else INFINITE
    found = difference(*2 * [Proven(value=nothing, bound=nothing)], maximises=maximises, change=change)
    assert (found.low, found.high, found.found, found.verdict) == (0.0, 0.0, None, ChangeVerdict.SAME)
    assert found.no_plan_before
    assert found.no_plan_after


def test_a_cost_is_better_than_proof_that_there_is_no_plan() -> None:
    none, some = Proven(value=INFINITE, bound=INFINITE), Proven(value=5.0, bound=4.0)
    lost = difference(some, none, maximises=False, change=Change.OTHER)
    assert (lost.low, lost.found, lost.verdict) == (INFINITE, None, ChangeVerdict.WORSE)
    assert (lost.no_plan_before, lost.no_plan_after) == (False, True)
    won = difference(none, some, maximises=False, change=Change.OTHER)
    assert (won.high, won.found, won.verdict) == (-INFINITE, None, ChangeVerdict.BETTER)
    assert (won.no_plan_before, won.no_plan_after) == (True, False)


def test_a_side_without_a_known_plan_is_not_one_that_has_none() -> None:
    none, unknown = Proven(value=INFINITE, bound=INFINITE), Proven(value=INFINITE, bound=0.0)
    found = difference(unknown, none, maximises=False, change=Change.OTHER)
    assert (found.low, found.high, found.verdict) == (-INFINITE, INFINITE, ChangeVerdict.UNDECIDED)
    assert (found.no_plan_before, found.no_plan_after) == (False, True)
    grown = difference(unknown, none, maximises=False, change=Change.GROWN)
    assert grown.verdict is ChangeVerdict.SAME, "the smaller fleet has no plan either"
    assert grown.no_plan_before


def test_proofs_that_contradict_each_other_are_refused() -> None:
    before, after = Proven(value=0.35, bound=0.36), Proven(value=1.65, bound=1.65)
    with pytest.raises(BrokenProofError, match=r"is at least 1\.29 and at most -1\.29, which contradict"):
        difference(before, after, maximises=True, change=Change.SHRUNK)
    rounded = Proven(value=0.36 * (1 + 1e-9), bound=0.36)
    found = difference(before, rounded, maximises=True, change=Change.SHRUNK)
    assert found.low <= found.high


LINK = Link(bytes_per_s=1e9, latency_s=1e-5)
FLEET = make_problem(
    [make_node("a", "A", gpus=2, nodes=3, zone="east"), make_node("b", "B", gpus=1, zone="west")],
    network=Network(
        default=LINK, between_zones={("east", "west"): LINK}, between_nodes={("a-0", "b"): LINK, ("a-0", "a-1"): LINK}
    ),
    usd_per_hour={"A": 2.0, "B": 0.5},
).cluster


def names(cluster: Cluster) -> set[str]:
    return {device.name for device in cluster.devices()}


def test_nodes_that_stay_keep_their_names() -> None:
    assert names(without(FLEET, ["a-1"])) == {"a-0/0", "a-0/1", "a-2/0", "a-2/1", "b/0"}
    assert names(without(FLEET, ["a-2"])) == {"a-0/0", "a-0/1", "a-1/0", "a-1/1", "b/0"}
    assert names(without(FLEET, ["a"])) == {"b/0"}


def test_links_to_what_has_gone_go_too() -> None:
    left = without(FLEET, ["b"]).network
    assert not left.between_zones
    assert list(left.between_nodes) == [("a-0", "a-1")]


def test_every_unknown_node_is_named() -> None:
    with pytest.raises(InvalidProblemError, match="has no node a-7, c"):
        without(FLEET, ["c", "a-7", "b"])
    with pytest.raises(InvalidProblemError, match="no node left"):
        without(FLEET, ["a", "b"])


def test_gpus_join_in_nodes_of_the_size_that_is_asked_for() -> None:
    shape = NodeShape(gpus_per_node=4, zone="west", nic=LINK)
    grown = with_added(FLEET, [Addition(gpu=make_gpu("C"), count=10)], shape)
    added = grown.node_groups[len(FLEET.node_groups) :]
    assert [(g.count, g.gpus[0].count, g.zone, g.nic) for g in added] == [(2, 4, "west", LINK), (1, 2, "west", LINK)]
    assert grown.num_gpus() == FLEET.num_gpus() + 10
    assert len(names(grown)) == grown.num_gpus()


def test_added_nodes_take_no_name_that_is_there() -> None:
    shape = NodeShape(gpus_per_node=1, zone="east")
    once = with_added(FLEET, [Addition(gpu=make_gpu("A", usd_per_hour=2.0), count=2)], shape)
    twice = with_added(once, [Addition(gpu=make_gpu("A", usd_per_hour=2.0), count=2)], shape)
    assert len(names(twice)) == twice.num_gpus()


@pytest.mark.parametrize("counts", [(7,), (6, 2), (6, 6), (5, 5)])
def test_the_node_with_the_rest_has_no_name_of_a_full_one(counts: tuple[int, ...]) -> None:
    additions = [Addition(gpu=make_gpu("C"), count=count) for count in counts]
    grown = with_added(FLEET, additions, NodeShape(gpus_per_node=2, zone="east"))
    assert len(names(grown)) == grown.num_gpus() == FLEET.num_gpus() + sum(counts)


def test_a_type_of_the_same_name_and_other_numbers_is_refused() -> None:
    from dataclasses import replace

    other = replace(make_gpu("A"), memory_bytes=1)
    with pytest.raises(InvalidProblemError, match="differs in its numbers"):
        with_added(FLEET, [Addition(gpu=other, count=1)], NodeShape(zone="east"))
