"""The transition from running replicas to a plan: which replicas continue, start and drain, and in which order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hetis.planner.fleet.replica import devices_of
from hetis.planner.resources.plan_activation import match_replicas, plan_transition
from hetis.v1 import plan_service_pb2, replica_pb2
from tests.planner.fleet.samples import CLUSTER, shape

KEEP = plan_service_pb2.TRANSITION_KIND_KEEP
START = plan_service_pb2.TRANSITION_KIND_START
DRAIN = plan_service_pb2.TRANSITION_KIND_DRAIN


def _one(device: str, rate: float = 1.0) -> replica_pb2.ReplicaPlan:
    return shape([device], [], rate)


def _steps(
    running: dict[str, replica_pb2.ReplicaPlan], plan: list[replica_pb2.ReplicaPlan], **options: object
) -> list[tuple[int, int, str]]:
    matching = match_replicas(running, plan, cluster=CLUSTER, plan="plans/next", **options)  # type: ignore[arg-type]
    steps = plan_transition(running, plan, matching, lambda one: 7 * len(devices_of(one)))
    assert all(step.load_bytes == (7 * len(step.devices) if step.kind == START else 0) for step in steps)
    return [(step.wave, step.kind, step.replica.rpartition("/")[2]) for step in steps]


def test_replicas_start_beside_those_that_leave_and_then_in_their_place() -> None:
    running = {f"{CLUSTER}/replicas/old-{i}": _one(f"n/{i}") for i in range(3)}
    plan = [_one("n/0", rate=9.0), shape(["n/1"], ["m/0"]), _one("m/1")]
    assert _steps(running, plan) == [
        (1, KEEP, "old-0"),
        (1, START, "next-2"),
        (2, DRAIN, "old-1"),
        (2, DRAIN, "old-2"),
        (3, START, "next-1"),
    ]


def test_another_model_on_the_same_gpus_is_another_replica() -> None:
    running = {f"{CLUSTER}/replicas/old-0": _one("n/0")}
    assert _steps(running, [_one("n/0")], runs_same_model=lambda name: False) == [
        (2, DRAIN, "old-0"),
        (3, START, "next-0"),
    ]


def test_names_that_are_taken_are_not_given_again() -> None:
    taken = [f"{CLUSTER}/replicas/next-0", f"{CLUSTER}/replicas/next-0-2"]
    assert _steps({}, [_one("n/0")], taken=taken) == [(1, START, "next-0-3")]


@given(st.lists(st.integers(0, 5), unique=True), st.lists(st.integers(0, 5), unique=True))
def test_every_replica_is_in_one_step_and_the_same_plan_changes_nothing(now: list[int], then: list[int]) -> None:
    running = {f"{CLUSTER}/replicas/old-{i}": _one(f"n/{i}") for i in now}
    plan = [_one(f"n/{i}") for i in then]
    matching = match_replicas(running, plan, cluster=CLUSTER, plan="plans/next")
    assert len(set(matching.names)) == len(plan)
    assert {*matching.kept, *matching.leaving} == set(running)
    after = dict(zip(matching.names, plan, strict=True))
    assert all(kind == KEEP for _, kind, _ in _steps(after, plan))


def test_a_replica_that_was_started_before_there_were_roles_is_unified() -> None:
    running = {f"{CLUSTER}/replicas/old-0": _one("n/0")}
    unified = _one("n/0")
    unified.role = replica_pb2.REPLICA_ROLE_UNIFIED
    assert _steps(running, [unified]) == [(1, KEEP, "old-0")]


def test_a_replica_that_changes_its_role_starts_anew() -> None:
    running = {f"{CLUSTER}/replicas/old-0": _one("n/0")}
    decode = _one("n/0")
    decode.role = replica_pb2.REPLICA_ROLE_DECODE
    assert _steps(running, [decode]) == [(2, DRAIN, "old-0"), (3, START, "next-0")]


def test_cards_that_several_stages_share_are_one_device_each() -> None:
    one = shape(["n/0"], ["m/0", "m/1"])
    one.attention_workers.add(stage=1, devices=["m/0", "m/1"], shared=True)
    assert devices_of(one) == ["n/0", "m/0", "m/1"]
