"""What a plan promises, in words that tables and pages share: its value, beside others and as simulated, and limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.text import Text

from hetis.formats.models.dtypes import precision_of
from hetis.planner.report.figures import digits, percent, percent_at_least, percent_of_gap, seconds, with_unit
from hetis.planner.report.replica import known_model
from hetis.planner.report.tables import SimulatedWords, SimulationRemarks, kept_words, missed_words
from hetis.planner.use_cases.comparing.plan_figures import kept_of
from hetis.planner.use_cases.record.forms import LITTLE_LEFT, Predicted
from hetis.planner.use_cases.record.parts import (
    EqualStages,
    Losses,
    MadeFrom,
    ProfileErrors,
    Requested,
    Verified,
)
from hetis.planner.use_cases.service_level import DEFAULT, Latency, limits_of
from hetis.planner.use_cases.verification.outcome import MISSES_AT, OUT_OF_TIME, attained, misses, stopped_simulation_of
from hetis.solver.plan import ObjectiveKind, Plan, Role, Status

SAME_RATE = 1e-6  # relative difference of two rates that rounding may cause
NEARLY = 0.95  # share of the slowest replica's latency from which another replica counts as equally slow


def misses_as_planned(plan: Plan) -> bool:
    """Return whether simulated traffic misses limits at the planned goodput, and no lower rate was decided."""
    stopped = stopped_simulation_of(plan)
    return stopped is not None and bool(stopped.missed) and plan.objective.kind is ObjectiveKind.GOODPUT


def is_simulated(plan: Plan) -> bool:
    """Return whether the value is what simulated traffic kept, not the model's, with which other setups compare."""
    return Verified.of(plan).model_value is not None


def value_by_model(plan: Plan) -> float:
    """Return the plan's value by the model, which is its own unless simulated traffic kept another."""
    found = Verified.of(plan).model_value
    return plan.result.value if found is None else found


def kept_cell(plan: Plan, *, unknown: str) -> Text:
    """Return the rate at which simulated traffic kept the limits, or ``unknown`` without a simulation."""
    kept = kept_of(plan)
    if kept is None:
        return Text(unknown)
    return Text(digits(kept.rate_rps) if kept.rate_rps else "none", style="" if kept.is_all else "red")


def misses_demand(plan: Plan) -> bool:
    """Return whether a plan of the highest rate promises less than the demanded one.

    Plans of least cost are found for the demanded rate; `Simulated` says if traffic of this rate misses their limits.
    """
    demand_rps = plan.objective.demand_rps
    if demand_rps is None or not plan.objective.maximises:
        return False
    return plan.result.value < demand_rps * (1.0 - SAME_RATE)


def demand_words(plan: Plan, demand_rps: float | None) -> Text | None:
    """Return the demanded rate, and whether the plan misses it; None: none is demanded."""
    if demand_rps is None:
        return None
    demand = Text(f"{digits(demand_rps, 4)} requests/s")
    return Text.assemble(demand, "  ", ("not met", "bold red")) if misses_demand(plan) else demand


def losses(plan: Plan) -> str:
    """Return the share that is still served without the worst node or zone; empty if not requested."""
    return "; ".join(
        f"after losing any one {kind}: at least {percent_at_least(loss.share)} still served (worst: {loss.name})"
        if loss.rate
        else f"after losing any one {kind}: nothing still served (worst: {loss.name})"
        for kind, loss in Losses.of(plan).by_place.items()
    )


def precision(plan: Plan) -> str | None:
    """Return the precision of the weights and KV, or None if the plan does not contain its model.

    GPUs without bfloat16 compute in float16 instead, as do all of their replica.
    """
    from hetis.engines.gpus import common_dtype, kind_of, kinds_in

    model = known_model(plan)
    if model is None:
        return None
    words, own = precision_of(model), kinds_in(MadeFrom.of(plan).document("cluster"))
    stages = {stage.gpu for replica in plan.replicas for stage in replica.stages}
    without = [gpu for gpu in sorted(stages) if common_dtype([kind_of(gpu, own)]) != "auto"]
    return words if not without or "bf16" not in words else f"{words}; fp16 for bf16 on {', '.join(without)}"


def loses_most(plan: Plan) -> bool:
    """Return whether less than half is still served without some node or zone."""
    return any(loss.share < LITTLE_LEFT for loss in Losses.of(plan).by_place.values())


def beside_equal_stages(plan: Plan) -> str | None:
    """Return the value of equal stages, as in a set-up without a planner, or None if not requested.

    Both are the model's values.
    """
    best, unit = EqualStages.of(plan).best, plan.result.unit
    if best is None:
        return None
    equal = "replicas of equal stages"
    if excludes_unified(plan):
        equal = f"unified {equal}, which --roles excludes"
    if (alone := best.value) is None:
        return f"{equal}: none keep the limits"
    if alone <= 0:
        return None
    by_model, beside = with_unit(alone, unit), _beside(value_by_model(plan), alone)
    if not is_simulated(plan):
        return f"{by_model} by {equal}; this plan {beside}"
    simulated = "not simulated"
    is_as_good = math.isclose(alone, value_by_model(plan), rel_tol=1e-3)  # often the same plan
    if plan.objective.maximises and plan.result.value < alone and not is_as_good and not excludes_unified(plan):
        simulated += ", may keep more than this plan: --strategy uniform"
    return f"{by_model} by the model, by {equal} ({simulated}); this plan by the model {beside}"


def excludes_unified(plan: Plan) -> bool:
    """Return whether equal stages, whose replicas are always unified, are no plans of the family that was searched."""
    roles = Requested.of(plan).roles
    return bool(roles) and Role.UNIFIED not in roles


def by_unified(plan: Plan) -> str:
    """Return what follows the name of setups with equal stages if the plan's family excludes them; empty if not."""
    return " by unified replicas, which --roles excludes" if excludes_unified(plan) else ""


def simple_setups(plan: Plan) -> list[str]:
    """Return the setups that users try first, equal stages with one TP size everywhere, and their relative values."""
    by_model = " by the model" if is_simulated(plan) else ""
    lines = []
    for tp, value in EqualStages.of(plan).by_size.items():
        name = "one GPU per stage" if tp == "1" else f"TP{tp} in every replica"
        if value is not None and value > 0:
            lines.append(
                f"{name}: {with_unit(value, plan.result.unit)}, {_beside(value, value_by_model(plan))}{by_model}"
            )
        else:
            lines.append(f"{name}: none that keeps the limits")
    return lines


def _beside(value: float, other: float) -> str:
    """Return the difference as ``7.38% more``, ``15% less``, ``the same``."""
    ratio = value / other - 1.0 if other else 0.0
    return "the same" if not ratio else f"{percent(abs(ratio))} {'more' if ratio > 0 else 'less'}"


def range_of(plan: Plan) -> Predicted | None:
    """Return the ranges that the errors of the profiles leave, or None if the plan has none."""
    return ProfileErrors.of(plan).errors.predicted


def verdict(plan: Plan) -> str:
    """Return what is proven of a plan; the bound of a tenant's plan is that of the whole fleet to itself."""
    result = plan.result
    # Other statistics or a share are only simulated, and another plan may keep them at a higher rate.
    of = "" if Requested.of(plan).service_level == DEFAULT else f" for {DEFAULT.ttft} TTFT and {DEFAULT.tpot} TPOT"
    if result.status is Status.OPTIMAL:
        return f"proven optimal{of}: no plan of the family is better"
    better = result.objective.goal.better
    # A search for the least cost or GPUs that was stopped early has a bound of 0, which says nothing.
    if not math.isfinite(result.gap) or not (plan.objective.maximises or result.bound > 0):
        return f"no bound: it is unknown how much {better} a plan could be"
    if plan.other_tenants():
        claim = f"proven{of}: even with the whole fleet to itself not over {percent_of_gap(result.gap)} {better}"
    else:
        claim = f"proven{of}: no plan of the family is over {percent_of_gap(result.gap)} {better}"
    return f"interrupted; {claim}" if result.status is Status.INTERRUPTED else claim


class Reached(NamedTuple):
    """The planned value of TTFT or TPOT in the replica where it is highest, which every replica's limit is held to.

    ``is_slowest``: another replica is notably faster, so that the value is not that of all requests together.
    ``limit_of``: what the limit was given for if that is another statistic than the value's; empty: it is the same.
    """

    name: str
    value_s: float
    limit_s: float | None
    is_slowest: bool
    limit_of: str

    def remarks(self) -> list[str]:
        """Return what a reader must know to compare the value with its limit."""
        remarks = ["slowest replica"] if self.is_slowest else []
        return [*remarks, *([f"limit for {self.limit_of}"] if self.limit_of and self.limit_s is not None else [])]


def limits(plan: Plan) -> Iterator[Reached]:
    """Yield the planned TTFT and TPOT with their limits; nothing for a plan without replicas."""
    if plan.replicas:
        ttfts = [one.ttft_s for one in plan.replicas if one.role is not Role.DECODE]
        yield _reached(Latency.TTFT, ttfts, plan.objective.ttft_limit_s, plan)
        if MadeFrom.of(plan).has_tpot():
            tpots = [one.tpot_s for one in plan.replicas if one.role is not Role.PREFILL]
            yield _reached(Latency.TPOT, tpots, plan.objective.tpot_limit_s, plan)


def _reached(latency: Latency, values_s: Sequence[float], limit_s: float | None, plan: Plan) -> Reached:
    value_s, level, planned = max(values_s, default=0.0), Requested.of(plan).service_level, DEFAULT.statistic(latency)
    limit_of = "" if level.statistic(latency) is planned else str(level.statistic(latency))
    if level.attainment is not None:
        limit_of = f"{100 * level.attainment:g}% of the requests"
    is_slowest = any(one < NEARLY * value_s for one in values_s)
    return Reached(f"{latency} {planned}", value_s, limit_s, is_slowest, limit_of)


def simulated_words(plan: Plan) -> SimulatedWords | None:
    """Return the simulated outcome for the limits, shown after the model's values; None: no simulation was wanted."""
    found, stopped = Verified.of(plan).verification, stopped_simulation_of(plan)
    if found is None:
        if stopped is None:
            return None
        in_time = " in the time limit" if stopped.why == OUT_OF_TIME else ""
        if stopped.missed:
            rest = f" at{stopped.missed.removeprefix(MISSES_AT)}; lower rates not decided{in_time}"
            return SimulatedWords("MISSED", "bold red", rest)
        word = f"not decided{in_time}" if in_time else "no: stopped before that"
        return SimulatedWords(word, "yellow", "; all values are the model's")
    level, remarks = Requested.of(plan).service_level, SimulationRemarks.of(found)
    if not found.kept:
        return missed_words(found.rate_rps, misses(found, plan), found.kept_rps, remarks)
    limits_s = {} if level.attainment is not None else limits_of(plan.objective)

    def words_of(latency: Latency) -> str:
        value_s, limit_s = found.seconds(latency), limits_s.get(latency, math.inf)
        over = f" (over {seconds(limit_s)} by chance)" if value_s > limit_s else ""
        return f"{latency} {level.statistic(latency)} {seconds(value_s)}{over}"

    shown = (one for one in Latency if one is Latency.TTFT or MadeFrom.of(plan).has_tpot())
    return kept_words(found.rate_rps, map(words_of, shown), attained(found, plan), found.kept_rps, remarks)
