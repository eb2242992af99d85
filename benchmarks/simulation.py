"""The placement's saturated rates against simulated ones, and the speed of the simulator.

    python -m benchmarks.simulation [--quick] [--json] [--cases N] [--rate-only] [--processes N] [agreement | speed]

``agreement``: random (cluster, model, workload) cases are placed. One replica of every shape of the plan serves
requests that always wait, with the plan's b, M and C, and heads split as planned; a plan's prefill and decode replicas
run together (``#roles``). ``ratio`` is the simulated rate over `ReplicaPlan.rate`, or over that of the KV routes;
the bar is 0.9 to 1.1 (DESIGN section 10). ``alternating`` is the ratio for a pipeline whose iterations take exactly the
formula's time, but come one by one, with or without a chunk. If it is equally far below 1, the slack of the formula is
too small; if it is equally far above 1, too large. For roles it is that of the weaker side. ``ttft`` is the planned
p95. ``ttft_at_plan`` is the simulated one with Poisson arrivals at the planned utilisation, `-` if that load is not
carried or the run is too short to tell, and ``ttft_all_seats`` the same of engines with all the seats that KV has room
for, as `place` may start them. ``ttft_at_half`` is that at half the planned rate, where hardly any request waits for a
seat. ``--rate-only`` leaves these out.

``speed``: CPU seconds of whole plans on always-waiting requests, in one process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import example, of_types, problem
from benchmarks.measuring.rows import Row
from benchmarks.measuring.saturating import (
    DECK,
    Case,
    Deck,
    alternating_rate,
    distinct_replicas,
    iterations_per_request,
    part_of,
    random_cases,
    routed_part,
    saturated_run,
    steady_rate,
)
from benchmarks.measuring.seats import with_more_seats
from hetis.planner.use_cases.simulation.engine_settings import with_all_seats
from hetis.planner.use_cases.simulation.simulate import seats_of
from hetis.simulator.arrivals import Load, draw_traffic, requests_of
from hetis.simulator.metrics import measure, prediction_of
from hetis.simulator.simulate import simulate
from hetis.simulator.values import Settings
from hetis.solver.budget import Budget
from hetis.solver.errors import HetisError
from hetis.solver.plan import Objective, Plan, ReplicaPlan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import Family, PlacementProblem
from hetis.solver.redispatch.redispatcher import compile_redispatch

SEED = 7
BAR = 0.1
TTFT_BAR = 0.25
SOLVE_S = 8.0  # CPU seconds, so that other work on the machine does not cut searches short
WORST = 16  # number of rows shown on a terminal
MOST_ITERATIONS = 60_000  # approximate limit for one simulated replica
AS_PLANNED = Settings(dispatch=False, redispatch=False)


def main() -> None:
    """Print one row per replica shape, or per plan."""
    parser = rows.parser("benchmarks.simulation", __doc__)
    parser.add_argument("what", nargs="?", choices=("agreement", "speed"), default="agreement")
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--rate-only", action="store_true", help="agreement of rates, not of TTFT")
    parser.add_argument("--processes", type=int, default=0, help="cases at once; 0: all cores")
    arguments = parser.parse_args()
    if arguments.what == "speed":
        rows.show(speed_rows(quick=arguments.quick, only=arguments.only), arguments, name="simulation speed")
        return
    found = agreement_rows(
        4 if arguments.quick else arguments.cases,
        arguments.only,
        with_ttft=not arguments.rate_only,
        processes=1 if arguments.quick else arguments.processes,
    )
    if arguments.json:
        rows.show(found, arguments, name="simulation")
        return
    measured = list(found)
    measured.sort(key=lambda row: -abs(_ratio(row) - 1))
    rows.show(measured if arguments.markdown else measured[:WORST], arguments, name="simulation")
    print(verdict(measured))


def verdict(measured: Sequence[Row]) -> str:
    """Return how many shapes serve the planned rate, and how far their TTFT is from the plan's."""
    ratios = np.array([_ratio(row) for row in measured])
    cases = len({str(row["name"]).partition(":")[0] for row in measured})
    lines = [
        f"{(np.abs(ratios - 1) <= BAR).sum()} of {len(ratios)} replica shapes of {cases} cases within {BAR:.0%}; "
        f"mean {ratios.mean():.3f}, least {ratios.min():.3f}, most {ratios.max():.3f}"
    ]
    for column, label in (
        ("ttft_at_plan", "at the planned utilisation"),
        ("ttft_all_seats", "at the planned utilisation, with all the seats that KV has room for"),
        ("ttft_at_half", "at half the planned rate"),
    ):
        found = np.array([float(str(row[column])) / float(str(row["ttft"])) for row in measured if row[column]])
        if len(found):
            quantiles = ", ".join(f"{q:.2f}" for q in np.percentile(found, (0, 25, 50, 75, 100)))
            lines.append(
                f"simulated over planned p95 TTFT {label}: {len(found)} shapes, quartiles {quantiles}; "
                f"{(np.abs(found - 1) <= TTFT_BAR).sum()} within {TTFT_BAR:.0%}"
            )
    return "\n".join(lines)


def agreement_rows(count: int, only: str = "", *, with_ttft: bool, processes: int) -> Iterator[Row]:
    """Yield one row per replica shape of every case."""
    cases = [case for case in random_cases(count, SEED) if only in case.name]
    with ProcessPoolExecutor(max_workers=processes or None) as pool:
        for found in pool.map(partial(agreement, with_ttft=with_ttft), cases):
            yield from found


def agreement(case: Case, *, with_ttft: bool) -> list[Row]:
    """Return one row per replica shape of the plan, or none if there is no plan."""
    try:
        plan = solve_placement(
            case.problem, budget=Budget(time_limit_s=SOLVE_S, clock=time.process_time), gap_target=0.01
        )
    except HetisError:
        return []  # the model fits on none of these GPUs, or no plan meets the limits
    found = [
        _row(f"{case.name} #{n}", case, part_of(plan, one), with_ttft=with_ttft)
        for n, one in enumerate(distinct_replicas(plan))
    ]
    routed = routed_part(plan)
    return found if routed is None else [*found, _row(f"{case.name} #roles", case, routed, with_ttft=with_ttft)]


def _ratio(row: Row) -> float:
    return float(str(row["ratio"]))


def _row(name: str, case: Case, part: Plan, *, with_ttft: bool) -> Row:
    """Return the row of one replica, or of all replicas that KV routes join."""
    planned = prediction_of(part)
    in_flight = seats_of(part)
    count = int(max(6 * in_flight, min(3 * DECK, MOST_ITERATIONS / iterations_per_request(part, case.problem)), 200))
    started = time.perf_counter()
    run = saturated_run(part, case.problem, count, AS_PLANNED)
    simulated = steady_rate(run, in_flight)
    planned_share = case.problem.assumptions.planned_utilisation
    return {
        "name": name,
        "shape": " | ".join(map(_shape, part.replicas)),
        "planned": planned.rate_rps,
        "simulated": simulated,
        "ratio": simulated / planned.rate_rps,
        "alternating": _alternating_ratio(case.problem, part),
        "ttft": planned.ttft_s,
        "ttft_at_plan": _ttft_p95_s(part, case, count, planned_share) if with_ttft else None,
        "ttft_all_seats": _ttft_p95_s(part, case, count, planned_share, all_seats=True) if with_ttft else None,
        "ttft_at_half": _ttft_p95_s(part, case, count, 0.5) if with_ttft else None,
        "requests": count,
        "preemptions": run.num_preemptions,
        "wall_s": time.perf_counter() - started,
    }


def _alternating_ratio(problem: PlacementProblem, part: Plan) -> float | None:
    """Return the ratio, or None with attention workers, which `alternating_rate` does not support."""
    if any(one.attention_workers for one in part.replicas):
        return None
    sides: dict[Role, float] = {}
    for one in part.replicas:
        sides[one.role] = sides.get(one.role, 0.0) + alternating_rate(problem, one)
    return min(sides.values()) / prediction_of(part).rate_rps


def _shape(one: ReplicaPlan) -> str:
    stages = "+".join(f"{s.copies}x{s.gpu} TP{s.tp} L{s.num_layers}" for s in one.stages)
    pools = "".join(f", {len(p.devices)} {p.gpu} for {p.kv_head_groups} groups" for p in one.attention_workers)
    role = "" if one.role is Role.UNIFIED else f"{one.role.value} "
    return f"{role}{stages}{pools}; b {one.micro_batch}, M {one.in_flight}, C {one.chunk_tokens}"


def _ttft_p95_s(part: Plan, case: Case, count: int, load: float, *, all_seats: bool = False) -> float | None:
    """Return the p95 TTFT at this share of the planned rate, or None if that is not carried or the run is too short."""
    problem, rate_rps = case.problem, load * prediction_of(part).rate_rps
    arriving = Load(lengths=problem.workload, max_position=problem.model.max_position, rate_rps=rate_rps)
    if all_seats:
        part = with_all_seats(with_more_seats(part, problem, math.inf), problem)
    run = simulate(part, problem, requests_of(draw_traffic(arriving, count, seed=SEED)), AS_PLANNED)
    found = measure(run, Objective(ttft_limit_s=None, tpot_limit_s=None), saturated=False)
    return found.ttft_p95_s.value if found.steady else None


def speed_rows(*, quick: bool, only: str) -> Iterator[Row]:
    """Yield whole plans, saturated: seconds of simulation, number of iterations, and time of one iteration."""
    paper = problem(example("paper"), model="Llama-2-13B")
    without = replace(paper, family=Family(name="hetis", max_pool=0))
    few, many = (200, 2_000) if quick else (5_000, 100_000)
    cases = [
        ("12 GPUs, no pools", without, many, Settings()),
        ("12 GPUs, pools, plan's split", paper, few, AS_PLANNED),
        ("12 GPUs, pools, dispatch", paper, few, Settings(redispatch=False)),
        ("12 GPUs, pools, dispatch and re-dispatch", paper, many, Settings()),
    ]
    if not quick:
        cases.append(("1,000 GPUs", problem(of_types(4, 1000)), many, Settings()))
    for name, posed, requests, settings in cases:
        if only in name:
            yield _speed(name, posed, requests, settings)


def _speed(name: str, posed: PlacementProblem, requests: int, settings: Settings) -> Row:
    plan = solve_placement(posed, budget=Budget(time_limit_s=SOLVE_S, clock=time.process_time), gap_target=0.01)
    workload = posed.workload.clipped_to(posed.model.max_position)
    compile_redispatch()  # otherwise the first move would wait for compilation
    simulate(plan, posed, Deck(workload, 20, 0), settings)
    started = time.process_time()
    run = simulate(plan, posed, Deck(workload, requests, 0), settings)
    seconds = time.process_time() - started
    return {
        "name": name,
        "gpus": posed.cluster.num_gpus(),
        "requests": requests,
        "seconds": seconds,
        "iterations": run.iterations,
        "us_per_iteration": seconds / run.iterations * 1e6,
        "preemptions": run.num_preemptions,
        "migrations": run.migrations,
        "virtual_s": run.end_s,
    }


if __name__ == "__main__":
    main()
