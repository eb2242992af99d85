"""What the simulation of a plan, which it records, means for its promise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from hetis.planner.use_cases.record.forms import Verification
from hetis.planner.use_cases.record.parts import Requested, Verified
from hetis.planner.use_cases.service_level import Latency, Statistic, limits_of, share_within
from hetis.planner.use_cases.simulation.simulate import default_rate
from hetis.simulator.values import Settings
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

MISSES_AT = "simulated traffic misses its limits at"  # how a plan's note begins if no lower rate was decided in time
AS_PLANNED = Settings(dispatch=False, redispatch=False)  # heads as planned: nothing to compile, and fast
DISPATCHED = Settings(redispatch=False)  # heads of every request where the dispatcher puts them, as in engines


def settings_of(verification: Verification) -> Settings:
    """Return the settings of a plan's simulation."""
    return DISPATCHED if verification.dispatched else AS_PLANNED


def kept_rate(plan: Plan) -> float | None:
    """Return the highest rate at which simulated traffic kept the limits, if it did not at the plan's own rate.

    None if the plan was not simulated, or kept the limits, or kept them at none of the rates tried.
    """
    found = Verified.of(plan).verification
    return None if found is None or found.kept else found.kept_rps


def promising(plan: Plan) -> Plan:
    """Return the plan without a demand if it maximises its rate: it promises its own, whatever is demanded of it."""
    return replace(plan, objective=replace(plan.objective, demand_rps=None)) if plan.objective.maximises else plan


def rate_to_simulate(plan: Plan, problem: PlacementProblem) -> float:
    """Return the default rate to simulate: the promised demand, or else the rate known to keep the plan's limits."""
    plan = promising(plan)
    return plan.objective.demand_rps or kept_rate(plan) or default_rate(plan, problem)


class LimitedLatency(NamedTuple):
    """A latency that has a limit, as simulated, in the statistic to which the plan is held."""

    latency: Latency
    statistic: Statistic
    value_s: float
    limit_s: float

    @property
    def name(self) -> str:
        return f"{self.latency} {self.statistic}"


def limited_latencies(verification: Verification, plan: Plan) -> list[LimitedLatency]:
    """Return each latency that has a limit."""
    level, limits = Requested.of(plan).service_level, limits_of(plan.objective)
    return [
        LimitedLatency(latency, level.statistic(latency), verification.seconds(latency), limit_s)
        for latency, limit_s in limits.items()
    ]


def attained(verification: Verification, plan: Plan) -> str:
    """Return the share of the requests within all limits, beside the requested share if there is one."""
    requested = Requested.of(plan).service_level.attainment
    if requested is None:
        limits = "both" if len(limits_of(plan.objective)) == 2 else "the limit"
        return f"{verification.attainment:.0%} within {limits}"
    within = f"{share_within(verification.attainment, requested)} of the requests within all limits"
    return f"{within}, {100 * requested:g}% asked for"


def misses(verification: Verification, plan: Plan) -> list[str]:
    """Return the limits that a simulated plan misses, one clause each; empty if it keeps all."""
    if verification.kept:
        return []
    if Requested.of(plan).service_level.attainment is not None:
        over = [attained(verification, plan)]
    else:
        limited = limited_latencies(verification, plan)
        over = [
            f"{one.name} {in_seconds(one.value_s)} of {in_seconds(one.limit_s)}"
            for one in limited
            if one.value_s > one.limit_s
        ]
    return [*(["requests queue up without end"] if verification.steady is False else []), *over]


def in_seconds(value_s: float) -> str:
    return f"{value_s:,.0f} s" if 1000 <= value_s < math.inf else f"{value_s:.3g} s"  # not 3.45e+03 s
