"""Several plans on one page: on one scale and in one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from hetis.planner.report.comparison import simulated_means
from hetis.planner.report.differences import LIMITS, is_one_question
from hetis.planner.report.figures import digits, percent, seconds, tokens
from hetis.planner.report.page.blocks import Block, Grid, Scale, ScaleRow, Sentences
from hetis.planner.report.plan import kept_cell
from hetis.planner.use_cases.compare import best_of, figures_of, kept_of
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem

ROOM = 1.02  # ratio of an axis to its longest bar


def side_by_side(
    rows: Sequence[tuple[str, Plan, Inputs | PlacementProblem]],
    objective: Objective,
    differing: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Block]:
    """Yield the plans on one scale and in one table, with the best one in bold, and in what their problems differ.

    ``differing`` is made by `hetis.planner.report.differences`. Plans that answer different questions have no best
    one, and those with different objectives no scale.
    """
    if not rows:
        return
    best = best_of([plan for _, plan, _ in rows]) if is_one_question(differing) else None
    if len({plan.objective.kind for _, plan, _ in rows}) == 1:
        yield _scale([(name, plan) for name, plan, _ in rows], objective, best)
    are_simulated = any(kept_of(plan) is not None for _, plan, _ in rows)
    limit = ["limit"] if LIMITS in differing else []
    columns = ["'", "requests/s", "kept", "output tokens/s", "bound", "gap", "USD/h", "USD per M tokens"]
    columns += ["TTFT p95", *limit, "TPOT mean", *limit, "KV tokens", "GPUs", "idle"]
    has_units = len({plan.objective.unit for _, plan, _ in rows}) > 1
    yield Grid(
        title="In figures",
        columns=tuple(columns),
        rows=tuple(
            (name, *_figures_row(plan, inputs, has_limits=bool(limit), has_unit=has_units))
            for name, plan, inputs in rows
        ),
        strong=best,
        note=simulated_means(plan for _, plan, _ in rows) if are_simulated else "",
    )
    if differing:
        terms = tuple((f"{subject[0].upper()}{subject[1:]}", words) for subject, words in differing.items())
        yield Sentences(title="What differs", terms=terms)


def _scale(plans: Sequence[tuple[str, Plan]], objective: Objective, best: int | None) -> Scale:
    known = [plan.result.value for _, plan in plans]
    known += [plan.result.bound for _, plan in plans if math.isfinite(plan.result.bound)]
    axis = max(known) * ROOM or 1.0
    return Scale(
        title=f"{objective.kind.value.capitalize()} by the model, {objective.unit}",
        rows=tuple(
            ScaleRow(
                label=name,
                text=digits(plan.result.value, 4),
                share=plan.result.value / axis,
                mark=plan.result.bound / axis if math.isfinite(plan.result.bound) else None,
                strong=number == best,
            )
            for number, (name, plan) in enumerate(plans)
        ),
        note="The line is what no plan of the family can exceed." if objective.maximises else
        "The line is what no plan of the family can go below.",
    )  # fmt: skip


def _figures_row(plan: Plan, inputs: Inputs | PlacementProblem, *, has_limits: bool, has_unit: bool) -> tuple[str, ...]:
    figures, result, objective = figures_of(plan, inputs), plan.result, plan.objective
    dollars, per_million = figures.usd_per_hour, figures.usd_per_million_output_tokens
    limits_s = (objective.ttft_limit_s, objective.tpot_limit_s)
    ttft, tpot = ([("none" if it is None else seconds(it))] if has_limits else [] for it in limits_s)
    return (
        digits(figures.rate_rps),
        kept_cell(plan, unknown="–").plain,
        digits(figures.output_tokens_per_s),
        f"{digits(result.bound)}{f' {objective.unit}' if has_unit else ''}",
        f"{percent(result.gap)}{' with the fleet to itself' if plan.other_tenants() else ''}",
        "–" if dollars is None else digits(dollars),
        "–" if per_million is None else digits(per_million),
        seconds(figures.ttft_s) if plan.replicas else "–",
        *ttft,
        seconds(figures.tpot_s) if plan.replicas else "–",
        *tpot,
        tokens(figures.kv_tokens),
        f"{figures.gpus_used:,}",
        f"{figures.gpus_idle:,}",
    )
