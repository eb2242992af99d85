"""Every field of a placement request is an option, an argument and, where a planner offers it, part of a PlanSpec."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from typing import get_args, get_type_hints

import pytest

import hetis
from hetis.planner.cli.parameters.requests import CompareOptions, PlaceOptions, SearchOptions
from hetis.planner.convert.plan_specs import SAME, spec_from_request
from hetis.planner.convert.plans import objective_from_proto
from hetis.planner.export import ExportTarget
from hetis.planner.library.placing import CHECKED
from hetis.planner.use_cases import request
from hetis.planner.use_cases.record.forms import PLACES
from hetis.planner.use_cases.request import (
    FIELDS,
    LIMITS,
    ROUTERS,
    EngineName,
    Loss,
    PlacementRequest,
    RoleName,
    RungName,
    StatisticName,
    StrategyName,
    Target,
)
from hetis.planner.use_cases.service_level import Statistic
from hetis.solver.engine_rules import EngineRules
from hetis.solver.goals import GoalName
from hetis.solver.placement.families import ENGINES, STRATEGIES
from hetis.solver.placement.rungs import RUNGS
from hetis.solver.plan import ObjectiveKind, Role
from hetis.v1 import plan_pb2

INPUTS = {"cluster": "c.yaml", "model": "m", "workload": "w"}


def test_options_and_arguments_are_the_fields() -> None:
    given: dict[str, object] = dict.fromkeys(PlaceOptions.__dataclass_fields__)
    assert len(given) == len(FIELDS)
    assert PlaceOptions(**given) == PlacementRequest("", "", ""), "what is not given has its default"
    assert [*signature(hetis.place).parameters] == [*FIELDS, "progress"]
    assert CHECKED.keys() == {*FIELDS, "progress"}


def test_a_verb_with_some_of_the_fields_gets_a_whole_request() -> None:
    found = SearchOptions(time_limit=5.0, gap=None, seed=3)
    assert found == PlacementRequest("", "", "", time_limit=5.0, seed=3)
    assert CompareOptions(**INPUTS, profile=["p.yaml"]) == PlacementRequest(**INPUTS, profiles=["p.yaml"])


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (GoalName, ObjectiveKind), (RoleName, Role), (StatisticName, Statistic), (Loss, PLACES), (RungName, RUNGS),
        (Target, ExportTarget), (StrategyName, STRATEGIES), (EngineName, ENGINES),
    ],
)  # fmt: skip
def test_names_in_types_are_those_of_the_enumerations(names: object, known: object) -> None:
    assert [*get_args(names)] == [str(one) for one in known]  # type: ignore[attr-defined]


def test_every_target_has_a_router() -> None:
    assert {*get_args(Target)} > {*ROUTERS}


def test_fields_with_names_have_them_in_their_types() -> None:
    """So a type checker knows the names of `hetis.place` as the command line lists them."""
    values = dict.fromkeys(("Cluster", "ModelSpec", "Workload"), object)  # imported for type checkers alone
    hints = get_type_hints(PlacementRequest, vars(request) | values)
    literals = {
        "objective": GoalName, "roles": RoleName, "ttft_statistic": StatisticName, "tpot_statistic": StatisticName,
        "survive": Loss, "rung": RungName, "target": Target, "strategy": StrategyName, "engine": EngineName,
    }  # fmt: skip
    for name, literal in literals.items():
        assert set(get_args(literal)) <= set(_names_in(hints[name])), name


def _names_in(hint: object) -> Iterator[str]:
    for part in get_args(hint):
        yield from (part,) if isinstance(part, str) else _names_in(part)


def test_limits_are_fields_of_the_rules_of_engines() -> None:
    assert set(LIMITS) < set(EngineRules.__dataclass_fields__)


def test_a_spec_has_the_fields_that_it_shares_with_a_request() -> None:
    assert set(SAME) <= set(FIELDS) & set(plan_pb2.PlanSpec.DESCRIPTOR.fields_by_name)
    asked = PlacementRequest(
        **INPUTS, weights="fp8", engine="vllm", max_gpus=4, survive="node", ttft_statistic="p99", attainment="90%",
        gap="1%", roles=("decode", "prefill"), chunk_tokens=(512, 256), verify=False,
    )  # fmt: skip
    spec = spec_from_request(asked)
    assert [getattr(spec, name) or None for name in SAME] == [getattr(asked, name) or None for name in SAME]
    assert (spec.gap_target, spec.attainment, spec.skip_verification) == (0.01, 0.9, True)
    assert [*spec.chunk_tokens] == [256, 512]


@pytest.mark.parametrize(
    "given",
    [
        {}, {"objective": "throughput"}, {"objective": "cost", "rate": 2.0, "ttft": "500ms", "tpot": None},
        {"ttft": "none", "tpot": 0.2},
    ],
)  # fmt: skip
def test_a_spec_means_the_goal_of_its_request(given: dict[str, object]) -> None:
    request = PlacementRequest(**INPUTS, **given)  # type: ignore[arg-type]

    def wrong(path: str, words: str) -> None:
        raise AssertionError(f"{path} {words}")

    assert objective_from_proto(spec_from_request(request).objective, "objective", wrong) == request.goal
