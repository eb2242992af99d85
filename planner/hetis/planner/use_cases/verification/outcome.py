"""What the simulation of a plan, which it records, means for its promise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from hetis.planner.use_cases.record.forms import Verification
from hetis.planner.use_cases.record.parts import Requested, Surviving, Verified
from hetis.planner.use_cases.request import ROUTERS
from hetis.planner.use_cases.service_level import Latency, Statistic, limits_of, share_within
from hetis.planner.use_cases.simulation.simulate import default_rate
from hetis.simulator.values import RouterName, Settings
from hetis.solver.budget import Budget
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, kv_partners, replica_shape
from hetis.solver.plan import Plan, ReplicaPlan, Role, Status
from hetis.solver.problem import PlacementProblem

STOPPED_EARLY = "stopped before its simulation ended: it is not known at which rate traffic keeps the limits"
OUT_OF_TIME = "the limit on simulations ended its own: it is not known at which rate traffic keeps the limits"
MISSES_AT = "simulated traffic misses its limits at"  # how a plan's note begins if no lower rate was decided in time
AS_PLANNED = Settings(dispatch=False, redispatch=False)  # heads as planned: nothing to compile, and fast
NGINX: RouterName = "nginx"  # as exports configure it, but for targets with routers of their own
DISPATCHED = Settings(redispatch=False)  # heads of every request where the dispatcher puts them, as in engines


def router_of(target: str) -> RouterName:
    """Return the router that exports to a target configure; empty: to any that has none of its own."""
    return ROUTERS.get(target, NGINX)


def settings_of(verification: Verification) -> Settings:
    """Return the settings of a plan's simulation."""
    return replace(DISPATCHED if verification.dispatched else AS_PLANNED, router=verification.router or NGINX)


def needs_verifying(plan: Plan) -> bool:
    """Return whether a plan promises a latency that could be missed."""
    return bool(plan.replicas) and (plan.objective.ttft_limit_s, plan.objective.tpot_limit_s) != (None, None)


def promising(plan: Plan) -> Plan:
    """Return the plan without a demand if it maximises its rate: it promises its own, whatever is demanded of it."""
    return replace(plan, objective=replace(plan.objective, demand_rps=None)) if plan.objective.maximises else plan


def rate_to_simulate(plan: Plan, problem: PlacementProblem) -> float:
    """Return the default rate to simulate: the promised demand, or else what the plan keeps."""
    return default_rate(promising(plan), problem)


def restated(plan: Plan, problem: PlacementProblem, utilisation: float) -> Plan:
    """Return a plan of the highest rate at another utilisation, with the value and the TTFT that it then has.

    What was proven of the best plan stays, unless more is kept.
    """
    before, after = (Rederivation(problem.at(share, plan.lanes())) for share in (plan.result.utilisation, utilisation))
    fleet, partners = Fleet.of(problem.cluster), kv_partners(plan, Fleet.of(problem.cluster))

    def at_utilisation(number: int, one: ReplicaPlan) -> ReplicaPlan:
        if one.role is Role.DECODE or not one.rate:
            return one
        shape = replica_shape(one, problem, fleet, partners.get(number, ()))
        own = (derivation.serving(one.classes).of(shape) for derivation in (before, after))
        old_s, new_s = (derived.ttft_s(1.0 / one.rate) for derived in own)
        return replace(one, ttft_s=one.ttft_s + new_s - old_s if math.isfinite(old_s) else new_s)

    value = utilisation * plan.served_rate()
    result = replace(plan.result, value=value).bounded_by(max(plan.result.bound, value))
    if plan.result.status is Status.INTERRUPTED:
        result = replace(result, status=Status.INTERRUPTED)
    replicas = tuple(at_utilisation(number, one) for number, one in enumerate(plan.replicas))
    survives = Surviving.of(plan)
    if survives.left_rps is not None and plan.result.utilisation:
        left_rps = survives.left_rps * utilisation / plan.result.utilisation
        plan = replace(survives, left_rps=left_rps).on(plan)
    # What is simulated need not be modelled.
    result = replace(result, utilisation=utilisation, queued_ttft_s=None)
    return replace(plan, result=result, replicas=replicas)


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


def noted_if_stopped(plan: Plan, budget: Budget) -> Plan:
    """Return the plan with a note if it was to be simulated and was not, since that was cancelled or time ran out."""
    if not budget.is_spent() or not needs_verifying(plan) or Verified.of(plan).verification is not None:
        return plan
    return replace(plan, notes=(*plan.notes, STOPPED_EARLY if budget.cancelled.is_set() else OUT_OF_TIME))


class StoppedSimulation(NamedTuple):
    """A simulation that ended before it decided: why, and the note about the rate that misses limits; empty: none."""

    why: str
    missed: str


def stopped_simulation_of(plan: Plan) -> StoppedSimulation | None:
    """Return what is known of a plan's stopped simulation; None: there is none, or it was not stopped."""
    why = next((note for note in (STOPPED_EARLY, OUT_OF_TIME) if note in plan.notes), None)
    if why is None or Verified.of(plan).verification is not None:
        return None
    return StoppedSimulation(why, next((note for note in plan.notes if note.startswith(MISSES_AT)), ""))


def missed(plan: Plan, allowed_gap: float) -> list[str]:
    """Return the requirements of ``--strict`` that the plan does not meet."""
    result, found = plan.result, []
    if result.gap == float("inf"):
        found.append("the search stopped before it found a bound, so no gap is proven")
    elif result.gap > allowed_gap + 1e-9:
        found.append(f"the gap is {result.gap:.3%}, the target is {allowed_gap:.3%}")
    demand = plan.objective.demand_rps
    if plan.objective.maximises and demand is not None and result.value < demand * (1 - 1e-9):
        found.append(f"the plan serves {result.value:.4g} requests/s, {demand:.4g} are demanded")
    simulated = Verified.of(plan).verification
    if simulated is None and OUT_OF_TIME in plan.notes:
        found += [note for note in plan.notes if note == OUT_OF_TIME or note.startswith(MISSES_AT)]
    if simulated is not None and not simulated.kept:
        found.append(f"simulated at {simulated.rate_rps:.4g} requests/s: {', '.join(misses(simulated, plan))}")
    return found
