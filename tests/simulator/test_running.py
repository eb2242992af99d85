"""Runs report their progress, stop on cancellation, and return the results so far."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest

from hetis.simulator import running
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.running import SimulationJob, runner
from hetis.simulator.values import Request, Run, Settings
from hetis.solver.plan import Objective
from hetis.solver.workload import LengthBin, Workload
from tests.simulator.fake_runs import queue_run

LENGTHS = Workload(name="w", bins=(LengthBin(prompt_tokens=10, output_tokens=91, weight=1.0),))


@pytest.fixture(autouse=True)
def queue_instead_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def simulate(plan: object, problem: object, requests: Iterable[Request], settings: Settings, _: object) -> Run:
        return queue_run(requests, settings)

    monkeypatch.setattr(running, "simulate", simulate)


def job(seed: int = 0, arrivals: Arrivals = Arrivals.DRAWN, keep_run: bool = False) -> SimulationJob:
    rate = None if arrivals is Arrivals.SATURATED else 4.0
    return SimulationJob(
        load=Load(lengths=LENGTHS, max_position=1000, arrivals=arrivals, rate_rps=rate),
        num_requests=500,
        seed=seed,
        settings=Settings(seed=seed),
        limits=Objective(ttft_limit_s=None, tpot_limit_s=None),
        keep_run=keep_run,
    )


def test_answers_come_in_the_order_of_the_jobs_and_runs_only_where_wanted() -> None:
    with runner(None, None) as runs:  # the queue reads neither
        one, other = runs.run([job(1, keep_run=True), job(2)])
        alone = runs.run([job(2)])
    assert one.metrics != other.metrics
    assert repr(alone) == repr([other])  # since Python 3.13 values with a NaN do not equal even themselves
    assert one.run is not None
    assert other.run is None


def test_reports_never_go_back_and_name_the_total() -> None:
    reports: list[tuple[int, int]] = []
    with runner(None, None, report=lambda given, total: reports.append((given, total))) as runs:  # type: ignore[arg-type]
        runs.run([job(1), job(2)])
    assert [given for given, _ in reports] == sorted(given for given, _ in reports)
    assert {total for _, total in reports} == {1000}
    assert 900 < reports[-1][0] <= 1000


@pytest.mark.parametrize("arrivals", [Arrivals.DRAWN, Arrivals.SATURATED])
def test_a_run_that_is_stopped_serves_what_has_arrived(arrivals: Arrivals) -> None:
    cancelled = threading.Event()

    def stop_soon(given: int, total: int) -> None:
        if given >= 128:
            cancelled.set()

    with runner(None, None, is_cancelled=cancelled.is_set, report=stop_soon) as runs:  # type: ignore[arg-type]
        answers = runs.run([job(1, arrivals), job(2, arrivals)])
    (first,) = answers  # the second never started
    assert first.metrics.counts.arrived == first.metrics.counts.finished == 128
