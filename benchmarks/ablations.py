"""The worth of each idea: the same fleet simulated without it.

    python -m benchmarks.ablations [--quick] [--json] [--only TEXT] [--seeds K] [--processes N]

The cases are fleets and lengths for which attention workers pay, and some for which they do not. `without attention
workers` and `without stage copies` plan again within the smaller family. The other ablations apply if the full plan has
attention workers. They run that plan with one idea switched off: head groups are split as planned (no head-level
dispatch), running requests never move, or Theta is set between 10% and 200%.

`throughput_rps` is the rate with requests always waiting. `over_full` is this rate over that of the full method, with
the half width of its 95% interval over the seeds. `ttft_p95_s` and `tpot_s` are measured at 90% of the full plan's
saturated rate.

All runs of a case have the same number of requests (`requests`). It is chosen so that the full plan makes about 6,000
iterations, within 60 to 2,000 requests, and raised if needed until the plan's seats are refilled three times. Together
with the search's limits this keeps each of these cases, whose plans have at most 160 seats, within four CPU minutes.
`cpu_s` is the CPU time of the row, including its search.

`carried` describes the loaded runs over all seeds, like the latencies, and not the saturated ones. It is `no` if the
queue of a run keeps growing, and `unknown` if a run is too short to tell, which is common below 900 requests
(docs/simulator.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import numpy as np

from benchmarks.measuring import rows
from benchmarks.measuring.instances import example, problem
from benchmarks.measuring.rows import Row
from benchmarks.measuring.saturating import iterations_per_request, served
from hetis.formats.documents import load_workload
from hetis.planner.use_cases.simulation.simulate import seats_of
from hetis.simulator.metrics import prediction_of
from hetis.simulator.steadiness import over_runs
from hetis.simulator.values import Settings
from hetis.solver.budget import Budget
from hetis.solver.errors import HetisError
from hetis.solver.plan import Objective, Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem

TIME_LIMIT_S = 15.0  # CPU seconds, so that other work on the machine does not cut the search short
ITERATIONS = 6_000  # per run, roughly; one takes 100 to 500 us with attention workers
FEWEST, MOST = 60, 2_000  # bounds on the requests per run, before TURNS applies
TURNS = 3  # a run refills the seats of the full plan at least this often, even beyond MOST
THETAS = (0.1, 0.25, 1.0, 2.0)  # besides the default of 0.5
LOAD = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fleet, model, workload and limits."""

    name: str
    fleet: str
    model: str
    workload: str
    objective: Objective


CASES = tuple(
    Case(
        name=name,
        fleet=fleet,
        model=model,
        workload=workload,
        objective=Objective(ttft_limit_s=ttft_s, tpot_limit_s=tpot_s),
    )
    for name, fleet, model, workload, ttft_s, tpot_s in (
        ("2 H100 + 8 P100, 8000/300, 50 ms", "h100-p100", "Llama-3.1-70B", "8000/300", None, 0.05),
        ("2 H100 + 8 P100, 16000/1000, 100 ms", "h100-p100", "Llama-3.1-70B", "16000/1000", None, 0.1),
        ("2 H100 + 8 P100, LongBench, 100 ms", "h100-p100", "Llama-3.1-70B", "longbench_lengths", None, 0.1),
        ("2 H100 + 8 L4, 16000/1000, 100 ms", "h100-l4", "Llama-3.1-70B", "16000/1000", None, 0.1),
        ("2 H100 + 8 L4, 500/2000, 100 ms", "h100-l4", "Llama-3.1-70B", "500/2000", None, 0.1),
        ("paper, azure, 5 s and 200 ms", "paper", "Llama-2-70B", "azure_conv_2023", 5.0, 0.2),
        ("paper, azure, 2 s and 100 ms", "paper", "Llama-2-70B", "azure_conv_2023", 2.0, 0.1),
        ("paper, LongBench, no limits", "paper", "Llama-2-70B", "longbench_lengths", None, None),
    )
)


def main() -> None:
    """Print one row per case and ablation."""
    parser = rows.parser("benchmarks.ablations", __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every load")
    parser.add_argument("--processes", type=int, default=0, help="cases at once; 0: all cores")
    arguments = parser.parse_args()
    chosen = [case for case in (CASES[:1] if arguments.quick else CASES) if arguments.only in case.name]
    if arguments.quick:
        found = ablated(chosen[0], seeds=2, iterations=1_000, thetas=THETAS[:1]) if chosen else iter(())
    else:
        found = _all_ablated(chosen, seeds=arguments.seeds, processes=arguments.processes)
    rows.show(found, arguments, name="ablations")


def _all_ablated(chosen: Sequence[Case], *, seeds: int, processes: int) -> Iterator[Row]:
    """Yield the rows of several cases, which run in parallel.

    Each case has a process of its own, so that kernels are loaded once per case. A single process yields row by row.
    """
    if processes == 1:
        for case in chosen:
            yield from ablated(case, seeds=seeds, iterations=ITERATIONS, thetas=THETAS)
        return
    work = partial(_rows, seeds=seeds)
    with ProcessPoolExecutor(max_workers=processes or None, mp_context=get_context("spawn")) as pool:
        for found in pool.map(work, chosen):
            yield from found


def _rows(case: Case, *, seeds: int) -> list[Row]:
    return list(ablated(case, seeds=seeds, iterations=ITERATIONS, thetas=THETAS))


def ablated(case: Case, *, seeds: int, iterations: int, thetas: tuple[float, ...]) -> Iterator[Row]:
    """Yield the row of the full method, then one without each of its parts, over about this many iterations each."""
    cluster = example(case.fleet)
    started_s = time.process_time()
    posed = problem(cluster, model=case.model, workload=case.workload, objective=case.objective)
    lengths = load_workload(case.workload)
    dispatching: list[tuple[str, PlacementProblem, Settings]] = [
        ("without head-level dispatch", posed, Settings(dispatch=False, redispatch=False)),
        ("without re-dispatch", posed, Settings(redispatch=False)),
        *((f"Theta {theta:.0%}", posed, Settings(theta=theta)) for theta in thetas),
    ]
    planned = _planned(posed)
    variants = [
        ("full", posed, Settings()),
        *(dispatching if planned[0] is not None and _workers(planned[0]) else []),  # else there is nothing to dispatch
        ("without attention workers", replace(posed, family=replace(posed.family, max_pool=0)), Settings()),
    ]
    plans: dict[int, tuple[Plan | None, str]] = {id(posed): planned}
    rate_rps, count, full = 0.0, 0, list[float]()
    for name, problem_, settings in variants:
        if id(problem_) not in plans:
            plans[id(problem_)] = _planned(problem_)
        plan, note = plans[id(problem_)]
        label = f"{case.name}: {name}"
        if plan is None:
            yield _row(label, note=note)
            continue
        rate_rps = rate_rps or LOAD * prediction_of(plan).rate_rps
        count = count or _requests(plan, problem_, iterations)
        with served(plan, problem_, lengths, seeds=seeds, turns=0, at_least=count, processes=1) as server:
            summary, by_seed = server.saturated(settings)
            loaded = server.at(rate_rps, settings)
        full = full or by_seed
        over = over_runs(np.divide(by_seed, full).tolist())
        yield _row(
            label,
            planned_rps=prediction_of(plan).rate_rps,
            throughput_rps=summary.throughput_rps.value,
            half_width_rps=summary.throughput_rps.half_width,
            over_full=over.value,
            over_full_half_width=over.half_width,
            ttft_p95_s=loaded.ttft_p95_s.value,
            tpot_s=loaded.mean_tpot_s.value,
            carried={True: "yes", False: "no", None: "unknown"}[loaded.steady],
            requests=count,
            preemptions=summary.counts.preemptions,
            migrations=summary.counts.migrations,
            migrated_gib=summary.counts.migrated_bytes / 2**30,
            cpu_s=time.process_time() - started_s,
            note=f"{_workers(plan)} attention workers, copies {_copies(plan)}",
        )
        started_s = time.process_time()


def _row(name: str, **found: rows.Cell) -> Row:
    columns = (
        "planned_rps", "throughput_rps", "half_width_rps", "over_full", "over_full_half_width", "ttft_p95_s", "tpot_s",
        "carried", "requests", "preemptions", "migrations", "migrated_gib", "cpu_s", "note",
    )  # fmt: skip
    return {"name": name} | {column: found.get(column) for column in columns}


def _planned(posed: PlacementProblem) -> tuple[Plan | None, str]:
    try:
        budget = Budget(time_limit_s=TIME_LIMIT_S, clock=time.process_time)
        return solve_placement(posed, strategy="hetis", budget=budget), ""
    except HetisError as error:
        return None, str(error).splitlines()[0]


def _requests(plan: Plan, posed: PlacementProblem, iterations: int) -> int:
    """Return the number of requests that every run of a case replays, derived from its full plan."""
    return _enough(iterations / iterations_per_request(plan, posed), seats=seats_of(plan))


def _enough(by_iterations: float, *, seats: int) -> int:
    return max(min(max(int(by_iterations), FEWEST), MOST), TURNS * seats)


def _workers(plan: Plan) -> int:
    return sum(len(replica.worker_devices()) for replica in plan.replicas)


def _copies(plan: Plan) -> str:
    return "/".join(str(stage.copies) for replica in plan.replicas[:1] for stage in replica.stages)


if __name__ == "__main__":
    main()
