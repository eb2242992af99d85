"""Pictures of a simulation, as panels of lines that pages draw too, and as files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetis.commands.pictures import file_of
from hetis.planner.use_cases.grouping import device_groups
from hetis.planner.use_cases.record.parts import MadeFrom
from hetis.planner.use_cases.service_level import limits_of
from hetis.planner.use_cases.simulation.judging import LevelVerdict, simulated_latencies
from hetis.planner.use_cases.simulation.simulate import Simulated
from hetis.simulator.running import RateSweep
from hetis.simulator.steadiness import Estimate
from hetis.simulator.values import FloatArray, Run
from hetis.solver.plan import Objective, Plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")  # the palette of Okabe and Ito
_DASHES = ("-", "--", ":")  # when the colours come again
_MAX_POINTS = 2000  # points per line: more cannot be distinguished


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Line:
    """A line of points; ``spread`` is the half width of the interval around each point, or None."""

    name: str
    x: FloatArray
    y: FloatArray
    spread: FloatArray | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Panel:
    """One picture; ``limits`` are drawn across it."""

    title: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    limits: tuple[float, ...] = ()
    log_x: bool = False


def picture(simulated: Simulated, plan: Plan, *, form: str) -> bytes:
    """Return a file of one of `hetis.commands.pictures.FORMS`.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    model, cluster = model_and_cluster(plan)
    title = f"{model} on {cluster} under {simulated.question.load.lengths.name}, simulated"
    return file_of(_figure(panels_of(simulated, plan)), title, form)


def model_and_cluster(plan: Plan) -> tuple[str, str]:
    """Return the names of a plan's model and cluster, or what they are if the plan does not contain them."""
    made_from = MadeFrom.of(plan)
    return str(made_from.document("model").get("name", "model")), str(
        made_from.document("cluster").get("name", "cluster")
    )


def panels_of(simulated: Simulated, plan: Plan) -> tuple[Panel, ...]:
    swept: Iterable[Panel] = ()
    if simulated.sweep is not None:
        swept = panels_of_sweep(simulated.sweep, simulated.question.limits, simulated.verdicts)
    return (*swept, *(() if simulated.run is None else _of_run(simulated, simulated.run, plan)))


def panels_of_sweep(swept: RateSweep, limits: Objective, verdicts: Sequence[LevelVerdict] = ()) -> Iterator[Panel]:
    """Yield throughput and latencies over the simulated rates, with the limits drawn across.

    Latencies are in the statistics of the ``verdicts`` on the points (none: the usual ones), which are followed by the
    share of the requests within all limits if that has a limit.
    """
    rates = np.array([point.rate_rps for point in swept.points])
    bounds, of_verdicts = limits_of(limits), verdicts or (None,) * len(swept.points)
    panels = list[tuple[str, list[Estimate], str, float | None]]()
    panels.append(("Throughput", [point.summary.throughput_rps for point in swept.points], "requests/s", None))
    latencies = [
        simulated_latencies(*of) for of in zip((one.summary for one in swept.points), of_verdicts, strict=True)
    ]
    for found in zip(*latencies, strict=True):
        name, limit_s = f"{found[0].statistic} {found[0].latency}", bounds.get(found[0].latency)
        panels.append((name, [one.estimate for one in found], "s", limit_s))
    if shares := [share for one in verdicts if (share := one.of(None)) is not None]:
        panels.append(("Requests within all limits", [one.estimate for one in shares], "share", shares[0].limit))
    for title, estimates, y_title, limit in panels:
        half_widths = np.nan_to_num(np.array([estimate.half_width for estimate in estimates]))
        line = Line(name=title, x=rates, y=np.array([estimate.value for estimate in estimates]), spread=half_widths)
        yield Panel(
            title=title,
            x_title="requests/s arriving",
            y_title=y_title,
            lines=(line,),
            limits=(limit,) if limit is not None else (),
        )


def _of_run(simulated: Simulated, run: Run, plan: Plan) -> Iterator[Panel]:
    limits = simulated.question.limits
    yield Panel(
        title="Latencies of requests",
        x_title="s",
        y_title="share of requests",
        lines=(
            _cumulative("TTFT", run.first_token_s - run.arrival_s),
            _cumulative("TPOT", (run.finished_s - run.first_token_s) / np.maximum(run.output_tokens - 1, 1)),
            _cumulative("queueing", run.admitted_s - run.arrival_s),
        ),
        log_x=True,
    )
    yield Panel(
        title="Time to first token by arrival",
        x_title="arrival, s",
        y_title="s",
        lines=(_thinned("TTFT", run.arrival_s, run.first_token_s - run.arrival_s),),
        limits=(limits.ttft_limit_s,) if limits.ttft_limit_s is not None else (),
    )
    yield Panel(
        title="Requests",
        x_title="s",
        y_title="requests",
        lines=(_level("waiting", run.arrival_s, run.admitted_s), _level("running", run.admitted_s, run.finished_s)),
    )
    if run.series is not None:
        groups = device_groups(plan)
        members: dict[str, list[int]] = {}
        for number, device in enumerate(run.series.devices):
            members.setdefault(groups.get(device, device), []).append(number)
        for title, values in (("KV in use", run.series.kv_used_fraction), ("Busy", run.series.busy_fraction)):
            means = ((f"{len(of)} × {name}", values[:, of].mean(axis=1)) for name, of in members.items())
            lines = tuple(Line(name=name, x=run.series.times_s, y=mean) for name, mean in means)
            yield Panel(title=title, x_title="s", y_title="share", lines=lines)


def _cumulative(name: str, values: FloatArray) -> Line:
    known = np.sort(values[np.isfinite(values) & (values > 0)])
    return _thinned(name, known, np.arange(1, len(known) + 1) / max(len(known), 1))


def _level(name: str, begins: FloatArray, ends: FloatArray) -> Line:
    """Return how many intervals have begun and not ended, over time."""
    begins, ends = begins[np.isfinite(begins)], ends[np.isfinite(ends)]
    times = np.concatenate([begins, ends])
    steps = np.concatenate([np.ones(len(begins)), -np.ones(len(ends))])
    order = np.lexsort((steps, times))  # at equal times departures come first, since they make room for arrivals
    return _thinned(name, times[order], np.cumsum(steps[order]))


def _thinned(name: str, x: FloatArray, y: FloatArray) -> Line:
    chosen = np.linspace(0, len(x) - 1, min(len(x), _MAX_POINTS)).astype(np.int64)
    return Line(name=name, x=x[chosen], y=y[chosen])


def _dash(number: int) -> str:
    return _DASHES[number // len(_COLORS) % len(_DASHES)]


def _figure(panels: Sequence[Panel]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8 * len(panels) + 0.6), layout="constrained")
    for axis, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for number, line in enumerate(panel.lines):
            color = _COLORS[number % len(_COLORS)]
            if line.spread is None:
                axis.plot(line.x, line.y, _dash(number), color=color, label=line.name, linewidth=1)
            else:
                axis.errorbar(line.x, line.y, yerr=line.spread, color=color, label=line.name, marker="o", capsize=2)
        for limit in panel.limits:
            axis.axhline(limit, color="#888888", linestyle=":", linewidth=1)
        scale = "log" if panel.log_x else "linear"
        axis.set(title=panel.title, xlabel=panel.x_title, ylabel=panel.y_title, xscale=scale)
        axis.set_ylim(bottom=0)
        if [line.name for line in panel.lines] != [panel.title]:
            axis.legend(fontsize="x-small")
    return figure
