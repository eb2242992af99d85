"""A simulation for programs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hetis.planner.report.figures import digits, percent, seconds
from hetis.planner.report.simulation import simulation_document
from hetis.planner.use_cases.at_settings import at_settings
from hetis.planner.use_cases.simulate import (
    Question,
    Simulated,
    answer,
    default_requests,
    sample_spacing_s,
)
from hetis.planner.use_cases.verify import rate_to_simulate
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Limits, Summary
from hetis.simulator.running import silent
from hetis.simulator.values import Settings
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Plan
from hetis.solver.problem import NOTHING_SET, EngineSettings, PlacementProblem

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Simulation:
    """The result of a plan under traffic; ``simulated`` contains everything."""

    simulated: Simulated
    plan: Plan

    @property
    def summary(self) -> Summary:
        """Throughput, latencies, attainment and events, with intervals; for a sweep, at its goodput."""
        return self.simulated.summary

    @property
    def goodput_rps(self) -> float | None:
        """The highest rate within the limits that a sweep found, 0 if none is; None without a sweep."""
        return None if self.simulated.sweep is None else self.simulated.sweep.goodput_rps

    @property
    def kept(self) -> bool:
        """Return whether the load was carried within the limits."""
        return self.summary.within(self.simulated.question.limits)

    def to_dict(self) -> Mapping[str, Any]:
        """Return the simulation as plain data, as ``hetis-plan simulate -o json`` prints it."""
        return simulation_document(self.simulated, self.plan)

    def to_frame(self) -> pandas.DataFrame:
        """Return a row for every rate that was tried, or one row without a sweep. Needs pandas: ``hetis[frames]``."""
        import pandas

        swept, question = self.simulated.sweep, self.simulated.question
        if swept is None:
            points = [(question.load.rate_rps, self.summary, self.kept)]
        else:
            points = [(point.rate_rps, point.summary, point.within) for point in swept.points]
        return pandas.DataFrame(
            [
                {
                    "rate_rps": rate_rps,
                    "throughput_rps": summary.throughput_rps.value,
                    "ttft_p95_s": summary.ttft_p95_s.value,
                    "ttft_p95_half_width_s": summary.ttft_p95_s.half_width,
                    "tpot_mean_s": summary.mean_tpot_s.value,
                    "tpot_mean_half_width_s": summary.mean_tpot_s.half_width,
                    "attainment": summary.attainment,
                    "within": within,
                }
                for rate_rps, summary, within in points
            ]
        )

    def __repr__(self) -> str:
        found = self.summary
        latencies = f"TTFT p95 {seconds(found.ttft_p95_s.value)}, TPOT mean {seconds(found.mean_tpot_s.value)}"
        limits = "within the limits" if self.kept else "not within the limits"
        rate = digits(found.throughput_rps.value, 4)
        return f"<hetis.Simulation: {rate} requests/s, {latencies}, {percent(found.attainment)} attained, {limits}>"


def simulation_of(
    plan: Plan,
    problem: PlacementProblem,
    *,
    rate_rps: float | None,
    num_requests: int | None,
    seeds: tuple[int, ...],
    sweeps: bool,
    tolerance: float,
    engine_settings: EngineSettings = NOTHING_SET,
) -> Simulation:
    """Run the simulator on the plan's own workload.

    Raises:
        InvalidProblemError: the plan has no replicas, or cannot be simulated.
    """
    if not plan.replicas:
        raise InvalidProblemError("the plan has no replicas: there is nothing to simulate")
    load = Load(
        lengths=problem.workload,
        max_position=problem.model.max_position,
        arrivals=Arrivals.DRAWN,
        rate_rps=rate_to_simulate(plan, problem) if rate_rps is None else rate_rps,
    )
    started = at_settings(plan, problem, engine_settings)
    plan, problem = started.plan, started.problem
    num_requests = num_requests or default_requests(plan, load)
    question = Question(
        load=load,
        num_requests=num_requests,
        seeds=seeds,
        settings=Settings(sample_every_s=None if sweeps else sample_spacing_s(plan, load, num_requests)),
        limits=Limits(ttft_s=plan.objective.ttft_limit_s, tpot_s=plan.objective.tpot_limit_s),
        sweeps=sweeps,
        tolerance=tolerance,
        engine_settings=engine_settings,
        changes=started.changes,
    )
    found = answer(plan, problem, question, processes=1, cancelled=threading.Event(), report=silent)
    return Simulation(simulated=found, plan=plan)
