"""Rungs: the best plan of each is on it and proved, and a higher rung loses nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.solver.check import check_plan
from hetis.solver.engine_rules import EngineRules, Family
from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.placement.families import run_by
from hetis.solver.placement.rungs import RUNGS, lowest_rung, rungs_of
from hetis.solver.plan import ObjectiveKind, Role, Status
from hetis.solver.problem import PlacementProblem
from tests.solver.instances import problems
from tests.solver.searching import plan_or_none

SIZES = Family(max_pool=2, tp_sizes=(1, 2), micro_batches=(1, 4), chunk_tokens=(64,))
FAMILY = run_by(SIZES, EngineRules(name="vllm-hetis", max_stages=3, max_pooled_stages=2))
PLAIN = run_by(SIZES, EngineRules(name="vllm", max_stages=3))


@settings(max_examples=max(6, settings().max_examples // 5))
@given(problem=problems(kinds=(ObjectiveKind.GOODPUT, ObjectiveKind.THROUGHPUT), max_gpus=4), data=st.data())
def test_each_rung_has_its_own_best_plan(problem: PlacementProblem, data: st.DataObject) -> None:
    family = data.draw(st.sampled_from((FAMILY, PLAIN)))
    below, order = 0.0, list(RUNGS)
    for name, restricted in rungs_of(family).items():
        posed = replace(problem, family=restricted)
        try:
            plan = plan_or_none(posed, "hetis", gap_target=0.0)
        except NoPlanFoundError:  # each replica fits on one node, but not all do: neither a plan nor a proof
            assert name == "node"
            continue
        if plan is None:
            assert below == 0.0
            continue
        assert check_plan(plan, posed) == ()
        of_all = replace(problem, family=family)  # whose plan it is, too, but for the words
        assert check_plan(replace(plan, family=of_all.describe_family()), of_all) == ()
        assert order.index(lowest_rung(plan.replicas).name) <= order.index(name)
        assert name == "node" or plan.result.status is Status.OPTIMAL
        assert below <= plan.result.bound * (1 + 1e-6)
        below = plan.result.value
    whole = plan_or_none(replace(problem, family=family), "hetis", gap_target=0.0)
    assert below == pytest.approx(0.0 if whole is None else whole.result.value, rel=1e-6)  # the last rung has it all


def test_a_rung_keeps_what_the_family_forbids() -> None:
    strict = replace(FAMILY, max_pool=1, engine=EngineRules(name="vllm-hetis", max_stages=3, max_nodes=1))
    assert RUNGS["workers"].restrict(strict) == strict
    assert RUNGS["node"].restrict(strict) == replace(strict, max_pool=0, roles=(Role.UNIFIED,))
    assert list(rungs_of(strict)) == ["node", "apart", "workers"]  # no replica may lie on several nodes


@pytest.mark.parametrize(
    ("strategy", "family", "names"),
    [
        ("hetis", FAMILY, ["node", "pipelines", "apart", "workers"]),
        ("hetis", PLAIN, ["node", "pipelines", "apart"]),
        ("uniform", FAMILY, ["node", "pipelines"]),
        ("hexgen", FAMILY, ["node", "pipelines"]),
        ("hexgen2", FAMILY, ["apart"]),
    ],
)
def test_rungs_that_add_no_replica_are_left_out(strategy: str, family: Family, names: list[str]) -> None:
    assert list(rungs_of(family, strategy)) == names


def test_what_has_no_rung_says_so() -> None:
    with pytest.raises(
        InvalidProblemError, match="strategy hexgen2 keeps prefill and decode apart, rung node does not"
    ):
        RUNGS["node"].restrict(FAMILY, "hexgen2")
    with pytest.raises(InvalidProblemError, match="rung apart is of plans for an engine"):
        RUNGS["apart"].restrict(Family())
    with pytest.raises(InvalidProblemError, match="is of plans for an engine"):
        rungs_of(Family())
