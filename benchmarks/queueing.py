"""p95 TTFT by the queue model of `hetis.planner.use_cases.queueing`, and as planned, over that of the simulator.

    python -m benchmarks.queueing [--quick] [--json] [--plans N] [--seed S] [--calibrate]

A plan is made for a node or two, a model, lengths and limits, all drawn at random; plans that prefill and decode in
separate replicas, or that have more than 300 seats, for which few requests wait, are drawn again. Each is simulated at
shares of its planned rate with Poisson arrivals. A row is one such run: ``queueing_s`` is p95 of the time until a
prompt begins, ``simulated_s`` p95 TTFT, ``seat_s`` and ``lane_s`` are the model's p95 waits. The quotients are the
planned p95 TTFT and that of the model over the simulated one. The last rows summarise the runs at each share: medians,
``low`` and ``high``, between which 8 in 10 quotients of the model are, and how many quotients are between 1/2 and 2.

``--calibrate`` prints instead the factor (`FASTER`) for which the median quotient of the model is 1, over runs of the
plans of seed 0 at 90% and 100% in which requests wait for longer than half of the planned TTFT. The table is of other
plans.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.measuring import rows
from benchmarks.measuring.instances import NODE_SIZES, fleet, problem
from benchmarks.measuring.rows import Row
from hetis.planner.use_cases.queueing import Queueing, RequestQueue, request_queue
from hetis.planner.use_cases.simulate import Question, answer, default_rate
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.running import silent
from hetis.simulator.values import Settings
from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError
from hetis.solver.placement.families import DEFAULT_ENGINE, run_by
from hetis.solver.plan import Objective, Plan
from hetis.solver.planning import solve_placement
from hetis.solver.problem import EngineRules, PlacementProblem

PLANS, QUICK_PLANS = 24, 2
MODELS = ("Llama-2-70B", "Qwen3-32B", "Llama-3.1-8B", "Mixtral-8x7B-v0.1", "Qwen3-30B-A3B")
LENGTHS = (
    *("azure_conv_2023", "sharegpt_8k_lengths", "sharegpt_first_turn_lengths", "longbench_lengths"),
    *("humaneval_lengths", "4000/300", "1000/500", "500/50"),
)
TTFT_S, TPOT_S = (0.3, 1.0, 3.0, None), (0.03, 0.1, None)
SHARES = (0.6, 0.8, 0.9, 1.0)  # of the planned rate, which is 90% of the saturated one
MOST_SEATS = 300
REQUESTS, QUICK_REQUESTS = 8_000, 500
TIME_LIMIT_S = 8.0
NO_DISPATCH = Settings(dispatch=False, redispatch=False)
NO_LIMIT = Objective(ttft_limit_s=None, tpot_limit_s=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan with few seats."""

    name: str
    problem: PlacementProblem
    plan: Plan
    queue: RequestQueue


def main() -> None:
    """Print one row per plan and share of its rate, and a summary for each share."""
    parser = rows.parser("benchmarks.queueing", __doc__)
    parser.add_argument("--plans", type=int, default=PLANS, metavar="N", help=f"so many plans (default {PLANS})")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of what is drawn (default 1)")
    parser.add_argument("--calibrate", action="store_true", help="print the factor FASTER from the plans of seed 0")
    arguments = parser.parse_args()
    number, num_requests = (QUICK_PLANS, QUICK_REQUESTS) if arguments.quick else (arguments.plans, REQUESTS)
    if arguments.calibrate and (arguments.quick or arguments.only):
        parser.error("--calibrate takes all plans, without --quick and --only")
    if arguments.calibrate:
        print(f"FASTER = {calibrated([run for case in cases(number, seed=0) for run in runs_of(case)]):.3f}")
        return
    chosen = (case for case in cases(number, arguments.seed) if arguments.only in case.name)
    rows.show(
        summarised(row_of(run) for case in chosen for run in runs_of(case, num_requests)), arguments, name="queueing"
    )


def cases(number: int, seed: int) -> Iterator[Case]:
    """Yield ``number`` plans."""
    draw, num_drawn = random.Random(seed), 0
    while num_drawn < number:
        types = draw.sample(sorted(NODE_SIZES), draw.choice((1, 1, 2)))
        nodes = [(1, draw.choice((2, 4, NODE_SIZES[gpu])), gpu) for gpu in types]
        model, lengths, rules = draw.choice(MODELS), draw.choice(LENGTHS), draw.choice((True, False))
        objective = Objective(ttft_limit_s=draw.choice(TTFT_S), tpot_limit_s=draw.choice(TPOT_S))
        posed = problem(fleet(f"fleet {num_drawn}", *nodes), model=model, workload=lengths, objective=objective)
        if rules:
            posed = replace(posed, family=run_by(posed.family, EngineRules(name=DEFAULT_ENGINE)))
        budget = Budget(time_limit_s=TIME_LIMIT_S, clock=time.process_time, explains=False)
        try:
            plan = solve_placement(posed, budget=budget)
        except InfeasibleError:
            continue
        queue = request_queue(plan, posed)
        if queue is None or queue.seats > MOST_SEATS:
            continue
        num_drawn += 1
        gpus = ", ".join(f"{each} {gpu}" for _, each, gpu in nodes)
        yield Case(name=f"{model} on {gpus}, {lengths}, {queue.seats} seats", problem=posed, plan=plan, queue=queue)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A simulation of a plan at a share of its planned rate; p95 TTFT in seconds."""

    case: Case
    share: float
    simulated_s: float
    queueing_s: float  # p95

    @property
    def planned_s(self) -> float:
        return max(one.ttft_s for one in self.case.plan.replicas)

    def modelled(self, queue: RequestQueue) -> Queueing:
        return queue.at(self.share * default_rate(self.case.plan, self.case.problem))


def runs_of(case: Case, num_requests: int = REQUESTS) -> Iterator[Run]:
    """Simulate a plan at each share of its rate."""
    lengths, most = case.problem.workload, case.problem.model.max_position
    for share in SHARES:
        rate_rps = share * default_rate(case.plan, case.problem)
        load = Load(lengths=lengths, max_position=most, arrivals=Arrivals.DRAWN, rate_rps=rate_rps)
        question = Question(load=load, num_requests=num_requests, seeds=(0,), settings=NO_DISPATCH, limits=NO_LIMIT)
        found = answer(case.plan, case.problem, question, processes=1, cancelled=threading.Event(), report=silent)
        metrics = found.runs[0]
        yield Run(case=case, share=share, simulated_s=metrics.ttft_s.p95, queueing_s=metrics.queueing_s.p95)


def calibrated(found: Sequence[Run]) -> float:
    """Return the factor for which the median quotient is 1."""
    waiting = [run for run in found if run.share >= 0.9 and run.queueing_s > run.planned_s / 2]

    @cache
    def queue(number: int, faster: float) -> RequestQueue:
        case = waiting[number].case
        result = request_queue(case.plan, case.problem, faster=faster)
        assert result is not None, "drawn so"
        return result

    def median(faster: float) -> float:
        return statistics.median(
            run.modelled(queue(number, faster)).ttft_p95_s / run.simulated_s for number, run in enumerate(waiting)
        )

    low, high = 0.95, 1.2  # the faster requests leave, the shorter they wait
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if median(middle) > 1 else (low, middle)
    return low


def row_of(run: Run) -> Row:
    """Return the row of a run."""
    modelled = run.modelled(run.case.queue)
    return {
        "name": f"{run.case.name}, {run.share:.0%}",
        "share": run.share,
        "must_wait": modelled.must_wait,
        "seat_s": modelled.seat_p95_s,
        "lane_s": modelled.lane_p95_s,
        "queueing_s": run.queueing_s,
        "simulated_s": run.simulated_s,
        "planned_over_simulated": run.planned_s / run.simulated_s,
        "model_over_simulated": modelled.ttft_p95_s / run.simulated_s,
        "low": None,
        "high": None,
        "planned_within_2": None,
        "model_within_2": None,
    }


def summarised(found: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows, then a summary for every share."""
    shown = list[Row]()
    for row in found:
        shown.append(row)
        yield row
    for share in SHARES:
        alike = [row for row in shown if row["share"] == share]
        if not alike:
            continue
        planned, modelled = _sorted(alike, "planned_over_simulated"), _sorted(alike, "model_over_simulated")
        yield {
            **dict.fromkeys(shown[0]),
            "name": f"all, {share:.0%} of the planned rate",
            "share": share,
            "planned_over_simulated": statistics.median(planned),
            "model_over_simulated": statistics.median(modelled),
            "low": modelled[len(modelled) // 10],
            "high": modelled[-1 - len(modelled) // 10],
            "planned_within_2": _within_2(planned),
            "model_within_2": _within_2(modelled),
        }


def _sorted(found: Sequence[Row], name: str) -> list[float]:
    return sorted(float(row[name] or 0.0) for row in found)


def _within_2(quotients: Sequence[float]) -> str:
    return f"{sum(0.5 <= quotient <= 2.0 for quotient in quotients)} of {len(quotients)}"


if __name__ == "__main__":
    main()
