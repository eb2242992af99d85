"""The wait for a seat by the queue model of `hetis.planner.use_cases.seat_wait`, beside the simulator's.

    python -m benchmarks.seat_wait [--quick] [--json] [--plans N] [--seed S] [--calibrate]

A plan is made for a node or two, a model, lengths and limits, all drawn at random; plans that prefill and decode in
separate replicas, or that have more than 300 seats, for which few requests wait, are drawn again. Each is simulated at
shares of its planned rate with Poisson arrivals. A row is one such run: ``simulated_s`` is p95 TTFT, ``queueing_s`` p95
of the time until a prompt begins, ``wait_s`` the model's p95 wait for a seat. ``planned_over_simulated`` is the planned
p95 TTFT over the simulated one, and ``with_wait_over_simulated`` that with the wait added. The last rows summarise the
runs at each share in which requests wait: the simulated or the predicted wait is over half of the planned TTFT. They
have medians, ``low`` and ``high``, between which 8 in 10 quotients with the wait are, and how many of the quotients
are between 1/2 and 2.

``--calibrate`` prints instead how much more saturated replicas serve in the simulator than by the cost model, in the
median of the plans of seed 0 (`FASTER`). The table is of other plans.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.measuring import rows
from benchmarks.measuring.instances import NODE_SIZES, fleet, problem
from benchmarks.measuring.rows import Row
from hetis.planner.use_cases.seat_wait import SeatQueue, seat_queue
from hetis.planner.use_cases.simulate import Question, answer, default_rate
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Metrics
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
REQUESTS = 8_000
TIME_LIMIT_S = 8.0
NO_DISPATCH = Settings(dispatch=False, redispatch=False)
NO_LIMIT = Objective(ttft_limit_s=None, tpot_limit_s=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan with few seats."""

    name: str
    problem: PlacementProblem
    plan: Plan
    queue: SeatQueue


def main() -> None:
    """Print one row per plan and share of its rate, and a summary for each share."""
    parser = rows.parser("benchmarks.seat_wait", __doc__)
    parser.add_argument("--plans", type=int, default=PLANS, metavar="N", help=f"so many plans (default {PLANS})")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of what is drawn (default 1)")
    parser.add_argument("--calibrate", action="store_true", help="print the factor FASTER from the plans of seed 0")
    arguments = parser.parse_args()
    number = QUICK_PLANS if arguments.quick else arguments.plans
    if arguments.calibrate:
        print(f"FASTER = {statistics.median(faster(case) for case in cases(number, seed=0)):.3f}")
        return
    chosen = (case for case in cases(number, arguments.seed) if arguments.only in case.name)
    rows.show(summarised(row for case in chosen for row in compared(case)), arguments, name="seat_wait")


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
        queue = seat_queue(plan, posed)
        if queue is None or queue.seats > MOST_SEATS:
            continue
        num_drawn += 1
        gpus = ", ".join(f"{each} {gpu}" for _, each, gpu in nodes)
        yield Case(name=f"{model} on {gpus}, {lengths}, {queue.seats} seats", problem=posed, plan=plan, queue=queue)


def simulated(case: Case, load: Load) -> Metrics:
    """Return the metrics of one run."""
    question = Question(load=load, num_requests=REQUESTS, seeds=(0,), settings=NO_DISPATCH, limits=NO_LIMIT)
    found = answer(case.plan, case.problem, question, processes=1, cancelled=threading.Event(), report=silent)
    return found.runs[0]


def load_of(case: Case, arrivals: Arrivals, rate_rps: float | None = None) -> Load:
    """Return the traffic for which a plan was made."""
    posed = case.problem
    return Load(lengths=posed.workload, max_position=posed.model.max_position, arrivals=arrivals, rate_rps=rate_rps)


def faster(case: Case) -> float:
    """Return the simulated saturated rate over that of the cost model."""
    served = simulated(case, load_of(case, Arrivals.SATURATED)).throughput_rps.value
    return served / sum(one.rate for one in case.plan.replicas)


def compared(case: Case) -> Iterator[Row]:
    """Simulate a plan at each share of its rate."""
    planned_s = max(one.ttft_s for one in case.plan.replicas)
    for share in SHARES:
        rate_rps = share * default_rate(case.plan, case.problem)
        metrics, wait = simulated(case, load_of(case, Arrivals.DRAWN, rate_rps)), case.queue.at(rate_rps)
        simulated_s, queueing_s = metrics.ttft_s.p95, metrics.queueing_s.p95
        yield {
            "name": f"{case.name}, {share:.0%}",
            "share": share,
            "waits": "yes" if max(queueing_s, wait.p95_s) > planned_s / 2 else "no",
            "must_wait": wait.must_wait,
            "wait_s": wait.p95_s,
            "queueing_s": queueing_s,
            "simulated_s": simulated_s,
            "planned_over_simulated": planned_s / simulated_s,
            "with_wait_over_simulated": (planned_s + wait.p95_s) / simulated_s,
            "low": None,
            "high": None,
            "planned_within_2": None,
            "with_wait_within_2": None,
        }


def summarised(found: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows, then a summary for every share."""
    shown = list[Row]()
    for row in found:
        shown.append(row)
        yield row
    for share in SHARES:
        waiting = [row for row in shown if row["share"] == share and row["waits"] == "yes"]
        if not waiting:
            continue
        planned, with_wait = _sorted(waiting, "planned_over_simulated"), _sorted(waiting, "with_wait_over_simulated")
        yield {
            **dict.fromkeys(shown[0]),
            "name": f"all, {share:.0%} of the planned rate",
            "share": share,
            "waits": f"{len(waiting)} of {sum(row['share'] == share for row in shown)}",
            "planned_over_simulated": statistics.median(planned),
            "with_wait_over_simulated": statistics.median(with_wait),
            "low": with_wait[len(with_wait) // 10],
            "high": with_wait[-1 - len(with_wait) // 10],
            "planned_within_2": _within_2(planned),
            "with_wait_within_2": _within_2(with_wait),
        }


def _sorted(found: Sequence[Row], name: str) -> list[float]:
    return sorted(float(row[name] or 0.0) for row in found)


def _within_2(quotients: Sequence[float]) -> str:
    return f"{sum(0.5 <= quotient <= 2.0 for quotient in quotients)} of {len(quotients)}"


if __name__ == "__main__":
    main()
