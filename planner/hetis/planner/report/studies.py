"""Studies attached to a plan, such as its robustness, and the reasons why there is no plan, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.figures import digits, percent, plural, seconds
from hetis.planner.report.tables import facts, section, table
from hetis.planner.use_cases.robustness.study import Regret, Robustness, RunnerUpPlan, Spread
from hetis.solver.errors import InfeasibleError
from hetis.solver.placement.infeasible import Conflict, ExplainedInfeasibleError, Relaxation
from hetis.solver.plan import Objective, ObjectiveKind

MAX_CORNERS = 5  # corners shown; JSON has all
MAX_SHAPES = 3  # shapes shown per runner-up


def render_robustness(robustness: Robustness, objective: Objective) -> RenderableType:
    title = f"Every coefficient of the profiles off by up to {percent(robustness.error)}"
    return section(title, Group(*_parts(robustness, objective)))


def _parts(robustness: Robustness, objective: Objective) -> Iterator[RenderableType]:
    yield _spreads(robustness, objective)
    yield facts(_facts(robustness, objective))
    if robustness.corners:
        yield Text("Corner cases, the slowest first", style="dim")
        yield _corners(robustness)
    if not robustness.complete:
        yield Text("the time limit or Ctrl-C ended the study before it was complete", style="yellow")


def _spreads(robustness: Robustness, objective: Objective) -> Table:
    def row(name: str, spread: Spread, words: Callable[[float], str]) -> list[str]:
        return [name, *map(words, (spread.planned, spread.p5, spread.median, spread.p95, spread.worst))]

    def rate(value: float) -> str:
        return f"{digits(value)}/s"

    rows = [row("Throughput" if objective.kind is ObjectiveKind.THROUGHPUT else "Goodput", robustness.rate, rate)]
    if has_limits(objective):
        rows.append(row("  within limits", robustness.rate_within, rate))
    rows += [row("TTFT p95", robustness.ttft_s, seconds), row("TPOT mean", robustness.tpot_s, seconds)]
    return table("'", "planned", "p5", "median", "p95", "worst", rows=rows, fixed=True)


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
    text = f"{digits(runner_up.rate)} requests/s"
    if planned > 0:
        text += f" ({100 * (runner_up.rate / planned - 1):+.1f}%)"
    text += f": {', '.join(shapes[:MAX_SHAPES])}{more}; "
    if runner_up.better == 0:
        return text + "better in none of the samples"
    gains = f"by {percent(runner_up.mean_gain)} on average, {percent(runner_up.most_gain)} at most"
    return text + f"better in {percent(runner_up.better)} of the samples, {gains}"


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


def infeasible_parts(error: InfeasibleError) -> Mapping[str, Any]:
    """Return ``reasons`` as sentences, and ``conflicts`` and ``relaxations`` if the solver found them."""
    if not isinstance(error, ExplainedInfeasibleError):
        return {"reasons": list(error.reasons)}
    return {
        "reasons": list(error.reasons),
        "conflicts": [_conflict(conflict) for conflict in error.why.conflicts],
        "relaxations": [_relaxation(relaxation) for relaxation in error.why.relaxations if relaxation.is_tried],
    }


def _conflict(conflict: Conflict) -> dict[str, Any]:
    members = [
        {"subject": one.subject.name.lower(), "name": str(one), "value": one.value or None} for one in conflict.members
    ]
    return {"members": members, "minimal": conflict.is_minimal}


def _relaxation(relaxation: Relaxation) -> dict[str, Any]:
    return {
        "of": None if relaxation.about is None else str(relaxation.about),
        "change": relaxation.change,
        "option": relaxation.option or None,
        "usd_per_hour": relaxation.usd_per_hour,
    }
