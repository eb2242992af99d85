"""Constraints survive a round trip, and are refused with a list of all errors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hetis.formats.constraints import constraints_from_texts, parse_forbid, parse_pin, read_constraints
from hetis.formats.errors import DocumentError
from hetis.solver.constraints import (
    AtMost,
    Constraint,
    Duty,
    Exclude,
    Replicas,
    RestrictRole,
    Selection,
    Sum,
    Unit,
    Use,
    WithoutSharedExperts,
    WithoutTp,
    WithoutWorkers,
)
from tests.solver.instances import make_node, make_problem

CLUSTER = make_problem([make_node("a", "A", nodes=2, gpus=2), make_node("b", "B", zone="west")]).cluster


def of(unit: Unit, name: str) -> Selection:
    return Selection(unit=unit, name=name)


@pytest.mark.parametrize(
    ("text", "constraint"),
    [
        ("gpu=a-0/1", Exclude(gpus=of(Unit.GPU, "a-0/1"))),
        ("node=a-1", Exclude(gpus=of(Unit.NODE, "a-1"))),
        ("zone=west", Exclude(gpus=of(Unit.ZONE, "west"))),
        ("type=A:as=worker", RestrictRole(gpus=of(Unit.TYPE, "A"), duty=Duty.WORKER, only=False)),
        ("tp=4", WithoutTp(tp=4)),
        ("workers", WithoutWorkers()),
        ("shared-experts", WithoutSharedExperts()),
    ],
)
def test_what_is_forbidden(text: str, constraint: Constraint) -> None:
    assert parse_forbid(text) == (constraint,)
    assert str(constraint) == f"--forbid {text}"


@pytest.mark.parametrize(
    ("text", "constraints"),
    [
        ("node=a-0", (Use(gpus=of(Unit.NODE, "a-0"), least=1),)),
        ("type=A:use=3", (Use(gpus=of(Unit.TYPE, "A"), least=3),)),
        ("zone=west:as=decode", (RestrictRole(gpus=of(Unit.ZONE, "west"), duty=Duty.DECODE, only=True),)),
        (
            "type=A:as=worker:use=2",
            (RestrictRole(gpus=of(Unit.TYPE, "A"), duty=Duty.WORKER, only=True), Use(gpus=of(Unit.TYPE, "A"), least=2)),
        ),
        ("replicas=2", (Replicas(least=2, most=2),)),
        ("replicas=2..5", (Replicas(least=2, most=5),)),
        ("replicas=2..", (Replicas(least=2, most=None),)),
        ("replicas=..5", (Replicas(least=0, most=5),)),
        ("usd=..2.5", (AtMost(of=Sum.USD, most=2.5),)),
        ("gpus=..12", (AtMost(of=Sum.GPUS, most=12.0),)),
    ],
)
def test_what_is_pinned(text: str, constraints: tuple[Constraint, ...]) -> None:
    assert parse_pin(text) == constraints
    assert constraints_from_texts(map(str, constraints), CLUSTER) == constraints


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(DocumentError) as caught:
        read_constraints(
            [
                "nod=a-0",
                "type=A:use=0",
                "type=A:as=wrker",
                "replicas=5..2",
                "replicas=x",
                "type=A:use=9",
                "gpu=a-0/0",
                "usd=5",
            ],
            ["type=C", "tp=3", "tp=x", "type=A:use=2", "node=a-5", "rubbish"],
            CLUSTER,
        )
    assert [str(problem) for problem in caught.value.problems] == [
        "--forbid tp=x: tp is 'x', must be a whole number without other parts",
        "--forbid type=A:use=2: 'use=2' after type=A is not as=..., each once",
        "--forbid rubbish: must be written NAME=VALUE, such as node=a100-0, type=L4",
        "--pin nod=a-0: 'nod' is not one of node, type, zone, replicas, usd, gpus, did you mean node?",
        "--pin type=A:use=0: use is '0', must be a whole number above 0",
        "--pin type=A:as=wrker: as is 'wrker', must be one of primary, worker, unified, prefill, decode, "
        "did you mean worker?",
        "--pin replicas=x: replicas is 'x', must be N, N..M, N.. or ..M",
        "--pin gpu=a-0/0: 'gpu' is not one of node, type, zone, replicas, usd, gpus, did you mean gpus?",
        "--pin usd=5: usd is '5', must be ..N with N above 0",
        "--forbid type=C: tiny has no type C",
        "--forbid tp=3: TP sizes are 1, 2, 4, 8",
        "--forbid node=a-5: tiny has no node a-5, did you mean a-1?",
        "--pin replicas=5..2: the maximum is below the minimum, or below 1",
        "--pin type=A:use=9: tiny has 4 of these GPUs",
    ]


@pytest.mark.parametrize("text", ["gpu=a", "node=A", "zone=a"])
def test_the_name_of_another_unit_is_told(text: str) -> None:
    unit, _, name = text.partition("=")
    with pytest.raises(DocumentError) as caught:
        read_constraints([], [text], CLUSTER)
    said = f"tiny has no {'GPU' if unit == 'gpu' else unit} {name}, did you mean type=A?"
    assert [problem.message for problem in caught.value.problems] == [said]


def test_a_constraint_that_is_said_twice_is_one() -> None:
    assert read_constraints(["replicas=2", "replicas=2..2"], [], CLUSTER) == (Replicas(least=2, most=2),)


def test_the_only_node_of_a_counted_group_has_two_names() -> None:
    counted = replace(make_node("n0", "A", gpus=2), numbered=True)
    cluster = make_problem([counted, make_node("n1", "B")]).cluster
    node, gpu = of(Unit.NODE, "n0-0"), of(Unit.GPU, "n0-0/1")
    constraints = read_constraints(["node=n0", "node=n0-0:as=worker"], ["gpu=n0/1", "node=n0:as=prefill"], cluster)
    assert constraints == (
        Exclude(gpus=gpu),
        RestrictRole(gpus=node, duty=Duty.PREFILL, only=False),
        Use(gpus=node, least=1),
        RestrictRole(gpus=node, duty=Duty.WORKER, only=True),
    )
    assert constraints_from_texts(map(str, constraints), cluster) == constraints
    with pytest.raises(DocumentError, match="has no node a"):  # the name is ambiguous
        read_constraints(["node=a"], [], CLUSTER)


def test_a_name_that_a_node_has_means_that_node() -> None:
    pair, confusing = make_node("a", "A", nodes=2), replace(make_node("a-0", "B"), numbered=True)
    cluster = make_problem([pair, confusing]).cluster
    assert read_constraints(["node=a-0"], [], cluster) == (Use(gpus=of(Unit.NODE, "a-0"), least=1),)


def test_a_plan_with_a_constraint_that_is_none_is_refused() -> None:
    with pytest.raises(DocumentError, match="please: is not a constraint, must begin with --pin or --forbid"):
        constraints_from_texts(["please"], CLUSTER)
