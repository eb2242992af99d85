"""The result of simulating a plan before it is shown, which the plan stores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from hetis.planner.use_cases.service_level import Latency, Statistic, limits_of, service_level_of, share_within
from hetis.planner.use_cases.simulate import default_rate
from hetis.simulator.values import Settings
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

VERIFICATION = "verification"  # entry of `Plan.inputs`
AS_PLANNED = Settings(dispatch=False, redispatch=False)  # heads as planned: nothing to compile, and fast
DISPATCHED = Settings(redispatch=False)  # heads of every request where the dispatcher puts them, as in engines


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A plan's behaviour under Poisson arrivals at its planned rate."""

    rate_rps: float  # rate of the arrivals, which the plan promises
    num_requests: int  # requests per run
    kept: bool  # whether the load was carried, with no latency above its limit by more than chance
    steady: bool | None  # whether the queue did not grow; None: the run was too short to tell
    ttft_p95_s: float  # over all requests of the run, after the warm-up
    tpot_mean_s: float  # over all requests of the run, after the warm-up
    attainment: float  # share of the requests within both limits
    # The highest rate that kept the limits in a simulation. If ``kept``, ``rate_rps`` or the first of `MORE` times
    # ``rate_rps`` that kept them by more than chance, which is tried for plans of the highest rate unless runs are slow
    # (with attention workers). Otherwise a lower rate that kept them by more than chance; None: none of those tried.
    kept_rps: float | None
    # The following fields are missing in earlier plans.
    ttft_s: float | None = None  # the statistic to which the plan is held, if that is not p95
    tpot_s: float | None = None  # the statistic to which the plan is held, if that is not the mean
    # The share of the requests over each limit, if the plan is held to a share of requests; None: there is no limit
    ttft_missed: float | None = None
    tpot_missed: float | None = None
    share: float | None = None  # share of the rate, at which as large a part of the replicas ran; None: all ran
    too_short: bool | None = None  # whether runs cannot fill even the seats of that part; None: they do
    dispatched: bool | None = None  # whether heads were dispatched per request; None: they were split as planned

    @property
    def settings(self) -> Settings:
        """The settings of the simulation."""
        return DISPATCHED if self.dispatched else AS_PLANNED

    def seconds(self, latency: Latency) -> float:
        """Return the simulated latency in the statistic to which the plan is held."""
        if latency is Latency.TTFT:
            return self.ttft_p95_s if self.ttft_s is None else self.ttft_s
        return self.tpot_mean_s if self.tpot_s is None else self.tpot_s


def verification_of(plan: Plan) -> Verification | None:
    """Return what `verified` stored, or None if that is missing or unreadable."""
    found = plan.inputs.get(VERIFICATION)
    names = [field.name for field in fields(Verification)]
    optional = [field.name for field in fields(Verification) if field.default is None]
    if not isinstance(found, Mapping) or not found.keys() >= {*names}.difference(optional):
        return None
    values: dict[str, Any] = {name: found.get(name) for name in names}
    numbers = [values[name] for name in ("rate_rps", "num_requests", "ttft_p95_s", "tpot_mean_s", "attainment")]
    numbers += [values[name] or 0.0 for name in ("kept_rps", *optional)]
    if not all(isinstance(number, int | float) for number in numbers):
        return None
    shares = values["attainment"], 1.0 if values["share"] is None else values["share"]
    return Verification(**values) if 0.0 <= shares[0] <= 1.0 and 0.0 < shares[1] <= 1.0 else None


def kept_rate(plan: Plan) -> float | None:
    """Return the highest rate at which simulated traffic kept the limits, if it did not at the plan's own rate.

    None if the plan was not simulated, or kept the limits, or kept them at none of the rates tried.
    """
    found = verification_of(plan)
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
    level, limits = service_level_of(plan), limits_of(plan.objective)
    return [
        LimitedLatency(latency, level.statistic(latency), verification.seconds(latency), limit_s)
        for latency, limit_s in limits.items()
    ]


def attained(verification: Verification, plan: Plan) -> str:
    """Return the share of the requests within all limits, beside the requested share if there is one."""
    asked = service_level_of(plan).attainment
    if asked is None:
        limits = "both" if len(limits_of(plan.objective)) == 2 else "the limit"
        return f"{verification.attainment:.0%} within {limits}"
    return (
        f"{share_within(verification.attainment, asked)} of the requests within all limits, {100 * asked:g}% asked for"
    )


def misses(verification: Verification, plan: Plan) -> list[str]:
    """Return the limits that a simulated plan misses, one clause each; empty if it keeps all."""
    if verification.kept:
        return []
    if service_level_of(plan).attainment is not None:
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
