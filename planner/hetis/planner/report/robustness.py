"""The result of a robustness study: the spread, the worst corner cases, the runner-up, the regret."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hetis.planner.report.figures import digits, percent, plural, seconds
from hetis.planner.report.plan import section
from hetis.planner.use_cases.robustness.alternatives import Regret, RunnerUp
from hetis.planner.use_cases.robustness.study import Robustness, Spread
from hetis.solver.plan import Objective, ObjectiveKind

MAX_CORNERS = 5  # shown; JSON has all
MAX_SHAPES = 3  # per runner-up


def render_robustness(robustness: Robustness, objective: Objective) -> RenderableType:
    """Return the table view, at most 80 columns wide if the names allow it."""
    title = f"Every coefficient of the profiles off by up to {percent(robustness.error)}"
    return section(title, Group(*_parts(robustness, objective)))


def _parts(robustness: Robustness, objective: Objective) -> Iterator[RenderableType]:
    yield _spreads(robustness, objective)
    yield _facts(robustness, objective)
    if robustness.corners:
        yield Text("Corner cases, the slowest first", style="dim")
        yield _corners(robustness)
    if not robustness.complete:
        yield Text("the time was over before everything was done", style="yellow")


def _spreads(robustness: Robustness, objective: Objective) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    table.add_column("")
    for name in ("planned", "p5", "median", "p95", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    rate = "Throughput" if objective.kind is ObjectiveKind.THROUGHPUT else "Goodput"

    def add(name: str, spread: Spread, *, is_rate: bool) -> None:
        values = (spread.planned, spread.p5, spread.median, spread.p95, spread.worst)
        table.add_row(name, *(f"{digits(value)}/s" if is_rate else seconds(value) for value in values))

    add(rate, robustness.rate, is_rate=True)
    if objective.ttft_limit_s is not None or objective.tpot_limit_s is not None:
        add("  within limits", robustness.rate_within, is_rate=True)
    add("TTFT p95", robustness.ttft_s, is_rate=False)
    add("TPOT mean", robustness.tpot_s, is_rate=False)
    return table


def _facts(robustness: Robustness, objective: Objective) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    samples = f"{plural(robustness.samples, 'sample')}, seed {robustness.seed}"
    table.add_row("Samples", f"{samples}; worst: of {plural(len(robustness.corners), 'corner case')}, too")
    if objective.ttft_limit_s is not None or objective.tpot_limit_s is not None:
        table.add_row("Limits", f"missed in {percent(robustness.missed)} of the samples with micro-batches as planned")
    if robustness.short is not None:
        table.add_row("Demand", f"not reached within limits in {percent(robustness.short)} of the samples")
    if robustness.regret is not None:
        table.add_row("Regret", _regret(robustness.regret))
    if robustness.runner_up is not None:
        table.add_row("Runner-up", _runner_up(robustness.runner_up, robustness.rate_within.planned))
    return table


def _regret(regret: Regret) -> str:
    chose = "none" if regret.other_replicas == 0 else str(regret.other_replicas)
    return (
        f"{percent(regret.mean)} of the best rate on average, {percent(regret.worst)} at most (proven: "
        f"{percent(regret.bound)}); {chose} of {regret.searches} searches under such profiles chose other replicas"
    )


def _runner_up(runner_up: RunnerUp, planned: float) -> str:
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
    table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
    table.add_column("", overflow="fold")
    for _ in range(3):
        table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="yellow")
    for corner in sorted(robustness.corners, key=lambda one: one.rate)[:MAX_CORNERS]:
        latencies = (f"TTFT {seconds(corner.ttft_s)}", f"TPOT {seconds(corner.tpot_s)}")
        table.add_row(corner.name, f"{digits(corner.rate)}/s", *latencies, "misses a limit" if corner.misses else "")
    return table
