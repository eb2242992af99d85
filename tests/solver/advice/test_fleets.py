"""Fleets with nodes added or taken away: names stay, links that lead nowhere go, mistakes are named."""

from __future__ import annotations

import pytest

from hetis.solver.advice.fleets import Addition, NodeShape, usd_per_hour_of, with_added, without
from hetis.solver.cluster import Cluster, Link, Network
from hetis.solver.errors import InvalidProblemError
from tests.solver.instances import make_gpu, make_node, make_problem

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
    grown = with_added(FLEET, [Addition(gpu=make_gpu("C"), count=10, usd_per_hour=3.0)], shape)
    added = grown.node_groups[len(FLEET.node_groups) :]
    assert [(g.count, g.gpus[0].count, g.zone, g.nic) for g in added] == [(2, 4, "west", LINK), (1, 2, "west", LINK)]
    assert grown.num_gpus() == FLEET.num_gpus() + 10
    assert len(names(grown)) == grown.num_gpus()
    assert usd_per_hour_of(grown) == usd_per_hour_of(FLEET) + 30.0 == 12.5 + 30.0  # type: ignore[operator]


def test_added_nodes_take_no_name_that_is_there() -> None:
    shape = NodeShape(gpus_per_node=1, zone="east")
    once = with_added(FLEET, [Addition(gpu=make_gpu("A", usd_per_hour=2.0), count=2)], shape)
    twice = with_added(once, [Addition(gpu=make_gpu("A", usd_per_hour=2.0), count=2)], shape)
    assert len(names(twice)) == twice.num_gpus()


def test_a_type_of_the_same_name_and_other_numbers_is_refused() -> None:
    from dataclasses import replace

    other = replace(make_gpu("A"), memory_bytes=1)
    with pytest.raises(InvalidProblemError, match="other numbers"):
        with_added(FLEET, [Addition(gpu=other, count=1)], NodeShape(zone="east"))
