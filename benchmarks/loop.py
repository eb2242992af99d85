"""Following traffic: what the loop saves and keeps beside a static plan, threshold scaling and a perfect forecast.

    python -m benchmarks.loop [TRACE ...] [--days N] [--quick] [--json]

Every case is days of virtual time, after a week of history, of Llama-3.1-8B on `examples/pool.yaml` for least cost: a
composed week (`hetis.planner.loop.curves`) with the lengths of a trace and its unevenness inside the hours; the same
with a flash crowd, prompts that become longer, and a lost node; and even traffic, in which nothing should change. Rates
are such that the peak takes most of the pool.

``saved`` is of the static plan's cost, ``of_perfect`` relative to what the same decisions save if they know all rates
to come. ``outside`` is the share of requests outside the limits: all that come while the rate is above what keeps them,
or while a queue lasts. ``drifts`` are alarms. ``kept`` says how many of a morning's plans keep the limits in simulated
traffic at the highest rate that each of them carried.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import EXAMPLES
from benchmarks.measuring.rows import Row
from hetis.formats.traces import read_trace
from hetis.planner.loop.curves import STEP_S, UNEVEN_S, TrafficCurve, composed_curve, unevenness
from hetis.planner.loop.decision import LoopSettings, kept_rate
from hetis.planner.loop.drift import DAY_S
from hetis.planner.loop.rehearsal import NodeEvent, Rehearsal
from hetis.planner.loop.rivals import rehearse_all
from hetis.planner.report.rehearsals import saving
from hetis.planner.use_cases.describing import describe
from hetis.planner.use_cases.place import search
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.planner.use_cases.sources import engine_rules, load_inputs
from hetis.planner.use_cases.verification.rates import simulated_at
from hetis.solver.budget import Budget, silent
from hetis.solver.plan import DEFAULT_STRATEGY, Objective

TRACES = [Path("../shared/data/traces/azure_conv_2023.csv.gz")]
MODEL, SETTINGS = "Llama-3.1-8B", PlacementSettings(engine=engine_rules("vllm", DEFAULT_STRATEGY, max_stages=1))
SHARE = 0.75  # of the pool's goodput, that the highest rate takes
UTILISATIONS = (0.8,)
MORNING_S = 6 * 3600.0, 11 * 3600.0


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
    parser.add_argument("--days", type=int, default=7, metavar="N", help="days of the week that are followed")
    arguments = parser.parse_args()
    days = 1 if arguments.quick else max(1, arguments.days)
    rows.show(all_rows(arguments.traces or TRACES, days=days, only=arguments.only), arguments, name="loop")


def all_rows(traces: Sequence[Path], *, days: int, only: str = "") -> Iterator[Row]:
    """Yield the rows of every case whose name contains ``only``."""
    for path in traces:
        for case in cases(path, days=days):
            if only in case.name:
                yield from case_rows(case)


def cases(path: Path, *, days: int) -> Iterator[Case]:
    """Yield the cases of a trace; without the file, as in a fresh checkout, traffic is 500/100 and hours are even."""
    name, workload, uneven = "500/100", "500/100", None
    if path.exists():
        name, workload, uneven = path.name.partition(".")[0], str(path), unevenness(read_trace(path).arrival_s)
    loaded = load_inputs(cluster=str(EXAMPLES / "pool.yaml"), model=MODEL, workload=workload)
    problem = SETTINGS.problem(loaded.inputs, Objective())
    plan = describe(search(problem, SETTINGS, budget=Budget(), report=silent), loaded, problem, SETTINGS)
    whole = PlanAndProblem(plan=plan, inputs=loaded.inputs, problem=problem, warnings=())
    week = composed_curve(problem.workload, days=days, peak_rps=1.0, uneven=uneven, seed=1)
    yield Case(name=f"{name}, {days} days", whole=whole, curve=_scaled(week, whole))
    drifting = composed_curve(problem.workload, days=min(days, 3), peak_rps=1.0, uneven=uneven, seed=2)
    start_s, length_s = drifting.start_s, drifting.end_s - drifting.start_s
    drifting = drifting.with_burst(start_s + 0.15 * length_s, 1200, 1.5)
    drifting = drifting.with_burst(start_s + 0.65 * length_s, DAY_S, 1.15)
    drifting = drifting.with_lengths(start_s + 0.5 * length_s, prompts=1.3, outputs=1.0)
    lost = NodeEvent(at_s=0.35 * length_s, node="l40s-0"), NodeEvent(at_s=0.4 * length_s, node="l40s-0", joins=True)
    yield Case(name=f"{name}, drifting", whole=whole, curve=_scaled(drifting, whole), events=lost)
    even = np.ones(round((DAY_S + min(length_s, DAY_S)) / STEP_S))
    if uneven is not None:
        even *= np.resize(np.repeat(uneven, round(UNEVEN_S / STEP_S)), len(even))
    flat = TrafficCurve(name="even", rates=even, mixes=((0.0, problem.workload),), start_s=DAY_S)
    yield Case(name=f"{name}, even", whole=whole, curve=_scaled(flat, whole))


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
    for one in rehearse_all(case.whole, case.curve, LoopSettings(), events=case.events, utilisations=UTILISATIONS):
        print(f"  {case.name}: {one.name}", file=sys.stderr, flush=True)
        found.append(one)
    static, perfect = found[0], next(one for one in found if one.name == "perfect forecast")
    most = saving(perfect, static)
    for one in found:
        yield {
            "name": f"{case.name}: {one.name}",
            "usd": one.usd,
            "gpu_hours": one.gpu_hours,
            "saved": saving(one, static),
            "of_perfect": saving(one, static) / most if most > 0 else None,
            "outside": one.outside,
            "changes": len(one.changes),
            "drifts": one.alarms,
            "kept": _kept(one, case) if one.name == "loop" and case.name.endswith("days") else None,
        }


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
