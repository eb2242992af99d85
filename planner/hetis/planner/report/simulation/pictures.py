"""Pictures of a simulation, as panels of lines that pages draw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hetis.planner.use_cases.record.parts import MadeFrom
from hetis.planner.use_cases.service_level import limits_of
from hetis.planner.use_cases.simulation.judging import simulated_latencies
from hetis.simulator.running import RateSweep
from hetis.simulator.steadiness import Estimate
from hetis.simulator.values import FloatArray
from hetis.solver.plan import Objective, Plan


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


def model_and_cluster(plan: Plan) -> tuple[str, str]:
    """Return the names of a plan's model and cluster, or what they are if the plan does not contain them."""
    model, cluster = (str(MadeFrom.of(plan).document(kind).get("name", kind)) for kind in ("model", "cluster"))
    return model, cluster


def panels_of_sweep(swept: RateSweep, limits: Objective) -> Iterator[Panel]:
    """Yield throughput and latencies over the simulated rates, with the limits drawn across."""
    rates, bounds = np.array([point.rate_rps for point in swept.points]), limits_of(limits)

    def panel(title: str, unit: str, estimates: Sequence[Estimate], limit: float | None = None) -> Panel:
        half_widths = np.nan_to_num(np.array([estimate.half_width for estimate in estimates]))
        line = Line(title, rates, np.array([estimate.value for estimate in estimates]), half_widths)
        return Panel(title, "requests/s arriving", unit, (line,), () if limit is None else (limit,))

    yield panel("Throughput", "requests/s", [point.summary.throughput_rps for point in swept.points])
    for found in zip(*(simulated_latencies(point.summary, None) for point in swept.points), strict=True):
        name = f"{found[0].statistic} {found[0].latency}"
        yield panel(name, "s", [one.estimate for one in found], bounds.get(found[0].latency))
