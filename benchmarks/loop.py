"""Following traffic: what the loop saves and keeps beside a static plan, threshold scaling and a perfect forecast.

    python -m benchmarks.loop [--quick] [--json] [--full] [TRACE ...]

Every case is virtual time, after a week of history, of Llama-3.1-8B on `examples/pool.yaml` for least cost: the first
day of some composed weeks (`hetis.planner.loop.curves`), by none of which the loop's settings were chosen, with the
lengths of a trace, as sketches of traffic tell them, and its unevenness inside the hours; and a steady rate, at which
nothing should change. ``--full`` has a whole week, and a day with a flash crowd, prompts that become longer, and a lost
node. Rates are such that the peak takes most of the pool. Replicas serve by themselves, so that threshold scaling can
scale them.

``saved`` is of the static plan's cost, ``of_perfect`` relative to what the same decisions save if they know all rates
to come for as long as the loop looks ahead.
``outside`` is the share of requests outside the limits: all that come while the rate is above what keeps them, or while
a queue lasts. ``drifts`` are alarms. ``kept`` says how many of a morning's plans keep the limits in simulated traffic
at the highest rate that each of them carried.

The last row is the planner's own cost of taking in the sketches of 1,000 replicas every few seconds, without gRPC:
``cores`` that are busy, and the memory that is kept of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import EXAMPLES
from benchmarks.measuring.reporting import Reporting, report_for
from benchmarks.measuring.rows import Row
from hetis.formats.documents import load_workload
from hetis.formats.traces import read_trace
from hetis.planner.loop.curves import STEP_S, TrafficCurve, composed_curve, unevenness
from hetis.planner.loop.decision import kept_rate
from hetis.planner.loop.drift import DAY_S
from hetis.planner.loop.rehearsal import NodeEvent, Rehearsal
from hetis.planner.loop.rivals import rehearse_all
from hetis.planner.loop.settings import LoopSettings
from hetis.planner.report.rehearsals import saving
from hetis.planner.use_cases.describing import describe
from hetis.planner.use_cases.place import search
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.planner.use_cases.sources import engine_rules, load_inputs
from hetis.planner.use_cases.verification.rates import simulated_at
from hetis.solver.budget import Budget, silent
from hetis.solver.plan import DEFAULT_STRATEGY, Objective, Role
from hetis.solver.traffic import TOKENS, Histogram, TrafficSketch
from hetis.solver.workload import Workload

TRACES = [Path("../shared/data/traces/azure_conv_2023.csv.gz")]
MODEL = "Llama-3.1-8B"
SETTINGS = PlacementSettings(engine=engine_rules("vllm", DEFAULT_STRATEGY, max_stages=1), roles=(Role.UNIFIED,))
SHARE = 0.75  # of the pool's goodput, that the highest rate takes
UTILISATIONS = (0.8,)
SEEDS = range(16, 21)  # of weeks; the loop's settings were chosen by 1 to 10
MORNING_S = 6 * 3600.0, 11 * 3600.0
REPLICAS, REPORTED_S = 1000, 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Traffic to follow, and the nodes that are lost."""

    name: str
    whole: PlanAndProblem  # the plan for the most goodput, which says what the pool is
    curve: TrafficCurve
    events: tuple[NodeEvent, ...] = ()


def main() -> None:
    parser = rows.parser("benchmarks.loop", __doc__)
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE", help="requests with arrival times")
    parser.add_argument("--full", action="store_true", help="a week, and a day with all that happens: an hour or more")
    arguments = parser.parse_args()
    extent = Extent(hours=168.0, drifts=True) if arguments.full else Extent(hours=2.0 if arguments.quick else 24.0)
    found = all_rows(arguments.traces or TRACES, extent, only=arguments.only)
    rows.show(found, arguments, name="loop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much is followed: hours of the week, and whether there is a day with all that happens."""

    hours: float
    drifts: bool = False


def all_rows(traces: Sequence[Path], extent: Extent, *, only: str = "") -> Iterator[Row]:
    """Yield the rows of every case whose name contains ``only``, means of its days, and of what reports cost."""
    days = list[Row]()
    for path in traces:
        for case in cases(path, extent):
            for row in case_rows(case) if only in case.name else ():
                yield row
                days += [row] if " hours " in case.name else []
    yield from means(days)
    if only in (name := f"{REPLICAS:,} replicas report"):
        yield _reporting_row(name, REPORTED_S if extent.hours > 2 else REPORTED_S / 20)


def means(days: Sequence[Row]) -> Iterator[Row]:
    """Yield the means of the figures of some days, for each way to follow the traffic."""
    ways = dict.fromkeys(str(row["name"]).rpartition(": ")[2] for row in days)
    for way in ways:
        same = [row for row in days if str(row["name"]).endswith(f": {way}")]
        figures = {key: [one for row in same if isinstance(one := row[key], int | float)] for key in _COLUMNS}
        yield {
            **{key: fmean(values) if values else None for key, values in figures.items()},
            "name": f"mean of {len(same)} days: {way}",
        }


def cases(path: Path, extent: Extent) -> Iterator[Case]:
    """Yield the cases of a trace; without the file, as in a fresh checkout, traffic is 500/100 and hours are even."""
    workload: str | Workload = "500/100"
    name, uneven = "500/100", None
    if path.exists():
        name, uneven = path.name.partition(".")[0], unevenness(read_trace(path).arrival_s)
        workload = _sketched(load_workload(str(path)))
    loaded = load_inputs(cluster=str(EXAMPLES / "pool.yaml"), model=MODEL, workload=workload)
    problem = SETTINGS.problem(loaded.inputs, Objective())
    plan = describe(search(problem, SETTINGS, budget=Budget(), report=silent), loaded, problem, SETTINGS)
    whole = PlanAndProblem(plan=plan, inputs=loaded.inputs, problem=problem, warnings=())
    for seed in SEEDS if extent.hours == 24 else SEEDS[:1]:
        week = composed_curve(problem.workload, days=7, peak_rps=1.0, uneven=uneven, seed=seed)
        week = replace(week, rates=week.rates[: round((week.start_s + 3600 * extent.hours) / STEP_S)])
        yield Case(name=f"{name}, {extent.hours:g} hours {seed}", whole=whole, curve=_scaled(week, whole))
    steady = np.ones(round((DAY_S + 3600 * min(24.0, extent.hours)) / STEP_S))
    flat = TrafficCurve(name="steady", rates=steady, mixes=((0.0, problem.workload),), start_s=DAY_S)
    yield Case(name=f"{name}, steady", whole=whole, curve=_scaled(flat, whole))
    if not extent.drifts:
        return
    drifting = composed_curve(problem.workload, days=1, peak_rps=1.0, uneven=uneven, seed=2)
    start_s, length_s = drifting.start_s, drifting.end_s - drifting.start_s
    drifting = drifting.with_burst(start_s + 0.15 * length_s, 1200, 1.5)
    drifting = drifting.with_burst(start_s + 0.65 * length_s, DAY_S, 1.15)
    drifting = drifting.with_lengths(start_s + 0.5 * length_s, prompts=1.3, outputs=1.0)
    lost = NodeEvent(at_s=0.35 * length_s, node="l40s-0"), NodeEvent(at_s=0.4 * length_s, node="l40s-0", joins=True)
    yield Case(name=f"{name}, drifting", whole=whole, curve=_scaled(drifting, whole), events=lost)


def _sketched(requests: Workload) -> Workload:
    """Return requests as they are measured: the planner knows no more of their lengths."""
    lengths = dict[str, Any]()
    for name in ("prompt_tokens", "output_tokens"):
        lengths[name] = sum(
            (Histogram.of_values(TOKENS, [getattr(one, name)]).times(one.weight) for one in requests.bins),
            Histogram(scale=TOKENS),
        )
    return TrafficSketch(**lengths).workload(requests.name)


def _scaled(curve: TrafficCurve, whole: PlanAndProblem) -> TrafficCurve:
    """Return the curve whose peak takes `SHARE` of what the pool's best plan keeps for each of its mixes."""
    untils = [*(from_s for from_s, _ in curve.mixes[1:]), curve.end_s]
    shares = [
        SHARE * kept_rate(whole.plan, replace(whole.problem, workload=mix))
        / float(curve.rates_within(max(from_s, curve.start_s), until_s).max())
        for (from_s, mix), until_s in zip(curve.mixes, untils, strict=True)
    ]  # fmt: skip
    return replace(curve, rates=curve.rates * min(shares))


def case_rows(case: Case) -> Iterator[Row]:
    """Yield a row for each way to follow the traffic."""
    found = list[Rehearsal]()
    is_first = case.name.endswith(f" hours {SEEDS[0]}")
    for one in rehearse_all(case.whole, case.curve, LoopSettings(), events=case.events, utilisations=UTILISATIONS):
        print(f"  {case.name}: {one.name}", file=sys.stderr, flush=True)
        found.append(one)
    static, named = found[0], {one.name: saving(one, found[0]) for one in found}
    for one in found:
        yield {
            **dict.fromkeys(_COLUMNS),
            "name": f"{case.name}: {one.name}",
            "usd": one.usd,
            "gpu_hours": one.gpu_hours,
            "saved": saving(one, static),
            "of_perfect": _ratio(named[one.name], named["perfect forecast"]),
            "outside": one.outside,
            "changes": len(one.changes),
            "drifts": one.alarms,
            "kept": _kept(one, case) if one.name == "loop" and is_first else None,
        }


_COLUMNS = (
    *("name", "usd", "gpu_hours", "saved", "of_perfect", "outside", "changes", "drifts", "kept"),
    *("cores", "kept_mib"),
)


def _ratio(saved: float, most: float) -> float | None:
    """Return a share of a saving; None if that is too little to be a measure."""
    return saved / most if most > 0.01 else None


def _reporting_row(name: str, seconds: float) -> Row:
    found: Reporting = report_for(REPLICAS, seconds)
    return {**dict.fromkeys(_COLUMNS), "name": name, "cores": found.cores, "kept_mib": found.kept_bytes / 2**20}


def _kept(loop: Rehearsal, case: Case) -> str:
    """Simulate the plans of the first morning, request by request, at the highest rate that each carried."""
    curve, kept, tried = case.curve, 0, 0
    for one, until_s in zip(loop.changes, [*(one.at_s for one in loop.changes[1:]), curve.end_s], strict=True):
        if not MORNING_S[0] <= one.at_s - curve.start_s <= MORNING_S[1]:
            continue
        rate = min(float(curve.rates_within(one.at_s, until_s).max()), one.capacity_rps)
        problem = replace(one.next.problem, workload=curve.mixes[curve.mix_at(one.at_s)][1])
        found = simulated_at(
            one.next.plan, problem, rate, one.next.plan.objective, seed=0, budget=Budget(), report=_quiet
        )
        tried, kept = tried + 1, kept + (found is not None and found.kept)
    return f"{kept} of {tried}"


def _quiet(given: int, total: int) -> None:
    """Report nothing."""


if __name__ == "__main__":
    main()
