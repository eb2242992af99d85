"""Leases, which define whether nodes are present."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.fleet.agents.leases import Leases
from hetis.v1 import cluster_pb2

EXPECTED = cluster_pb2.NODE_STATE_EXPECTED
READY = cluster_pb2.NODE_STATE_READY
SUSPECT = cluster_pb2.NODE_STATE_SUSPECT
LOST = cluster_pb2.NODE_STATE_LOST
UNDECLARED = cluster_pb2.NODE_STATE_UNDECLARED


def leases() -> Leases:
    found = Leases(suspect_s=2.0, lease_s=5.0)
    found.declare(["a"], now_s=0.0)
    return found


def test_a_silent_node_is_first_suspect_then_lost_and_ready_when_it_is_heard() -> None:
    found = leases()
    assert found.state("a") == EXPECTED
    assert found.connect("a", now_s=1.0)
    assert found.state("a") == READY
    assert found.expire(2.9) == []
    assert found.expire(3.0) == ["a"]
    assert found.state("a") == SUSPECT
    assert found.expire(6.0) == ["a"]
    assert found.state("a") == LOST
    assert found.renew("a", now_s=7.0)
    assert found.state("a") == READY


def test_a_node_whose_stream_broke_is_suspect_at_once_and_keeps_its_lease() -> None:
    found = leases()
    found.connect("a", now_s=0.0)
    found.renew("a", now_s=4.0)
    assert found.disconnect("a")
    assert found.state("a") == SUSPECT
    assert found.expire(8.9) == []
    assert found.expire(9.0) == ["a"]
    assert found.state("a") == LOST


def test_a_node_that_was_never_connected_is_not_lost() -> None:
    found = leases()
    assert found.expire(1e9) == []
    assert found.state("a") == EXPECTED


def test_after_a_restart_known_nodes_have_a_lease_to_come_back() -> None:
    found = Leases(suspect_s=2.0, lease_s=5.0)
    found.declare(["a", "b"], now_s=100.0, known=["a"])
    assert (found.state("a"), found.state("b")) == (SUSPECT, EXPECTED)
    assert found.expire(104.0) == []
    assert found.expire(105.0) == ["a"]
    assert (found.state("a"), found.state("b")) == (LOST, EXPECTED)


def test_a_node_that_no_document_names_is_undeclared_until_one_does() -> None:
    found = leases()
    found.connect("x", now_s=0.0)
    assert found.state("x") == UNDECLARED
    found.declare(["a", "x"], now_s=1.0)
    assert found.state("x") == READY
    found.declare(["a"], now_s=1.0)
    assert found.state("x") == UNDECLARED
    assert found.expire(1e9) == []  # its silence does not matter, only its stream
    assert found.state("x") == UNDECLARED
    found.disconnect("x")
    assert "x" not in found


def test_a_node_that_leaves_the_document_is_lost_when_its_lease_expires() -> None:
    found = leases()
    found.connect("a", now_s=0.0)
    found.disconnect("a")
    assert found.declare([], now_s=1.0) == ["a"]
    assert ("a" in found, found.nodes, found.num_undeclared, found.state("a")) == (False, [], 0, SUSPECT)
    assert found.expire(4.9) == []
    assert found.expire(5.0) == ["a"]
    assert found.state("a") == LOST
    found.declare(["a"], now_s=6.0)
    assert ("a" in found, found.state("a")) == (True, LOST), "declared again, it is not there yet"
    found.declare([], now_s=7.0)
    found.connect("a", now_s=8.0)
    assert (found.num_undeclared, found.state("a")) == (1, UNDECLARED)
    found.disconnect("a")
    found.forget("a")
    assert found.state("a") == cluster_pb2.NODE_STATE_UNSPECIFIED
    found.declare(["b"], now_s=9.0)
    found.declare([], now_s=9.0)
    assert found.state("b") == cluster_pb2.NODE_STATE_UNSPECIFIED, "it was never connected"


def test_a_known_node_that_no_document_names_has_a_lease_to_come_back_after_a_restart() -> None:
    found = Leases(suspect_s=2.0, lease_s=5.0)
    found.declare(["b"], now_s=100.0, known=["a"])
    assert ("a" in found, found.state("a")) == (False, SUSPECT)
    assert found.expire(105.0) == ["a"]
    assert found.state("a") == LOST


@given(
    st.lists(st.tuples(st.sampled_from(["connect", "disconnect", "declare", "omit", "forget"]), st.sampled_from("ab")))
)
def test_nodes_are_counted_as_declared_and_connected(steps: list[tuple[str, str]]) -> None:
    found, declared, connected = Leases(suspect_s=2.0, lease_s=5.0), set[str](), set[str]()
    for now_s, (step, node) in enumerate(steps):
        if step in ("declare", "omit"):
            declared = declared | {node} if step == "declare" else declared - {node}
            found.declare(declared, now_s=now_s)
        elif step == "forget":
            found.forget(node)
        else:
            getattr(found, step)(node, **({"now_s": now_s} if step == "connect" else {}))
            connected = connected | {node} if step == "connect" else connected - {node}
        found.expire(now_s)
        assert set(found.nodes) == declared | connected
        assert {name for name in "ab" if name in found} == declared | connected
        assert (found.num_connected, found.num_undeclared) == (len(connected), len(connected - declared))


@given(st.lists(st.tuples(st.sampled_from(["connect", "disconnect", "hear"]), st.floats(0.1, 4.0)), max_size=30))
def test_the_state_is_that_of_a_plain_look_at_the_clock(steps: list[tuple[str, float]]) -> None:
    found, now_s, heard_s, connected = leases(), 0.0, -1.0, False
    for step, seconds in steps:
        now_s += seconds
        if step == "connect":
            found.connect("a", now_s=now_s)
            heard_s, connected = now_s, True
        elif step == "disconnect":
            found.disconnect("a")
            connected = False
        else:
            found.renew("a", now_s=now_s)
            heard_s = now_s if connected else heard_s
        found.expire(now_s)
        silent_s = now_s - heard_s
        if heard_s < 0:
            expected = EXPECTED
        elif silent_s >= 5.0:
            expected = LOST
        else:
            expected = READY if connected and silent_s < 2.0 else SUSPECT
        assert found.state("a") == expected
