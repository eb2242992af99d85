"""Plans are held to the statistics and shares that are asked for."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetis.planner.cli.exit_codes import ExitCode
from hetis.planner.report.figures import digits, seconds
from hetis.planner.report.page.pages import ShownPlan, plans_page
from hetis.planner.report.promises import beside_equal_stages, simple_setups
from hetis.planner.use_cases.record.parts import Requested, Verified
from hetis.planner.use_cases.service_level import (
    Latency,
    ServiceLevel,
    Statistic,
    requested_level,
    share_within,
)
from hetis.planner.use_cases.simulation.judging import _attained, measured
from hetis.planner.use_cases.simulation.simulate import Question, Simulated, answer, default_rate
from hetis.planner.use_cases.verification.outcome import (
    AS_PLANNED,
    misses,
    rate_to_simulate,
)
from hetis.planner.use_cases.verification.rates import (
    num_requests_of,
)
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.running import never, silent
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Objective, ObjectiveKind
from tests.planner.command_line import invoke
from tests.planner.use_cases.simulation.test_simulate import no_mixed_factor
from tests.planner.use_cases.verification.verifying import Placed, again, at_rate, drawn, page_of

__all__ = ["no_mixed_factor"]  # for every test here, too


@pytest.fixture(scope="module")
def whole_run(pair: Placed) -> Simulated:
    """Return a run of 2,000 requests at the planned rate."""
    plan, problem = pair
    load = Load(
        lengths=problem.workload, max_position=problem.model.max_position, arrivals=Arrivals.DRAWN,
        rate_rps=default_rate(plan, problem),
    )  # fmt: skip
    question = Question(
        load=load, num_requests=2000, seeds=(0,), settings=AS_PLANNED, limits=plan.objective, keep_run=True
    )
    return answer(plan, problem, question, processes=1, is_cancelled=never, report=silent)


def test_a_run_is_judged_by_the_statistics_that_are_asked_for(whole_run: Simulated) -> None:
    summary, run = whole_run.summary, whole_run.run
    limits = Objective(ttft_limit_s=1.0, tpot_limit_s=0.1)
    usual = measured(ServiceLevel(), summary, None, limits)
    p95, mean = summary.ttft_p95_s, summary.mean_tpot_s
    assert [one[:4] for one in usual.limited] == [
        (p95.value - p95.half_width, p95.value, p95.value + p95.half_width, 1.0),
        (mean.value - mean.half_width, mean.value, mean.value + mean.half_width, 0.1),
    ]
    assert [one.close for one in usual.limited] == [0.9, 1.0]
    assert not usual.seconds
    others = measured(ServiceLevel(ttft=Statistic.P99, tpot=Statistic.P50), summary, run, limits)
    assert others.seconds == pytest.approx({"TTFT": summary.ttft_s.p99, "TPOT": summary.tpot_s.p50})
    assert [one.value for one in others.limited] == list(others.seconds.values())
    assert all(one.low < one.value < one.high for one in others.limited)
    assert others.limited[0].high - others.limited[0].value > p95.half_width  # a tail further out is less certain
    unlimited = Objective(ttft_limit_s=None, tpot_limit_s=None)
    assert measured(ServiceLevel(ttft=Statistic.P99), summary, run, unlimited).limited == ()


def test_a_run_is_judged_by_the_share_of_requests_that_keep_all_limits(whole_run: Simulated) -> None:
    summary, run, share = whole_run.summary, whole_run.run, ServiceLevel(attainment=0.9)
    inside = run.arrival_s >= summary.warm_up_s
    ttft = (run.first_token_s - run.arrival_s)[inside]
    limit_s = float(np.percentile(ttft, 80))
    found = measured(share, summary, run, Objective(ttft_limit_s=limit_s, tpot_limit_s=None))
    (missing,) = found.limited
    assert missing.value == found.missed["TTFT"] == pytest.approx(0.2, abs=1 / len(ttft))
    assert missing.limit == pytest.approx(0.1)
    assert missing.limit < missing.low < missing.value, "surely missed"
    both = measured(share, summary, run, Objective(ttft_limit_s=limit_s, tpot_limit_s=1e-6))
    assert (both.limited[0].value, both.missed["TPOT"]) == (1.0, 1.0)
    never = measured(share, summary, run, Objective(ttft_limit_s=1e6, tpot_limit_s=None)).limited[0]
    assert never.value == 0.0
    assert never.high == pytest.approx(3 / len(ttft))  # a run without a miss does not prove that there are none
    lost = replace(run, finished_s=np.full_like(run.finished_s, np.nan))
    assert measured(share, summary, lost, Objective(ttft_limit_s=1e6, tpot_limit_s=None)).limited[0].value == 1.0


@pytest.mark.parametrize(
    ("share", "asked", "said"),
    [(0.876, 0.9, "87.6%"), (0.99878, 0.999, "99.878%"), (0.9996, 1.0, "99.9600%"), (0.9999, 0.999, "99.990%")],
)
def test_a_share_is_not_rounded_to_the_one_asked_for(share: float, asked: float, said: str) -> None:
    assert share_within(share, asked) == said


def test_runs_are_long_enough_for_the_share_that_may_miss(pair: Placed) -> None:
    plan, _ = pair
    lengths = [
        num_requests_of(replace(plan, inputs={"service_level": asdict(ServiceLevel(attainment=share))}))
        for share in (0.5, 0.99, 0.999, 1.0)
    ]
    assert lengths == [num_requests_of(plan), 5000, 16_000, 16_000]


@pytest.mark.parametrize("level", [ServiceLevel(attainment=1.0), ServiceLevel(ttft=Statistic.P99, tpot=Statistic.P50)])
def test_the_rate_that_is_kept_follows_what_is_asked_for(pair: Placed, level: ServiceLevel) -> None:
    plan, problem = pair
    usual = Verified.of(plan).verification
    assert usual is not None
    asked = replace(plan, inputs={**plan.inputs, "service_level": json.loads(json.dumps(asdict(level)))})
    assert Requested.of(asked).service_level == level
    found = again(asked, problem)
    verification = Verified.of(found).verification
    assert verification is not None
    if level.attainment is None:
        assert (verification.ttft_p95_s, verification.tpot_mean_s) == (usual.ttft_p95_s, usual.tpot_mean_s)
        assert verification.ttft_s is not None
        assert verification.tpot_s is not None
        assert verification.ttft_s > usual.ttft_p95_s
        assert f"TTFT p99 {seconds(verification.ttft_s)}, TPOT p50 {seconds(verification.tpot_s)}" in drawn(found)
    else:
        assert verification.kept == (verification.attainment == 1.0)
        assert "100% asked for" in drawn(found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--attainment", "0"], "must be above 0 and at most 100%"),
        (["--attainment", "90"], "must be above 0 and at most 100%, did you mean 90%?"),
        (["--ttft-statistic", "p42"], "'p42' is not one of"),
    ],
)
def test_levels_that_mean_nothing_are_refused(placed: Path, options: list[str], said: str) -> None:
    cluster = str(placed.with_name("cluster.yaml"))
    done = invoke("place", "-c", cluster, "-m", "Llama-2-7B", "-w", "500/100", *options)
    assert done.exit_code == ExitCode.INVALID
    assert said in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"attainment": 0.9, "tpot": Statistic.P99}, "no statistic is taken: leave out --tpot-statistic"),
        (
            {"attainment": 0.9, "verify": False},
            "--attainment can only be checked in the simulation, which --no-verify skips",
        ),
        (
            {"tpot": Statistic.MEAN, "objective": Objective(tpot_limit_s=None)},
            "--tpot-statistic is given, but TPOT has no limit",
        ),
        ({"attainment": 0.9, "objective": Objective(ttft_limit_s=None, tpot_limit_s=None)}, "neither TTFT nor TPOT"),
        ({"attainment": 90.0}, "attainment is 90, must be above 0 and at most 1"),
    ],
)
def test_levels_that_contradict_themselves_are_refused(asked: dict[str, Any], said: str) -> None:
    usual = {"ttft": None, "tpot": None, "attainment": None, "objective": Objective(), "verify": True}
    assert requested_level(**usual) == ServiceLevel()  # type: ignore[arg-type]
    with pytest.raises(InvalidProblemError, match=said):
        requested_level(**{**usual, **asked})  # type: ignore[arg-type]


def test_a_saved_plan_says_what_it_is_held_to(placed: Path, tmp_path: Path) -> None:
    out, cluster = tmp_path / "plan.json", str(placed.with_name("cluster.yaml"))
    asked = ["place", "-c", cluster, "-m", "Llama-2-7B", "-w", "500/100", "--ttft-statistic", "p99", "--out", str(out)]
    assert "TTFT p99" in invoke(*asked).stdout
    assert json.loads(out.read_text())["inputs"]["service_level"] == {"ttft": "p99", "tpot": "mean", "attainment": None}
    assert "TTFT p99" in invoke("explain", str(out)).stdout


def test_a_plan_is_headed_and_simulated_by_the_rate_that_it_keeps(pair: Placed) -> None:
    plan, problem = pair
    less = at_rate(plan, problem, 0.7)
    less = replace(less, inputs={**plan.inputs, "model_value": plan.result.value})
    kept, planned = (f"{digits(one.result.value, 4)} requests/s" for one in (less, plan))
    assert f"Goodput {kept} kept in simulation; by the model {planned}; proven" in drawn(less)
    assert f"Goodput {planned} proven" in drawn(plan)
    dear, cheap = (float(re.findall(r"([\d.]+) USD per million", drawn(one))[0]) for one in (less, plan))
    assert dear / cheap == pytest.approx(1 / 0.7, rel=0.01)
    never = replace(less, result=replace(less.result, value=0.0, utilisation=0.0))
    assert "Goodput none of the rates tried keeps the limits in simulation; by the model" in drawn(never)
    beside = {"equal_stages_value": 0.5 * plan.result.value}
    for one, more in (
        (less, "by the model, by replicas of equal stages (not simulated); this plan by the model 100% more"),
        (never, "this plan: --strategy uniform); this plan by the model 100% more"),
        (plan, "stages; this plan 100% more"),
    ):
        shown = replace(one, inputs={**one.inputs, **beside})
        assert beside_equal_stages(shown).endswith(more)
        page = plans_page([ShownPlan(name="one", plan=shown, problem=problem)])
        assert "+100%" in page
        assert ("by the model; equal stages, not simulated" in page) is (one is not plan)
    [simple] = simple_setups(replace(less, inputs={**less.inputs, "simple_setups": {"2": 0.5 * plan.result.value}}))
    assert simple.endswith("50% less by the model")
    for one in (less, plan):
        assert rate_to_simulate(one, problem) == pytest.approx(one.result.value)
        demanded = replace(one, objective=replace(plan.objective, demand_rps=0.01))
        assert rate_to_simulate(demanded, problem) == rate_to_simulate(one, problem), "a plan promises its own rate"
        dearest = replace(demanded, objective=replace(demanded.objective, kind=ObjectiveKind.COST))
        assert rate_to_simulate(dearest, problem) == 0.01
    missing = replace(Verified.of(plan).verification, kept=False, ttft_p95_s=3451.0, steady=None)
    [clause] = misses(missing, plan)
    assert clause == "TTFT p95 3,451 s of 2 s"


def test_a_single_limit_is_not_called_both(pair: Placed) -> None:
    plan, _ = pair
    kept = replace(plan, inputs={**plan.inputs, "verification": {**plan.inputs["verification"], "kept": True}})
    alone = replace(kept, objective=replace(plan.objective, ttft_limit_s=None))
    for output in (drawn, page_of):
        assert "% within both" in output(kept)
        assert "% within the limit" in output(alone)
        assert "both" not in output(alone)


def test_a_limit_that_is_kept_up_to_chance_is_said_to_be_exceeded(pair: Placed) -> None:
    plan, _ = pair
    limit_s = plan.objective.tpot_limit_s
    assert limit_s is not None
    over = {**plan.inputs["verification"], "kept": True, "tpot_mean_s": 1.01 * limit_s}
    shown = f"TPOT mean {seconds(1.01 * limit_s)}"
    kept = replace(plan, inputs={**plan.inputs, "verification": over})
    assert f"{shown} (over {seconds(limit_s)} by chance)" in drawn(kept)
    within = replace(plan, inputs={**plan.inputs, "verification": {**over, "tpot_mean_s": limit_s}})
    assert "by chance" not in drawn(within)


@pytest.mark.parametrize(("missed", "attainment", "is_sure", "is_close"), [
    (0, 1.0, True, False), (1, 1.0, False, False), (0, 0.99, True, False), (10, 0.99, False, True),
])  # fmt: skip
def test_one_miss_refutes_100_percent_and_none_is_sure(
    missed: int, attainment: float, is_sure: bool, is_close: bool
) -> None:
    over = np.zeros(1000)
    over[:missed] = 2.0
    (limited,) = _attained(attainment, {Latency.TTFT: over}, {Latency.TTFT: 1.0}).limited
    assert limited.value == missed / 1000
    assert (limited.high <= limited.limit) is is_sure
    assert (limited.low <= limited.limit < limited.high / limited.close) is is_close
