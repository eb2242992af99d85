"""The record of a plan: what its parts write is what they read, and what they cannot read stays."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest

from hetis.formats.documents import from_data, to_data
from hetis.formats.errors import DocumentError
from hetis.planner.use_cases.record.forms import Searched, Verification
from hetis.planner.use_cases.record.parts import (
    EqualStages,
    Losses,
    MadeFrom,
    Part,
    Requested,
    Rungs,
    Verified,
)
from hetis.planner.use_cases.service_level import ServiceLevel
from hetis.solver.advice import Loss
from hetis.solver.engine_rules import EngineRules, EngineSettings
from hetis.solver.plan import Plan, Role
from tests.planner import plans

VERIFICATION = Verification(
    rate_rps=1.0, num_requests=10, kept=True, steady=None, ttft_p95_s=0.5, tpot_mean_s=0.05, attainment=0.9,
    kept_rps=1.1, share=0.5,
)  # fmt: skip
PARTS: list[Part] = [
    MadeFrom(versions={"hetis": "1"}, origins={"model": "m"}, digests={"cluster": "d"}),
    Requested(
        roles=(Role.PREFILL, Role.DECODE), engine=EngineRules(name="vllm", max_gpus=4),
        engine_settings=EngineSettings(chunk_tokens=(256, 512)), constraints=("pin node=a:use=1",), seed=0,
        gap_target=0.01, time_limit_s=60.0, simplest_within=0.1, survive="node",
        service_level=ServiceLevel(attainment=0.9), of_objective={"demand_rps": 2.0},
    ),
    EqualStages(best=Searched(None), by_size={"1": 0.5, "2": None}),
    EqualStages(best=Searched(1.5)),
    Verified(verification=VERIFICATION, model_value=2.0),
    Verified(verification=replace(VERIFICATION, router="weighted")),
    Losses(by_place={"node": Loss(name="a", rate=1.0, whole=2.0)}),
]  # fmt: skip


def bare(**inputs: object) -> Plan:
    return replace(plans.plan(), inputs=inputs)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_read_from_a_plan_file_as_it_was_written(part: Part) -> None:
    data = json.loads(json.dumps(to_data(part.on(bare()))))
    found = from_data(data)
    assert isinstance(found, Plan)
    assert type(part).of(found) == type(part).checked(found) == part


@pytest.mark.parametrize("part", PARTS)
def test_a_part_replaces_only_an_earlier_one(part: Part) -> None:
    of_others = {"of another version": 1}
    assert part.on(bare(**of_others)).inputs.items() > of_others.items()
    assert type(part)().on(part.on(bare(**of_others))).inputs == of_others


@pytest.mark.parametrize("kind", dict.fromkeys(map(type, PARTS)))
def test_what_is_unreadable_has_its_default_and_stays_in_the_plan(kind: type[Part]) -> None:
    names = {name for part in PARTS if type(part) is kind for name in part.on(bare()).inputs}
    strange = bare(**dict.fromkeys(names, object()))
    assert all(value == getattr(kind(), name) for name, value in vars_of(kind.of(strange)).items() if name != "digests")
    assert strange.inputs.keys() == names


RUNG = {"name": "node", "value": 1.0, "rate_rps": 1.0, "gpus": 1, "left_rps": 0.0}
LOSS = {"name": "zz", "rate": 1, "whole": 2.0}
LEVEL = {"ttft": "p95", "tpot": "mean", "attainment": 0.9}


@pytest.mark.parametrize(
    ("kind", "name", "good", "changes"),
    [
        (Verified, "verification", asdict(VERIFICATION), [
            {"kept_rps": "x"}, {"attainment": 1e308}, {"attainment": math.nan}, {"rate_rps": None},
            *({"share": share} for share in (0.0, -0.5, 1.5, math.nan, "1/8")),
        ]),
        (Requested, "service_level", LEVEL, [
            {"ttft": "p1"}, {"tpot": ["mean"]}, {"more": 1},
            *({"attainment": share} for share in (0.0, 1.01, 1e308, math.nan, math.inf, 10**400, "x", [0.9])),
        ]),
        (Rungs, "rungs", RUNG, [{"value": None}, {"gpus": 1.5}, {"targets": [1]}, {"name": 3}]),
        (Losses, "losses", LOSS, [{"rate": "x"}, {"whole": 0}, {"name": None}]),
    ],
)  # fmt: skip
def test_what_is_in_another_form_is_left_out(
    kind: type[Part], name: str, good: dict[str, object], changes: list[dict[str, object]]
) -> None:
    """Rows of a list or by place do not keep the others from being shown."""
    are_rows = kind is Rungs

    def read(entry: object) -> Part:
        written = [entry, good, 5] if are_rows else {"node": entry, "zone": good} if kind is Losses else entry
        return kind.of(bare(**{name: written}))

    whole, alone = read(good), read(None)
    assert whole != alone
    for change in changes:
        assert read({**good, **change}) == alone, change
    assert read({}) == read(3) == alone


def vars_of(part: Part) -> dict[str, object]:
    return {name: getattr(part, name) for name in part.__dataclass_fields__}  # type: ignore[attr-defined]


def test_every_unreadable_entry_is_an_error_where_a_plan_is_checked_against_it() -> None:
    wrong = bare(roles=["writer"], engine={"name": "vllm", "max_stages": "two"})
    with pytest.raises(DocumentError) as caught:
        Requested.checked(wrong, "plan.json")
    assert [str(one) for one in caught.value.problems] == [
        "plan.json: inputs.roles must be a list of unified, prefill, decode: the plan is checked against them",
        "plan.json: inputs.engine.max_stages is 'two', must be a whole number",
    ]


def test_constraints_under_their_earlier_name_are_read_and_replaced() -> None:
    old = bare(will=["forbid workers"])
    assert Requested.of(old).constraints == ("forbid workers",)
    assert Requested(constraints=("forbid tp=8",)).on(old).inputs == {"constraints": ["forbid tp=8"]}
