"""Pictures of a simulation, as panels of lines that pages draw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hetis.planner.use_cases.grouping import device_groups
from hetis.planner.use_cases.record.parts import MadeFrom
from hetis.planner.use_cases.service_level import limits_of
from hetis.planner.use_cases.simulation.judging import LevelVerdict, simulated_latencies
from hetis.planner.use_cases.simulation.simulate import Simulated
from hetis.simulator.running import RateSweep
from hetis.simulator.steadiness import Estimate
from hetis.simulator.values import FloatArray, Run
from hetis.solver.plan import Objective, Plan

_MAX_POINTS = 2000  # points per line: more cannot be distinguished


class Line(NamedTuple):
    """A line of points; ``spread`` is the half width of the interval around each point, or None."""

    name: str
    x: FloatArray
    y: FloatArray
    spread: FloatArray | None = None


class Panel(NamedTuple):
    """One picture; ``limits`` are drawn across it."""

    title: str
    x_title: str
    y_title: str
    lines: Sequence[Line]
    limits: Sequence[float] = ()
    log_x: bool = False


def model_and_cluster(plan: Plan) -> tuple[str, str]:
    """Return the names of a plan's model and cluster, or what they are if the plan does not contain them."""
    model, cluster = (str(MadeFrom.of(plan).document(kind).get("name", kind)) for kind in ("model", "cluster"))
    return model, cluster


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

    def panel(title: str, unit: str, estimates: Sequence[Estimate], limit: float | None = None) -> Panel:
        half_widths = np.nan_to_num(np.array([estimate.half_width for estimate in estimates]))
        line = Line(title, rates, np.array([estimate.value for estimate in estimates]), half_widths)
        return Panel(title, "requests/s arriving", unit, (line,), () if limit is None else (limit,))

    yield panel("Throughput", "requests/s", [point.summary.throughput_rps for point in swept.points])
    summaries = (point.summary for point in swept.points)
    latencies = [simulated_latencies(*of) for of in zip(summaries, of_verdicts, strict=True)]
    for found in zip(*latencies, strict=True):
        name = f"{found[0].statistic} {found[0].latency}"
        yield panel(name, "s", [one.estimate for one in found], bounds.get(found[0].latency))
    if shares := [share for one in verdicts if (share := one.of(None)) is not None]:
        yield panel("Requests within all limits", "share", [one.estimate for one in shares], shares[0].limit)


def _of_run(simulated: Simulated, run: Run, plan: Plan) -> Iterator[Panel]:
    limit_s, ttft_s = simulated.question.limits.ttft_limit_s, run.first_token_s - run.arrival_s
    tpot_s = (run.finished_s - run.first_token_s) / np.maximum(run.output_tokens - 1, 1)
    queueing_s = run.admitted_s - run.arrival_s
    latencies = (("TTFT", ttft_s), ("TPOT", tpot_s), ("queueing", queueing_s))
    lines = [_cumulative(name, values_s) for name, values_s in latencies]
    yield Panel("Latencies of requests", "s", "share of requests", lines, log_x=True)
    by_arrival = (_thinned("TTFT", run.arrival_s, ttft_s),)
    yield Panel("Time to first token by arrival", "arrival, s", "s", by_arrival, () if limit_s is None else (limit_s,))
    levels = (("waiting", run.arrival_s, run.admitted_s), ("running", run.admitted_s, run.finished_s))
    yield Panel("Requests", "s", "requests", [_level(*one) for one in levels])
    if run.series is not None:
        groups, members = device_groups(plan), defaultdict[str, list[int]](list)
        for number, device in enumerate(run.series.devices):
            members[groups.get(device, device)].append(number)
        for title, values in (("KV in use", run.series.kv_used_fraction), ("Busy", run.series.busy_fraction)):
            means = ((f"{len(of)} × {name}", values[:, of].mean(axis=1)) for name, of in members.items())
            yield Panel(title, "s", "share", [Line(name, run.series.times_s, mean) for name, mean in means])


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
    return Line(name, x[chosen], y[chosen])
