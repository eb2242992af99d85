"""The value of equal stages, which every engine runs: other engines are never reported to reach less."""

from __future__ import annotations

import threading

import pytest

from hetis.planner.use_cases.engine_values import _by_equal_stages
from hetis.planner.use_cases.record.forms import EngineValue
from hetis.planner.use_cases.verification import equal_stages
from hetis.solver.budget import Budget, SearchSettings
from hetis.solver.constraints import Exclude, Selection, Unit, WithoutTp
from hetis.solver.engine_rules import EngineRules
from hetis.solver.errors import BrokenProofError
from hetis.solver.placement.families import run_by
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem
from tests.models import replace, shape_of
from tests.planner import plans
from tests.solver.instances import SMALL_FAMILY, make_model, make_node, make_problem

LIKE_VLLM = run_by(SMALL_FAMILY, EngineRules(name="vllm"))


@pytest.mark.parametrize(
    ("found", "equal", "told"),
    [(1.0, 1.5, (1.5, True)), (2.0, 1.5, (2.0, False)), (None, 1.5, (1.5, True)), (1.0, None, (1.0, False))],
)
def test_the_better_of_what_was_found_and_equal_stages_is_told(
    found: float | None, equal: float | None, told: tuple[float, bool]
) -> None:
    plan = replace(plans.plan(), inputs={"equal_stages_value": equal})
    known = EngineValue(engine="vllm", value=found, bound=None)
    problem = replace(make_problem([make_node("a", "A")]), family=LIKE_VLLM)
    value = _by_equal_stages(known, plan, problem, EngineRules(name="vllm-hetis"), 0, threading.Event())
    assert (value.value, value.equal_stages) == told


def test_equal_stages_say_nothing_of_an_engine_that_runs_fewer_stages() -> None:
    mla = shape_of(kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, q_lora_rank=32)
    indexer = shape_of(top_tokens=32, heads=2, head_dim=64, key_bytes=68.0, layers=1)  # vLLM: one stage
    model = replace(make_model(kv_heads=1), mla=mla, indexer=indexer)
    problem = replace(make_problem([make_node("a", "A")], model=model), family=LIKE_VLLM)
    known = EngineValue(engine="vllm", value=1.0, bound=None)
    plan = replace(plans.plan(), inputs={"equal_stages_value": 1.5})
    assert _by_equal_stages(known, plan, problem, EngineRules(name="sglang"), 0, threading.Event()) == known


def test_equal_stages_say_nothing_of_plans_without_unified_replicas() -> None:
    problem = replace(make_problem([make_node("a", "A")]), family=replace(LIKE_VLLM, roles=(Role.PREFILL, Role.DECODE)))
    known = EngineValue(engine="vllm", value=1.0, bound=None)
    plan = replace(plans.plan(), inputs={"equal_stages_value": 1.5})
    assert _by_equal_stages(known, plan, problem, EngineRules(name="vllm-hetis"), 0, threading.Event()) == known


@pytest.mark.parametrize(("cut_short", "told"), [(0, True), (1, True), (2, False)])
def test_a_search_that_is_cut_short_twice_says_nothing(
    monkeypatch: pytest.MonkeyPatch, cut_short: int, *, told: bool
) -> None:
    spent = list[Budget]()

    def equal_stages_value(_problem: object, settings: SearchSettings) -> float:
        if len(spent) < cut_short:
            spent.append(settings.budget)
        return 1.0

    monkeypatch.setattr("hetis.solver.placement.solve.equal_stages_value", equal_stages_value)
    monkeypatch.setattr(Budget, "is_spent", lambda self: any(self is one for one in spent))
    found = equal_stages.with_values(plans.plan(), make_problem([make_node("a", "A")]), 0, threading.Event())
    assert found.inputs.get("equal_stages_value") == (1.0 if told else None)
    assert found.inputs["simple_setups"]


def test_simple_setups_have_each_tp_size_that_fits_a_node_and_is_not_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    posed = list[PlacementProblem]()

    def equal_stages_value(problem: PlacementProblem, _settings: object) -> float:
        posed.append(problem)
        return max(problem.family.tp_sizes) / 10

    monkeypatch.setattr("hetis.solver.placement.solve.equal_stages_value", equal_stages_value)
    kept, forbidden = Exclude(gpus=Selection(unit=Unit.NODE, name="b-0")), WithoutTp(tp=2)
    problem = make_problem([make_node("a", "A", gpus=4), make_node("b", "B")])
    problem = replace(
        problem, constraints=(kept, forbidden), family=replace(problem.family, tp_sizes=(1, 2, 4, 8))
    )  # fmt: skip
    found = equal_stages.with_values(replace(plans.plan(), inputs={}), problem, 0, threading.Event())
    assert found.inputs == {"equal_stages_value": 0.8, "simple_setups": {"1": 0.1, "4": 0.4}}
    first, *of_sizes = posed
    assert first.constraints == (kept, forbidden)
    assert all(one.constraints == (kept,) for one in of_sizes), "a single size is no other than the forbidden one"


@pytest.mark.parametrize("value", [None, 1e6])
@pytest.mark.parametrize("roles", [(Role.UNIFIED,), (Role.PREFILL, Role.DECODE)])
def test_equal_stages_of_the_family_that_beat_its_bound_break_the_proof(
    monkeypatch: pytest.MonkeyPatch, value: float | None, roles: tuple[Role, ...]
) -> None:
    monkeypatch.setattr("hetis.solver.placement.solve.equal_stages_value", lambda *_: value)
    problem = make_problem([make_node("a", "A")])
    problem = replace(problem, family=replace(problem.family, roles=roles))
    if value is not None and Role.UNIFIED in roles:
        with pytest.raises(BrokenProofError):
            equal_stages.with_values(plans.plan(), problem, 0, threading.Event())
    else:
        found = equal_stages.with_values(plans.plan(), problem, 0, threading.Event())
        assert found.inputs["equal_stages_value"] == value
