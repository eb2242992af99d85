"""The key figures of a plan on a page, and scales of its value and of its limits."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hetis.planner.report import promises
from hetis.planner.report.figures import (
    digits,
    percent,
    percent_at_least,
    plural,
    seconds,
    with_unit,
)
from hetis.planner.report.page.blocks import (
    Scale,
    ScaleRow,
    Tile,
)
from hetis.planner.report.rungs import LITTLE_LEFT
from hetis.planner.report.tables import SimulationRemarks, kept_beyond
from hetis.planner.use_cases.compare import cost_rate, figures_of
from hetis.planner.use_cases.prices import price_of_idle
from hetis.planner.use_cases.record.parts import EqualStages, Losses, Verified
from hetis.planner.use_cases.verification.outcome import (
    OUT_OF_TIME,
    attained,
    limited_latencies,
    misses,
    stopped_simulation_of,
)
from hetis.solver.plan import ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem

AXIS = 1.25  # ratio of an axis to the limit
ROOM = 1.02  # ratio of an axis to its longest bar


def key_tiles(plan: Plan, problem: PlacementProblem) -> Iterator[Tile]:
    by_model, expected = Verified.of(plan).model_value, promises.range_of(plan)
    kind, figures = plan.objective.kind, figures_of(plan, problem)
    span = "" if expected is None else f"{digits(expected.rate.low)} to {digits(expected.rate.high)} by profile errors"
    note = "by the model; simulated traffic misses them" if promises.misses_as_planned(plan) else span
    yield Tile(
        label="Throughput" if kind is ObjectiveKind.THROUGHPUT else "Served within the limits",
        value=digits(figures.rate_rps),
        unit="requests/s",
        note=note if by_model is None else f"simulated; by the model {digits(by_model)}",
    )
    if (demand_rps := plan.objective.demand_rps) is not None:
        missed = promises.misses_demand(plan)
        yield Tile(
            label="Demand",
            value=digits(demand_rps),
            unit="requests/s",
            note="not met" if missed else "",
            tone="bad" if missed else "",
        )
    yield Tile(
        label="Tokens",
        value=digits(figures.output_tokens_per_s),
        unit="output tokens/s",
        note=f"for {digits(figures.prompt_tokens_per_s)} prompt tokens/s",
    )
    if figures.usd_per_hour is None:
        yield Tile(label="Cost", value="unknown", note="a GPU in use has no price")
    else:
        yield Tile(label="Cost", value=digits(figures.usd_per_hour), unit="USD/h", note="of the GPUs in use")
        if figures.usd_per_million_output_tokens is not None:
            dollars = digits(figures.usd_per_million_output_tokens)
            cost_rps = cost_rate(plan)
            at = "" if cost_rps is None else f" at the demanded {digits(cost_rps)} requests/s"
            yield Tile(label="Cost of tokens", value=dollars, unit="USD per million", note=f"output tokens{at}")
    held, idle = len(plan.held_by_others()), figures.gpus_idle
    unused = [f"{held:,} held by other tenants"] if held else []
    wasted = price_of_idle(plan, problem.cluster)
    unused += [f"{idle:,} idle{f' for {digits(wasted)} USD/h' if wasted else ''}"] if idle else []
    yield Tile(
        label="GPUs in use",
        value=f"{figures.gpus_used:,}",
        unit=f"of {problem.cluster.num_gpus():,}",
        note=", ".join([plural(len(plan.replicas), "replica"), *unused]),
    )
    yield from _against_today(plan)
    yield from _simulated(plan)
    for place, loss in Losses.of(plan).by_place.items():
        yield Tile(
            label=f"After losing any one {place}",
            value=percent_at_least(loss.share) if loss.rate else "nothing",
            unit="at least still served" if loss.rate else "still served",
            note=f"worst: {loss.name}",
            tone="bad" if loss.share < LITTLE_LEFT else "",
        )


def _against_today(plan: Plan) -> Iterator[Tile]:
    """Yield the plan beside equal stages, both by the model."""
    equal, ours = EqualStages.of(plan).best, promises.value_by_model(plan)
    theirs = None if equal is None else equal.value
    if theirs is not None and theirs > 0:
        ratio = ours / theirs - 1.0
        good = ratio > 0 if plan.objective.maximises else ratio < 0
        sign = "+" if ratio > 0 else "−" if ratio < 0 else ""
        value = f"{digits(theirs)} {plan.result.unit}{promises.by_unified(plan)}"
        by = "by the model; equal stages, not simulated: " if promises.is_below_model(plan) else "equal stages: "
        yield Tile(
            label="Compared with today's practice",
            value=f"{sign}{percent(abs(ratio))}" if ratio else "the same",
            note=f"{by}{value}",
            tone="good" if good else "",
        )


def _simulated(plan: Plan) -> Iterator[Tile]:
    found = Verified.of(plan).verification
    if found is None:
        stopped = stopped_simulation_of(plan)
        if stopped is not None and stopped.missed:
            yield Tile(label="Simulated", value="MISSED", note=f"{stopped.missed}; {stopped.why}", tone="bad")
        elif stopped is not None:
            value = "not decided" if stopped.why == OUT_OF_TIME else "no"
            yield Tile(label="Simulated", value=value, note=stopped.why)
        return
    said = "".join(f"; {line}" for line in SimulationRemarks.of(found).lines())
    if found.kept:
        beyond = kept_beyond(found.rate_rps, found.kept_rps)
        note = f"at {digits(found.rate_rps)} requests/s; {attained(found, plan)}{beyond}{said}"
        yield Tile(label="Simulated", value="limits kept", note=note, tone="" if found.too_short else "good")
    else:
        until = "no rate tried keeps them" if found.kept_rps is None else f"kept up to {digits(found.kept_rps)}/s"
        yield Tile(
            label="Simulated", value="MISSED", note="; ".join([*misses(found, plan)[:1], until]) + said, tone="bad"
        )


def worth_scale(plan: Plan) -> Scale:
    """Return the value next to its bound and to equal stages, today's practice."""
    result, expected = plan.result, promises.range_of(plan)
    equal = EqualStages.of(plan).best
    beside = 0.0 if equal is None else equal.value or 0.0
    band = (expected.rate.low, expected.rate.high) if expected is not None and plan.objective.maximises else None
    known = [
        promises.value_by_model(plan),
        beside,
        *(band or ()),
        *([result.bound] if math.isfinite(result.bound) else []),
    ]
    axis = max(known) * ROOM or 1.0
    rows = [
        ScaleRow(
            label="This plan",
            text=with_unit(result.value, result.unit),
            share=result.value / axis,
            band=(band[0] / axis, band[1] / axis) if band else None,
            mark=result.bound / axis if math.isfinite(result.bound) else None,
            strong=True,
        )
    ]
    if (by_model := Verified.of(plan).model_value) is not None:
        rows.append(ScaleRow(label="By the model", text=with_unit(by_model, result.unit), share=by_model / axis))
    if beside:
        label = "Equal stages (unified)" if promises.excludes_unified(plan) else "Equal stages"
        rows.append(ScaleRow(label=label, text=with_unit(beside, result.unit), share=beside / axis))
    bound = f"bound {with_unit(result.bound, result.unit)}" if math.isfinite(result.bound) else "no bound"
    notes = [f"The line is the {bound}: {promises.verdict(plan)}."]
    if band:
        notes.append("The band shows the effect of the errors of the profiles.")
    if (words := promises.beside_equal_stages(plan)) is not None:
        notes.append(f"Equal stages are the usual setup of engines without a planner: {words}.")
    if engines := promises.beside_engines(plan):
        notes.append(f"What other engines would serve: {'; '.join(engines)}.")
    return Scale(title=f"How good it is: {result.objective.value}", rows=tuple(rows), note=" ".join(notes))


def limits_scale(plan: Plan) -> Scale:
    simulated, rows, without = Verified.of(plan).verification, list[ScaleRow](), list[str]()
    found = [] if simulated is None else limited_latencies(simulated, plan)
    for each in promises.limits(plan):
        name, reached, limit = each.name, each.value_s, each.limit_s
        remarks = f" ({', '.join(each.remarks())})" if each.remarks() else ""
        if limit is None:
            without.append(f"{name} {seconds(reached)}{remarks}")
            continue
        values = [(f"{name}, planned{remarks}", reached)]
        values += [(f"{one.name}, simulated", one.value_s) for one in found if name.startswith(one.latency)]
        axis = max(AXIS * limit, *(value * ROOM for _, value in values))
        for label, value in values:
            rows.append(
                ScaleRow(
                    label=label,
                    text=f"{seconds(value)} of {seconds(limit)} ({percent(value / limit)})",
                    share=value / axis,
                    mark=limit / axis,
                    tone="bad" if value > limit * (1 + 1e-9) else "",
                )
            )
    notes = ["The line is the limit."] if rows else []
    if simulated is not None and simulated.kept and any(row.tone for row in rows):
        notes.append("A simulated value above its limit may be due to chance: its interval extends below the limit.")
    if without:
        notes.append(f"Without a limit: {', '.join(without)}.")
    return Scale(title="Latency limits", rows=tuple(rows), note=" ".join(notes))
