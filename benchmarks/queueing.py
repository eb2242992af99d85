"""p95 TTFT by the queue model of `hetis.planner.use_cases.verification.queueing`, and as planned, over the simulator's.

    python -m benchmarks.queueing [--quick] [--json] [--plans N] [--seed S]

A plan is made for a node or two, a model, lengths, limits and a strategy, all drawn at random; plans of more than 300
seats, for which few requests wait, are drawn again. Each is simulated at shares of its planned rate with Poisson
arrivals. A row is one such run: ``queueing_s`` is p95 of the time until a prompt begins, ``simulated_s`` p95 TTFT,
``seat_s`` and ``lane_s`` are the model's p95 waits. The quotients are the planned p95 TTFT and that of the model over
the simulated one. The last rows summarise the runs of plans with and without separate replicas for prefill and decode
at each share: medians, ``low`` and ``high``, between which 8 in 10 quotients of the model are, and how many quotients
are between 1/2 and 2. The form of the model was chosen with other plans.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.measuring import rows
from benchmarks.measuring.instances import NODE_SIZES, fleet, problem
from benchmarks.measuring.rows import Row
from hetis.planner.use_cases.simulate import Question, answer, default_rate
from hetis.planner.use_cases.verification.queueing import RequestQueue, request_queue
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.running import never, silent
from hetis.simulator.values import Settings
from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError
from hetis.solver.placement.families import DEFAULT_ENGINE, run_by
from hetis.solver.plan import Objective, Plan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import EngineRules, PlacementProblem

PLANS, QUICK_PLANS = 40, 2
MODELS = ("Llama-2-70B", "Qwen3-32B", "Llama-3.1-8B", "Mixtral-8x7B-v0.1", "Qwen3-30B-A3B")
LENGTHS = (
    *("azure_conv_2023", "sharegpt_8k_lengths", "sharegpt_first_turn_lengths", "longbench_lengths"),
    *("humaneval_lengths", "4000/300", "1000/500", "500/50"),
)
STRATEGIES = ("hetis", "hexgen2")  # the latter prefills and decodes in separate replicas
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

    @property
    def is_apart(self) -> bool:
        """Return whether replicas prefill for others."""
        return any(one.role is Role.PREFILL for one in self.plan.replicas)


def main() -> None:
    """Print one row per plan and share of its rate, and a summary for each share."""
    parser = rows.parser("benchmarks.queueing", __doc__)
    parser.add_argument("--plans", type=int, default=PLANS, metavar="N", help=f"so many plans (default {PLANS})")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of what is drawn (default 1)")
    arguments = parser.parse_args()
    number, num_requests = (QUICK_PLANS, QUICK_REQUESTS) if arguments.quick else (arguments.plans, REQUESTS)
    chosen = (case for case in cases(number, arguments.seed) if arguments.only in case.name)
    rows.show(summarised(row for case in chosen for row in rows_of(case, num_requests)), arguments, name="queueing")


def cases(number: int, seed: int) -> Iterator[Case]:
    """Yield ``number`` plans."""
    draw, num_drawn = random.Random(seed), 0
    while num_drawn < number:
        types = draw.sample(sorted(NODE_SIZES), draw.choice((1, 1, 2)))
        nodes = [(1, draw.choice((2, 4, NODE_SIZES[gpu])), gpu) for gpu in types]
        model, lengths, rules = draw.choice(MODELS), draw.choice(LENGTHS), draw.choice((True, False))
        strategy = draw.choice(STRATEGIES)
        objective = Objective(ttft_limit_s=draw.choice(TTFT_S), tpot_limit_s=draw.choice(TPOT_S))
        posed = problem(fleet(f"fleet {num_drawn}", *nodes), model=model, workload=lengths, objective=objective)
        if rules:
            posed = replace(posed, family=run_by(posed.family, EngineRules(name=DEFAULT_ENGINE)))
        budget = Budget(time_limit_s=TIME_LIMIT_S, clock=time.process_time, explains=False)
        try:
            plan = solve_placement(posed, strategy=strategy, budget=budget)
        except InfeasibleError:
            continue
        queue = request_queue(plan, posed)
        if queue is None or queue.seats > MOST_SEATS:
            continue
        num_drawn += 1
        gpus = ", ".join(f"{each} {gpu}" for _, each, gpu in nodes)
        yield Case(name=f"{model} on {gpus}, {lengths}, {queue.seats} seats", problem=posed, plan=plan, queue=queue)


def rows_of(case: Case, num_requests: int = REQUESTS) -> Iterator[Row]:
    """Simulate a plan at each share of its rate."""
    lengths, most = case.problem.workload, case.problem.model.max_position
    planned_s = max(one.ttft_s for one in case.plan.replicas)
    for share in SHARES:
        rate_rps = share * default_rate(case.plan, case.problem)
        load = Load(lengths=lengths, max_position=most, arrivals=Arrivals.DRAWN, rate_rps=rate_rps)
        question = Question(load=load, num_requests=num_requests, seeds=(0,), settings=NO_DISPATCH, limits=NO_LIMIT)
        found = answer(case.plan, case.problem, question, processes=1, is_cancelled=never, report=silent)
        (metrics,), modelled = found.runs, case.queue.at(rate_rps)
        yield {
            "name": f"{case.name}, {share:.0%}",
            "share": share,
            "roles": "separate" if case.is_apart else "unified",
            "must_wait": modelled.must_wait,
            "seat_s": modelled.seat_p95_s,
            "lane_s": modelled.lane_p95_s,
            "queueing_s": metrics.queueing_s.p95,
            "simulated_s": metrics.ttft_s.p95,
            "planned_over_simulated": planned_s / metrics.ttft_s.p95,
            "model_over_simulated": modelled.ttft_p95_s / metrics.ttft_s.p95,
            "low": None,
            "high": None,
            "planned_within_2": None,
            "model_within_2": None,
        }


def summarised(found: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows, then a summary for every share of the rate."""
    shown = list[Row]()
    for row in found:
        shown.append(row)
        yield row
    for roles, share in itertools.product(("unified", "separate"), SHARES):
        alike = [row for row in shown if (row["roles"], row["share"]) == (roles, share)]
        if not alike:
            continue
        planned, modelled = _sorted(alike, "planned_over_simulated"), _sorted(alike, "model_over_simulated")
        yield {
            **dict.fromkeys(shown[0]),
            "name": f"all of {roles} roles, {share:.0%} of the planned rate",
            "share": share,
            "roles": roles,
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
