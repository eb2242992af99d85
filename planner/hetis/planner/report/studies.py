"""Studies attached to a plan, such as its robustness, and the reasons why there is no plan, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.figures import digits, percent, plural, seconds
from hetis.planner.report.tables import facts, section, table
from hetis.planner.use_cases.robustness.study import Regret, Robustness, RunnerUpPlan, Spread
from hetis.solver.errors import InfeasibleError
from hetis.solver.placement.infeasible import ExplainedInfeasibleError
from hetis.solver.plan import Objective, ObjectiveKind

MAX_CORNERS = 5  # corners shown; JSON has all
MAX_SHAPES = 3  # shapes shown per runner-up


def render_robustness(robustness: Robustness, objective: Objective) -> RenderableType:
    title = f"Every coefficient of the profiles off by up to {percent(robustness.error)}"
    parts: list[RenderableType] = [_spreads(robustness, objective), facts(_facts(robustness, objective))]
    if robustness.corners:
        parts += [Text("Corner cases, the slowest first", style="dim"), _corners(robustness)]
    if not robustness.complete:
        parts.append(Text("the time limit or Ctrl-C ended the study before it was complete", style="yellow"))
    return section(title, Group(*parts))


def _spreads(robustness: Robustness, objective: Objective) -> Table:
    def rate(value: float) -> str:
        return f"{digits(value)}/s"

    kind = "Throughput" if objective.kind is ObjectiveKind.THROUGHPUT else "Goodput"
    rows: list[tuple[str, Spread, Callable[[float], str]]] = [
        (kind, robustness.rate, rate),
        *([("  within limits", robustness.rate_within, rate)] if has_limits(objective) else []),
        ("TTFT p95", robustness.ttft_s, seconds),
        ("TPOT mean", robustness.tpot_s, seconds),
    ]
    cells = ((name, *map(words, (of.planned, of.p5, of.median, of.p95, of.worst))) for name, of, words in rows)
    return table("'", "planned", "p5", "median", "p95", "worst", rows=cells, fixed=True)


def has_limits(objective: Objective) -> bool:
    return (objective.ttft_limit_s, objective.tpot_limit_s) != (None, None)


def _facts(robustness: Robustness, objective: Objective) -> Iterator[tuple[str, str]]:
    samples = f"{plural(robustness.samples, 'sample')}, seed {robustness.seed}"
    yield "Samples", f"{samples}; worst includes {plural(len(robustness.corners), 'corner case')}"
    if has_limits(objective):
        yield "Limits", f"missed in {percent(robustness.missed)} of the samples with the planned micro-batches"
    if robustness.short is not None:
        yield "Demand", f"not reached within limits in {percent(robustness.short)} of the samples"
    if robustness.regret is not None:
        yield "Regret", _regret(robustness.regret)
    if robustness.runner_up is not None:
        yield "Runner-up", _runner_up(robustness.runner_up, robustness.rate_within.planned)


def _regret(regret: Regret) -> str:
    chose = "none" if regret.other_replicas == 0 else str(regret.other_replicas)
    return (
        f"{percent(regret.mean)} of the best rate on average, {percent(regret.worst)} at most (proven: "
        f"{percent(regret.bound)}); {chose} of {regret.searches} searches under such profiles chose other replicas"
    )


def _runner_up(runner_up: RunnerUpPlan, planned: float) -> str:
    shapes = [f"{count} × ({shape})" for shape, count in runner_up.replicas.items()]
    more = f" and {plural(len(shapes) - MAX_SHAPES, 'more shape')}" if len(shapes) > MAX_SHAPES else ""
    less = f" ({100 * (runner_up.rate / planned - 1):+.1f}%)" if planned > 0 else ""
    better = "none of the samples"
    if runner_up.better:
        gains = f"by {percent(runner_up.mean_gain)} on average, {percent(runner_up.most_gain)} at most"
        better = f"{percent(runner_up.better)} of the samples, {gains}"
    return f"{digits(runner_up.rate)} requests/s{less}: {', '.join(shapes[:MAX_SHAPES])}{more}; better in {better}"


def _corners(robustness: Robustness) -> Table:
    rows = (
        (
            corner.name,
            f"{digits(corner.rate)}/s",
            f"TTFT {seconds(corner.ttft_s)}",
            f"TPOT {seconds(corner.tpot_s)}",
            Text("misses a limit" if corner.misses else "", style="yellow"),
        )
        for corner in sorted(robustness.corners, key=lambda one: one.rate)[:MAX_CORNERS]
    )
    made = table("'", "", "", "", "'", rows=rows, fixed=True)
    made.show_header = False
    return made


def infeasible_parts(error: InfeasibleError) -> dict[str, Any]:
    """Return ``reasons`` as sentences, and ``conflicts`` and ``relaxations`` if the solver found them."""
    reasons = {"reasons": list(error.reasons)}
    if not isinstance(error, ExplainedInfeasibleError):
        return reasons
    return reasons | {
        "conflicts": [
            {
                "members": [
                    {"subject": one.subject.name.lower(), "name": str(one), "value": one.value or None}
                    for one in conflict.members
                ],
                "minimal": conflict.is_minimal,
            }
            for conflict in error.why.conflicts
        ],
        "relaxations": [
            {
                "of": None if one.about is None else str(one.about),
                "change": one.change,
                "option": one.option or None,
                "usd_per_hour": one.usd_per_hour,
            }
            for one in error.why.relaxations
            if one.is_tried
        ],
    }
