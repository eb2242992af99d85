"""The key figures of a plan on a page, and scales of its value and of its limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from hetis.planner.report import promises
from hetis.planner.report.blocks import Bar, Scale, Tile
from hetis.planner.report.figures import digits, percent, percent_at_least, plural, seconds, with_unit
from hetis.planner.use_cases.comparing.plan_figures import cost_rate, figures_of
from hetis.planner.use_cases.prices import price_of_idle
from hetis.planner.use_cases.record.forms import LITTLE_LEFT
from hetis.planner.use_cases.record.parts import EqualStages, Losses, Verified
from hetis.planner.use_cases.verification.outcome import limited_latencies
from hetis.solver.plan import ObjectiveKind, Plan
from hetis.solver.problem import PlacementProblem

AXIS = 1.25  # ratio of an axis to the limit
ROOM = 1.02  # ratio of an axis to its longest bar


def key_tiles(plan: Plan, problem: PlacementProblem) -> Iterator[Tile]:
    figures = figures_of(plan, problem)
    label = "Throughput" if plan.objective.kind is ObjectiveKind.THROUGHPUT else "Served within the limits"
    yield Tile(label, digits(figures.rate_rps), "requests/s", _whose_value(plan))
    if (demand_rps := plan.objective.demand_rps) is not None:
        note, tone = ("not met", "bad") if promises.misses_demand(plan) else ("", "")
        yield Tile("Demand", digits(demand_rps), "requests/s", note, tone)
    prompts = f"for {digits(figures.prompt_tokens_per_s)} prompt tokens/s"
    yield Tile("Tokens", digits(figures.output_tokens_per_s), "output tokens/s", prompts)
    if figures.usd_per_hour is None:
        yield Tile("Cost", "unknown", note="a GPU in use has no price")
    else:
        yield Tile("Cost", digits(figures.usd_per_hour), "USD/h", "of the GPUs in use")
    if (dollars := figures.usd_per_million_output_tokens) is not None:
        cost_rps = cost_rate(plan)
        at = "" if cost_rps is None else f" at the demanded {digits(cost_rps)} requests/s"
        yield Tile("Cost of tokens", digits(dollars), "USD per million", f"output tokens{at}")
    notes, held = [plural(len(plan.replicas), "replica")], len(plan.held_by_others())
    notes += [f"{held:,} held by other tenants"] if held else []
    if figures.gpus_idle:
        wasted = price_of_idle(plan, problem.cluster)
        notes.append(f"{figures.gpus_idle:,} idle" + (f" for {digits(wasted)} USD/h" if wasted else ""))
    yield Tile("GPUs in use", f"{figures.gpus_used:,}", f"of {problem.cluster.num_gpus():,}", ", ".join(notes))
    yield from _against_today(plan)
    yield from _simulated(plan)
    for place, loss in Losses.of(plan).by_place.items():
        value, unit = (
            (percent_at_least(loss.share), "at least still served") if loss.rate else ("nothing", "still served")
        )
        tone = "bad" if loss.share < LITTLE_LEFT else ""
        yield Tile(f"After losing any one {place}", value, unit, f"worst: {loss.name}", tone)


def _whose_value(plan: Plan) -> str:
    """Return where the served rate comes from, and how far the errors of the profiles may change it."""
    by_model, expected = Verified.of(plan).model_value, promises.range_of(plan)
    if by_model is not None:
        return f"simulated; by the model {digits(by_model)}"
    if promises.misses_as_planned(plan):
        return "by the model; simulated traffic misses them"
    return "" if expected is None else f"{digits(expected.rate.low)} to {digits(expected.rate.high)} by profile errors"


def _against_today(plan: Plan) -> Iterator[Tile]:
    """Yield the plan beside equal stages, both by the model."""
    equal, ours = EqualStages.of(plan).best, promises.value_by_model(plan)
    if equal is None or equal.value is None or equal.value <= 0:
        return
    ratio = ours / equal.value - 1.0
    is_good = ratio > 0 if plan.objective.maximises else ratio < 0
    value = f"{'+' if ratio > 0 else '−'}{percent(abs(ratio))}" if ratio else "the same"
    by = "by the model; equal stages, not simulated: " if promises.is_simulated(plan) else "equal stages: "
    note = f"{by}{digits(equal.value)} {plan.result.unit}{promises.by_unified(plan)}"
    yield Tile("Compared with today's practice", value, note=note, tone="good" if is_good else "")


def _simulated(plan: Plan) -> Iterator[Tile]:
    if (found := promises.simulated_words(plan)) is not None:
        note = "; ".join([found.rest.strip(" ;"), *found.remarks.lines()])
        yield Tile("Simulated", found.word, note=note, tone=_TONES.get(found.style, ""))


_TONES = {"green": "good", "bold red": "bad"}


def worth_scale(plan: Plan) -> Scale:
    """Return the value next to its bound and to equal stages, today's practice."""
    result, expected, equal = plan.result, promises.range_of(plan), EqualStages.of(plan).best
    by_model, bound = Verified.of(plan).model_value, result.bound if math.isfinite(result.bound) else None
    beside = 0.0 if equal is None else equal.value or 0.0
    band = (expected.rate.low, expected.rate.high) if expected is not None and plan.objective.maximises else None
    axis = max(promises.value_by_model(plan), beside, *(band or ()), bound or 0.0) * ROOM or 1.0

    def bar(label: str, value: float, **more: Any) -> Bar:
        return Bar(label, with_unit(value, result.unit), value / axis, **more)

    rows = [
        bar(
            "This plan",
            result.value,
            band=band and (band[0] / axis, band[1] / axis),
            mark=None if bound is None else bound / axis,
            strong=True,
        )
    ]
    if by_model is not None:
        rows.append(bar("By the model", by_model))
    if beside:
        rows.append(bar("Equal stages (unified)" if promises.excludes_unified(plan) else "Equal stages", beside))
    line = "no bound" if bound is None else f"bound {with_unit(bound, result.unit)}"
    notes = [f"The line is the {line}: {promises.verdict(plan)}."]
    if band:
        notes.append("The band shows the effect of the errors of the profiles.")
    if (words := promises.beside_equal_stages(plan)) is not None:
        notes.append(f"Equal stages are the usual setup of engines without a planner: {words}.")
    return Scale(title=f"How good it is: {result.objective.value}", rows=rows, note=" ".join(notes))


def limits_scale(plan: Plan) -> Scale:
    simulated, rows, without = Verified.of(plan).verification, list[Bar](), list[str]()
    found = [] if simulated is None else limited_latencies(simulated, plan)
    for each in promises.limits(plan):
        remarks = f" ({', '.join(each.remarks())})" if each.remarks() else ""
        if (limit := each.limit_s) is None:
            without.append(f"{each.name} {seconds(each.value_s)}{remarks}")
            continue
        values = [(f"{each.name}, planned{remarks}", each.value_s)]
        values += [(f"{one.name}, simulated", one.value_s) for one in found if each.name.startswith(one.latency)]
        axis = max(AXIS * limit, *(value * ROOM for _, value in values))
        for label, value in values:
            text = f"{seconds(value)} of {seconds(limit)} ({percent(value / limit)})"
            tone = "bad" if value > limit * (1 + 1e-9) else ""
            rows.append(Bar(label, text, value / axis, mark=limit / axis, tone=tone))
    notes = ["The line is the limit."] if rows else []
    if simulated is not None and simulated.kept and any(row.tone for row in rows):
        notes.append("A simulated value above its limit may be due to chance: its interval extends below the limit.")
    if without:
        notes.append(f"Without a limit: {', '.join(without)}.")
    return Scale(title="Latency limits", rows=rows, note=" ".join(notes))
