"""Several plans on one page: on one scale and in one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from hetis.planner.report.comparison import SIMULATED_MEANS
from hetis.planner.report.figures import digits, percent, seconds, tokens
from hetis.planner.report.page.blocks import Block, Grid, Scale, ScaleRow
from hetis.planner.report.plan import kept_cell
from hetis.planner.use_cases.compare import best_of, figures_of, kept_of
from hetis.planner.use_cases.sources import Inputs
from hetis.solver.plan import Objective, Plan
from hetis.solver.problem import PlacementProblem

ROOM = 1.02  # ratio of an axis to its longest bar


def side_by_side(rows: Sequence[tuple[str, Plan, Inputs | PlacementProblem]], objective: Objective) -> Iterator[Block]:
    """Yield the plans on one scale and in one table, with the best one in bold."""
    if not rows:
        return
    best = best_of([plan for _, plan, _ in rows])
    known = [plan.result.value for _, plan, _ in rows]
    known += [plan.result.bound for _, plan, _ in rows if math.isfinite(plan.result.bound)]
    axis = max(known) * ROOM or 1.0
    are_simulated = any(kept_of(plan) is not None for _, plan, _ in rows)
    yield Scale(
        title=f"{objective.kind.value.capitalize()} by the model, {objective.unit}",
        rows=tuple(
            ScaleRow(
                label=name,
                text=digits(plan.result.value, 4),
                share=plan.result.value / axis,
                mark=plan.result.bound / axis if math.isfinite(plan.result.bound) else None,
                strong=number == best,
            )
            for number, (name, plan, _) in enumerate(rows)
        ),
        note="The line is what no plan of the family can exceed." if objective.maximises else
        "The line is what no plan of the family can go below.",
    )  # fmt: skip
    yield Grid(
        title="In figures",
        columns=(
            "'", "requests/s", "kept", "output tokens/s", "bound", "gap", "USD/h", "USD per M tokens",
            "TTFT p95", "TPOT mean", "KV tokens", "GPUs", "idle",
        ),
        rows=tuple((name, *_figures_row(plan, inputs)) for name, plan, inputs in rows),
        strong=best,
        note=SIMULATED_MEANS if are_simulated else "",
    )  # fmt: skip


def _figures_row(plan: Plan, inputs: Inputs | PlacementProblem) -> tuple[str, ...]:
    figures, result = figures_of(plan, inputs), plan.result
    dollars, per_million = figures.usd_per_hour, figures.usd_per_million_output_tokens
    return (
        digits(figures.rate_rps),
        kept_cell(plan, unknown="–").plain,
        digits(figures.output_tokens_per_s),
        digits(result.bound),
        percent(result.gap),
        "–" if dollars is None else digits(dollars),
        "–" if per_million is None else digits(per_million),
        seconds(figures.ttft_s) if plan.replicas else "–",
        seconds(figures.tpot_s) if plan.replicas else "–",
        tokens(figures.kv_tokens),
        f"{figures.gpus_used:,}",
        f"{figures.gpus_idle:,}",
    )
