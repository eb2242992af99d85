"""``hetis-plan fair``: shares as users see them, and errors in files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from hetis.planner.cli import searching
from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.cli.sharing import FairRule
from hetis.solver.budget import Budget
from hetis.solver.shares.share_problem import FairnessRule
from tests.planner.command_line import EXAMPLES, hetis_plan_here, invoke

SMALL = """apiVersion: hetis/v1
kind: ShareProblem
gpus: {slow: 8, fast: 4}
tenants:
  - {name: a, speedups: {slow: 1, fast: 2}}
  - {name: b, weight: 2, speedups: {slow: 1, fast: 6}}
"""


def written(folder: Path, text: str) -> str:
    path = folder / "tenants.yaml"
    path.write_text(text)
    return str(path)


def test_the_example_is_shared_out_with_speed_ups_from_our_own_placements() -> None:
    run = hetis_plan_here("fair", str(EXAMPLES / "tenants.yaml"), "-o", "json")
    assert run.returncode == 0, run.stderr
    assert "-0.0" not in run.stdout
    answer = json.loads(run.stdout)
    cooperative = answer["rules"][0]
    assert cooperative["rule"] == "cooperative"
    assert cooperative["envy_free"]
    assert cooperative["sharing_incentive"]
    assert cooperative["gap"] < 1e-6
    derived = next(one for one in answer["claimants"] if one["tenant"] == "drafts")
    assert max(derived["speedups"].values()) > 2
    assert "placements" in run.stderr


def test_the_table_fits_80_columns_and_says_what_holds(tmp_path: Path) -> None:
    result = invoke("fair", written(tmp_path, SMALL), "--rounds", "2", "--claims", "2")
    assert result.exit_code == 0, result.output
    assert "no tenant envies another" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())


def test_the_rule_that_is_asked_for_comes_first(tmp_path: Path) -> None:
    result = invoke("fair", written(tmp_path, SMALL), "--rule", "non-cooperative", "-q", "-o", "json")
    rules = [rule["rule"] for rule in json.loads(result.stdout)["rules"]]
    assert rules[0] == "non-cooperative"
    assert sorted(rules) == sorted(rule.value for rule in FairnessRule)


def test_the_rules_of_the_command_line_are_those_of_the_solver() -> None:
    assert list(get_args(FairRule)) == [rule.value for rule in FairnessRule]


def test_everything_wrong_with_a_file_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = """apiVersion: hetis/v1
kind: ShareProblem
gpus: {slow: 8, fast: 0}
tenants:
  - {name: a, speedups: {slow: 1, fsat: 2}}
  - {name: a, weight: -1, speedups: {slow: 0, fast: 0}}
  - {name: c}
  - {name: d, model: Llama-2-7B}
  - {name: e, weight: 1, min_gpus: 2, jobs: [{name: x, speedups: {slow: 1, fast: 1}},
       {name: x, model: M, speedups: {}}]}
"""
    run = hetis_plan_here("fair", written(tmp_path, text))
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    for line, words in (
        (3, "must be >= 1"),
        (5, "'fsat' is not in gpus, did you mean fast?"),
        (5, "has none for fast"),
        (6, "duplicate tenant 'a', first at tenants[0]"),
        (6, "must be >= 0.0001"),
        (6, "are all 0"),
        (7, "neither speedups nor a model"),
        (8, "workload is missing"),
        (9, "cannot be combined with jobs"),
        (10, "duplicate job 'x', first at tenants[4].jobs[0]"),
        (10, "cannot be combined with speedups"),
    ):
        assert any(f":{line}:" in told and words in told for told in run.stderr.splitlines()), (line, words, run.stderr)


@pytest.mark.parametrize(
    ("model", "workload", "gpu", "words"),
    [
        ("Llama-2-7", "1024/256", "L4", "Llama-2-7"),
        ("Llama-2-7B", "no/where", "L4", "no/where"),
        ("Llama-2-7B", "1024/256", "NoSuchGPU", "known types only"),
    ],
)
def test_what_speed_ups_cannot_be_derived_from_is_named(
    tmp_path: Path, model: str, workload: str, gpu: str, words: str
) -> None:
    text = f"""apiVersion: hetis/v1
kind: ShareProblem
gpus: {{{gpu}: 2}}
tenants: [{{name: a, model: {model}, workload: {workload}}}]
"""
    run = hetis_plan_here("fair", written(tmp_path, text))
    assert run.returncode == 2, run.stderr
    assert words in run.stderr
    assert "Traceback" not in run.stderr


def test_a_model_that_fits_nowhere_is_an_error_and_not_a_share_of_nothing(tmp_path: Path) -> None:
    text = """apiVersion: hetis/v1
kind: ShareProblem
gpus: {L4: 1}
tenants: [{name: a, model: Llama-2-70B, workload: 1024/256}]
"""
    run = hetis_plan_here("fair", written(tmp_path, text))
    assert run.returncode == 2, run.stderr
    assert "cannot be served on any of L4 alone" in run.stderr


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C as soon as `fair` tells its next step."""
    budgets = list[Budget]()

    def new_budget(**given: Any) -> Budget:
        budgets.append(Budget(**given))
        return budgets[-1]

    monkeypatch.setattr(searching, "Budget", new_budget)
    monkeypatch.setattr("hetis.commands.terminal.Terminal.say", lambda *_: budgets[-1].cancelled.set())


@pytest.mark.usefixtures("stopped")
def test_speed_ups_that_are_interrupted_are_no_shares() -> None:
    """A placement that was cut short would understate what its GPU type is worth."""
    run = hetis_plan_here("fair", str(EXAMPLES / "tenants.yaml"), "-o", "json")
    assert run.returncode == ExitCode.INTERRUPTED, run.stderr
    assert json.loads(run.stdout)["exit_code"] == ExitCode.INTERRUPTED
    assert "stopped before all speed-ups were derived, so there are no shares" in run.stderr


@pytest.mark.usefixtures("stopped")
def test_claims_that_are_interrupted_leave_the_shares(tmp_path: Path) -> None:
    call = partial(hetis_plan_here, "fair", written(tmp_path, SMALL), "--claims", "9")
    run = call("-o", "json")
    assert run.returncode == ExitCode.INTERRUPTED, run.stderr
    answer = json.loads(run.stdout)
    assert len(answer["rules"]) == len(FairnessRule)
    assert "claims" not in answer
    assert "stopped early" in run.stderr
    shown = call()
    assert shown.returncode == ExitCode.INTERRUPTED
    assert "no tenant envies another" in shown.stdout


def test_no_further_rule_is_solved_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(**given: Any) -> Budget:
        budget = Budget(**given)
        budget.cancelled.set()
        return budget

    monkeypatch.setattr(searching, "Budget", spent)
    call = partial(hetis_plan_here, "fair", written(tmp_path, SMALL), "--claims", "9", "--rounds", "9")
    run = call("-o", "json")
    assert run.returncode == ExitCode.INTERRUPTED, run.stderr
    answer = json.loads(run.stdout)
    assert [rule["rule"] for rule in answer["rules"]] == ["cooperative", "equal-split"]
    assert answer.keys().isdisjoint({"claims", "rounds"})
    assert "times an equal split" in call().stdout
