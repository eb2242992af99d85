"""A simulated plan is held to the service level for which it was made, or to another one that is given."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hetis
from hetis.planner.report.figures import digits
from hetis.planner.report.simulation.text import _goodput
from hetis.planner.use_cases.saved_plans import load_plan_and_problem
from hetis.planner.use_cases.service_level import DEFAULT, Latency, ServiceLevel, Statistic
from hetis.planner.use_cases.simulation import simulate as simulating
from hetis.planner.use_cases.simulation.judging import (
    level_to_hold,
)
from hetis.planner.use_cases.simulation.simulate import Question, Simulated, answer, default_requests
from hetis.planner.use_cases.verification.outcome import AS_PLANNED
from hetis.planner.use_cases.verification.rates import simulated_at
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.running import silent
from hetis.simulator.values import FloatArray
from hetis.solver.budget import Budget
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem
from tests.planner.command_line import invoke
from tests.planner.use_cases.simulation.test_simulate import CLUSTER, no_mixed_factor, simulated

__all__ = ["no_mixed_factor"]  # for every test here, too

Placed = tuple[Plan, PlacementProblem]
TAILS = ServiceLevel(ttft=Statistic.P99, tpot=Statistic.P90)
SHARE = ServiceLevel(attainment=0.9)
LIMITS = Objective(ttft_limit_s=0.2, tpot_limit_s=0.05)
UNLIMITED = Objective(ttft_limit_s=None, tpot_limit_s=None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama-2-7B on two A100, held to 90% of the requests within 200 ms and 50 ms."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "cluster.yaml").write_text(CLUSTER)
    out = folder / "plan.json"
    inputs = ("-c", str(folder / "cluster.yaml"), "-m", "Llama-2-7B", "-w", "500/100")
    placed = invoke("place", *inputs, "--no-verify", "--out", str(out))
    assert placed.exit_code == 0, placed.output
    document = json.loads(out.read_text())
    document["inputs"]["service_level"] = asdict(SHARE)
    document["objective"] |= {"ttft_limit_s": 0.2, "tpot_limit_s": 0.05}
    out.write_text(json.dumps(document))
    return out


@pytest.fixture(scope="module")
def pair(saved: Path) -> Placed:
    found = load_plan_and_problem(str(saved))
    return found.plan, found.problem


def asked(
    pair: Placed, level: ServiceLevel, *, num_requests: int = 600, rate_rps: float = 25.0, **more: Any
) -> Question:
    _, problem = pair
    load = Load(
        lengths=problem.workload, max_position=problem.model.max_position, arrivals=Arrivals.DRAWN, rate_rps=rate_rps
    )
    return Question(
        **{
            "load": load, "num_requests": num_requests, "seeds": (0,), "settings": AS_PLANNED, "limits": LIMITS,
            "service_level": level, **more,
        }
    )  # fmt: skip


def answered(pair: Placed, question: Question, *, begins: Any = lambda _part: None) -> Simulated:
    stop = threading.Event()
    return answer(*pair, question, processes=1, is_cancelled=stop.is_set, report=silent, begins=begins)


def table(saved: Path, *arguments: str) -> str:
    result = invoke("simulate", str(saved), "--threads", "1", *arguments)
    assert result.exit_code == 0, result.stderr
    assert max(len(line) for line in result.stdout.splitlines()) <= 80
    return result.stdout


def shown(document: dict[str, Any]) -> list[tuple[str | None, str | None, float]]:
    return [(one["latency"], one["statistic"], one["limit"]) for one in document["verdicts"]]


# --- which level


P50, P95, P99, MEAN = Statistic.P50, Statistic.P95, Statistic.P99, Statistic.MEAN


@pytest.mark.parametrize(
    ("own", "given", "level"),
    [
        (DEFAULT, {}, DEFAULT),
        (TAILS, {}, TAILS),
        (SHARE, {}, SHARE),
        (TAILS, {"ttft": P50}, replace(TAILS, ttft=P50)),
        (TAILS, {"attainment": 0.99}, ServiceLevel(attainment=0.99)),
        (SHARE, {"attainment": 0.5}, ServiceLevel(attainment=0.5)),
        (SHARE, {"tpot": P99}, ServiceLevel(tpot=P99)),
        (SHARE, {"ttft": P95}, DEFAULT),
    ],
)
def test_what_is_given_replaces_only_its_part_of_the_plans_level(
    pair: Placed, own: ServiceLevel, given: dict[str, Any], level: ServiceLevel
) -> None:
    plan = replace(pair[0], inputs={**pair[0].inputs, "service_level": asdict(own)})
    nothing = {"ttft": None, "tpot": None, "attainment": None}
    assert level_to_hold(plan, LIMITS, **nothing | given) == level


def test_a_level_does_not_depend_on_a_latency_without_a_limit(pair: Placed) -> None:
    def level(own: ServiceLevel, limits: Objective) -> ServiceLevel:
        plan = replace(pair[0], inputs={**pair[0].inputs, "service_level": asdict(own)})
        return level_to_hold(plan, limits, ttft=None, tpot=None, attainment=None)

    assert level(TAILS, replace(LIMITS, tpot_limit_s=None)) == ServiceLevel(ttft=P99)
    assert level(TAILS, UNLIMITED) == level(SHARE, UNLIMITED) == DEFAULT
    assert level(SHARE, replace(LIMITS, tpot_limit_s=None)) == SHARE
    with pytest.raises(InvalidProblemError, match="neither TTFT nor TPOT has one"):
        asked(pair, SHARE, limits=UNLIMITED)


def test_a_small_share_of_misses_needs_more_requests(pair: Placed) -> None:
    load = asked(pair, DEFAULT).load
    usual = default_requests(pair[0], load)
    assert default_requests(pair[0], load, ServiceLevel(attainment=0.9)) == usual < 50_000
    assert default_requests(pair[0], load, ServiceLevel(attainment=0.995)) == 10_000  # 50 misses of 0.5%
    assert default_requests(pair[0], load, ServiceLevel(attainment=1.0)) == 40_000


# --- what is compared


def test_one_run_is_compared_in_the_statistics_of_its_level(pair: Placed) -> None:
    found = answered(pair, asked(pair, TAILS))
    ttft, tpot = found.verdict.limits
    # `Summary` has these figures by code of its own.
    assert (ttft.estimate.value, tpot.estimate.value) == pytest.approx(
        (found.summary.ttft_s.p99, found.summary.tpot_s.p90)
    )
    assert (ttft.limit, tpot.limit) == (0.2, 0.05)
    share = answered(pair, asked(pair, SHARE))
    (within,) = share.verdict.limits
    assert within.estimate.value == pytest.approx(share.summary.attainment)
    assert {*share.verdict.missed} == {Latency.TTFT, Latency.TPOT}
    assert share.run is None, "it was not asked for"


def test_the_verdict_is_that_of_place_on_the_same_traffic(pair: Placed) -> None:
    plan, problem = replace(pair[0], inputs={**pair[0].inputs, "service_level": asdict(TAILS)}), pair[1]
    placed = simulated_at(plan, problem, 25.0, LIMITS, seed=0, budget=Budget(), report=silent, lengths=(600,))
    found = answered(pair, asked(pair, TAILS))
    for one, limited in zip(found.verdict.limits, placed.measured.limited, strict=True):
        assert one.estimate.value == limited.value
        assert one.estimate.half_width == pytest.approx(limited.high - limited.value)
    assert found.kept is placed.within


def test_several_runs_are_judged_over_the_requests_of_all(pair: Placed) -> None:
    latencies = list[FloatArray]()
    for seed in (3, 4, 5):
        one = answered(pair, asked(pair, DEFAULT, seeds=(seed,), keep_run=True))
        inside = one.run.arrival_s >= one.summary.warm_up_s  # which differ
        latencies.append((one.run.first_token_s - one.run.arrival_s)[inside])
    found = answered(pair, asked(pair, TAILS, seeds=(3, 4, 5)))
    value = found.verdict.limits[0].estimate.value
    assert value == pytest.approx(np.percentile(np.concatenate(latencies), 99))
    assert value != pytest.approx(np.mean([np.percentile(one, 99) for one in latencies]))


def test_few_whole_runs_in_memory_change_nothing(pair: Placed, monkeypatch: pytest.MonkeyPatch) -> None:
    question = asked(pair, SHARE, seeds=(0, 1, 2), num_requests=200, keep_run=True)
    at_once = answered(pair, question)
    parts = list[str]()
    monkeypatch.setattr(simulating, "WHOLE_AT_ONCE", 400)
    in_turn = answered(pair, question, begins=parts.append)
    assert parts == ["runs 1 to 2 of 3", "runs 3 to 3 of 3"]
    parts_of = attrgetter("verdict", "summary", "runs")
    assert repr(parts_of(in_turn)) == repr(parts_of(at_once))  # since Python 3.13 a NaN makes equal values unequal
    assert (in_turn.run.finished_s == at_once.run.finished_s).all(), "it is the first run"


# --- a sweep


@pytest.mark.parametrize("level", [TAILS, SHARE, ServiceLevel(attainment=1.0)])
def test_a_sweep_searches_by_the_level(pair: Placed, level: ServiceLevel) -> None:
    found = answered(pair, asked(pair, level, sweeps=True, tolerance=0.1))
    swept = found.sweep
    assert swept.beyond_rps is not None
    assert len(found.verdicts) == len(swept.points) > 1
    for point, verdict in zip(swept.points, found.verdicts, strict=True):
        alone = answered(pair, asked(pair, level, rate_rps=point.rate_rps))
        assert (verdict, point.summary) == (alone.verdict, alone.summary)
        assert (point.within, point.sure) == (verdict.kept, verdict.sure)
        assert point.within is (point.rate_rps <= swept.goodput_rps)
    at = [point.rate_rps for point in swept.points].index(swept.goodput_rps)
    assert found.verdict == found.verdicts[at]


def test_a_sweep_says_up_to_which_rate_its_goodput_is_sure(pair: Placed) -> None:
    found = answered(pair, asked(pair, DEFAULT, limits=UNLIMITED, num_requests=300, sweeps=True, tolerance=0.2))
    assert found.sweep.beyond_rps is not None

    def shown(*sure: bool) -> str:
        rates = [found.sweep.goodput_rps * (n + 1) / len(sure) for n in range(len(sure))]
        point = found.sweep.points[0]
        points = [replace(point, rate_rps=rate, within=True, sure=one) for rate, one in zip(rates, sure, strict=True)]
        return _goodput(replace(found, sweep=replace(found.sweep, points=(*points, found.sweep.points[-1]))))

    beyond, goodput_rps = f"; {digits(found.sweep.beyond_rps, 4)} is not", found.sweep.goodput_rps
    assert shown(False, True) == f"{digits(goodput_rps, 4)} requests/s carried{beyond}"
    assert shown(True, False) == (
        f"{digits(goodput_rps, 4)} requests/s carried (unsure above {digits(goodput_rps / 2, 4)}){beyond}"
    )
    assert shown(False, False) == f"{digits(goodput_rps, 4)} requests/s carried (unsure){beyond}"


# --- what is printed


def test_a_plan_is_held_to_its_own_level_unless_another_is_given(saved: Path) -> None:
    own = simulated(saved, "--requests", "600")
    assert own["service_level"] == {"ttft": "p95", "tpot": "mean", "attainment": 0.9}
    assert shown(own) == [(None, None, 0.9)]
    assert own["verdicts"][0]["value"] == pytest.approx(own["summary"]["attainment"])
    assert {*own["missed"]} == {"TTFT", "TPOT"}
    other = simulated(saved, "--requests", "600", "--ttft-statistic", "p99", "--ttft", "1s", "--tpot", "none")
    assert other["service_level"] == {"ttft": "p99", "tpot": "mean", "attainment": None}
    assert shown(other) == [("TTFT", "p99", 1.0)]
    assert other["verdicts"][0]["value"] == pytest.approx(other["summary"]["ttft_s"]["p99"])
    assert other["missed"] == {}
    assert own["summary"]["ttft_s"] == other["summary"]["ttft_s"], "a level does not change what is simulated"


def test_a_saturated_fleet_has_no_verdict(saved: Path) -> None:
    found = simulated(saved, "--requests", "600", "--saturate")
    assert (found["service_level"], found["kept"], found["sure"], found["verdicts"]) == (None, None, None, [])
    assert "Service level" not in table(saved, "--saturate", "--requests", "300")


def test_a_saturated_fleet_gets_no_requests_to_measure_a_share(saved: Path, tmp_path: Path) -> None:
    document = json.loads(saved.read_text())
    document["inputs"]["service_level"] = asdict(ServiceLevel(attainment=1.0))
    strict = tmp_path / "plan.json"
    strict.write_text(json.dumps(document))
    result = invoke("simulate", str(strict), "--threads", "1", "--saturate", "-o", "json")
    assert json.loads(result.stdout)["load"]["requests"] < 40_000


# --- from Python


def test_a_simulation_from_python_follows_the_level(saved: Path) -> None:
    plan = hetis.load_plan(saved)
    at: dict[str, Any] = {"requests": 600, "rate": 32}
    own, usual = plan.simulate(**at), plan.simulate(**at, ttft_statistic="p95")
    assert own.simulated.question.service_level == SHARE
    # p95 of TTFT and mean of TPOT are within their limits, but the TPOT of many requests is not.
    assert (own.kept, usual.kept) == (False, True)
    assert own.summary == usual.summary
    share = np.floor(1000.0 * own.summary.attainment) / 10.0
    assert repr(own).endswith(f", {share:.1f}% attained, not kept: 90% of the requests within all limits>")
    assert f"{share:.1f}%" != f"{100.0 * own.summary.attainment:.1f}%", "it is rounded down"
    assert repr(usual).endswith("% attained, within the limits>")
    tails = plan.simulate(**at, ttft_statistic="p99")
    assert tails.kept is (tails.summary.ttft_s.p99 <= 0.2 and tails.summary.mean_tpot_s.value <= 0.05)
    assert f"TTFT p99 {1e3 * tails.summary.ttft_s.p99:.0f} ms, TPOT mean " in repr(tails)
    assert plan.simulate(**at, attainment="40%").kept
