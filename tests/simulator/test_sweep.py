"""A sweep finds the highest rate within the limits, however it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.simulator.arrivals import LEAST_RPS, MOST_RPS, Load, draw_traffic, requests_of
from hetis.simulator.metrics import Summary, measure, summarise
from hetis.simulator.running import IDLE, sweep
from hetis.simulator.steadiness import Estimate
from hetis.solver.plan import Objective
from hetis.solver.workload import LengthBin, Workload
from tests.simulator.fake_runs import queue_run

LIMITS = Objective(ttft_limit_s=2.0, tpot_limit_s=None)
_LOAD = Load(
    lengths=Workload(name="w", bins=(LengthBin(prompt_tokens=10, output_tokens=2, weight=1.0),)),
    max_position=100,
    rate_rps=5.0,
)
SUMMARY = summarise([measure(queue_run(requests_of(draw_traffic(_LOAD, 300, seed=0))), LIMITS, saturated=False)])


class Server:
    """A p95 TTFT that reaches the limit at ``best_rps``; records the rates that were requested."""

    def __init__(self, best_rps: float, half_width_s: float = 0.0, patience: int = 10_000) -> None:
        self.best_rps, self.half_width_s, self.patience = best_rps, half_width_s, patience
        self.asked: list[float] = []

    def __call__(self, rates: Sequence[float]) -> list[Summary]:
        answered = rates[: max(self.patience - len(self.asked), 0)]
        self.asked += answered
        ttft = [Estimate(value=2.0 * rate / self.best_rps, half_width=self.half_width_s) for rate in answered]
        return [replace(SUMMARY, ttft_p95_s=one) for one in ttft]


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 20.0), st.floats(0.1, 5.0), st.integers(1, 6), st.floats(0.005, 0.2))
def test_the_bracket_holds_the_best_rate_and_is_narrow(best: float, start: float, at_once: int, wide: float) -> None:
    found = sweep(Server(best), LIMITS, start_rps=start, tolerance=wide, at_once=at_once)
    assert found.goodput_rps <= best * (1 + 1e-9)
    if found.beyond_rps is None:  # the search ended far from its start: all rates were within the limits
        assert all(point.within for point in found.points)
        return
    assert best <= found.beyond_rps * (1 + 1e-9)
    assert found.beyond_rps - found.goodput_rps <= wide * found.beyond_rps or found.beyond_rps <= IDLE * start


def test_rates_at_once_take_fewer_rounds() -> None:
    rounds = []
    for at_once in (1, 4):
        server, calls = Server(1.0), 0

        def counted(rates: Sequence[float], server: Server = server) -> list[Summary]:
            nonlocal calls
            calls += 1
            return server(rates)

        sweep(counted, LIMITS, start_rps=0.9, tolerance=0.01, at_once=at_once)
        rounds.append(calls)
    assert rounds[1] < rounds[0]


def test_no_rate_within_the_limits_is_found_out() -> None:
    server = Server(1e-9)
    found = sweep(server, LIMITS, start_rps=1.0)
    assert found.goodput_rps == 0.0
    assert found.beyond_rps is not None
    assert server.asked == [1.0, IDLE]


def test_a_search_that_is_stopped_gives_what_it_has() -> None:
    found = sweep(Server(1.5, patience=2), LIMITS, start_rps=1.0)
    assert [point.rate_rps for point in found.points] == pytest.approx([1.0, 1.15])
    assert found.goodput_rps == pytest.approx(1.15)
    assert found.beyond_rps is None


def test_points_near_the_limit_are_unsure() -> None:
    found = sweep(Server(1.0, half_width_s=0.1), LIMITS, start_rps=1.0, tolerance=0.01)
    unsure = [point.rate_rps for point in found.points if not point.sure]
    assert unsure == [point.rate_rps for point in found.points if abs(point.rate_rps - 1.0) <= 0.05 + 1e-9]
    assert unsure


def test_a_load_that_is_not_carried_is_not_within() -> None:
    def overloaded(rates: Sequence[float]) -> list[Summary]:
        return [replace(SUMMARY, steady=rate < 0.5) for rate in rates]

    found = sweep(overloaded, Objective(ttft_limit_s=None, tpot_limit_s=None), start_rps=1.0)
    assert 0.48 < found.goodput_rps < 0.5


def test_limits_that_are_kept_at_every_rate_end_the_search() -> None:
    found = sweep(
        lambda rates: [SUMMARY for _ in rates], Objective(ttft_limit_s=None, tpot_limit_s=None), start_rps=1e3
    )
    assert found.beyond_rps is None
    assert np.isfinite(found.goodput_rps)
    assert [point.rate_rps for point in found.points].count(MOST_RPS) == 1


def test_the_rates_of_a_search_are_those_that_a_load_may_have() -> None:
    found = sweep(Server(1e-9), LIMITS, start_rps=1e-5)
    assert found.points[0].rate_rps == found.beyond_rps == LEAST_RPS
