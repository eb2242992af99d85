"""Whether plans on random fleets keep their latency limits under simulated traffic at the planned rate.

    python -m benchmarks.goodput [--quick] [--json] [--cases N] [--seed S]

A case draws a fleet of two to four GPU types, a model, a trace or mean lengths, and limits on TTFT and TPOT. A fleet
without a plan is drawn again. The case gets the default plan of `hetis-plan place`, which is then simulated as `place`
does, with Poisson arrivals at the planned rate. ``kept`` says whether p95 TTFT and mean TPOT stay within their limits,
up to chance. ``ttft`` and ``tpot`` are the simulated values over the limits. ``best_rps`` is the highest rate that
keeps the limits, found by a sweep, and ``planned_over_best`` the planned rate over it. ``headed`` is the same ratio for
the rate in the plan's headline, which is lower than the planned rate if that misses a limit. The last row summarises.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.measuring import rows
from benchmarks.measuring.instances import NODE_SIZES, fleet, problem
from benchmarks.measuring.rows import Row
from hetis.planner.use_cases.simulate import Question, answer
from hetis.planner.use_cases.verify import AS_PLANNED, kept_rate, num_requests_of, verification_of, verified
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.metrics import Limits
from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError
from hetis.solver.placement.engines import DEFAULT_ENGINE, run_by
from hetis.solver.plan import Objective, Plan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import EngineRules, PlacementProblem

CASES, QUICK_CASES = 24, 2
MODELS = ("Llama-2-70B", "Qwen3-32B", "Llama-3.1-8B", "Qwen2.5-72B-Instruct", "Mixtral-8x7B-v0.1", "Qwen3-30B-A3B")
LENGTHS = ("azure_conv_2023", "sharegpt_8k_lengths", "sharegpt_first_turn_lengths", "4000/300", "1000/500", "500/50")
TTFT_S, TPOT_S = (0.5, 1.0, 2.0, 5.0), (0.03, 0.05, 0.1, 0.2)
TIME_LIMIT_S = 10.0
TOLERANCE = 0.02  # of the sweep, relative


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan for a randomly drawn fleet."""

    name: str
    problem: PlacementProblem
    plan: Plan


def main() -> None:
    """Print one row per case, and a summary row."""
    parser = rows.parser("benchmarks.goodput", __doc__)
    parser.add_argument("--cases", type=int, default=CASES, metavar="N", help=f"so many fleets (default {CASES})")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (default 0)")
    arguments = parser.parse_args()
    number = QUICK_CASES if arguments.quick else arguments.cases
    chosen = (case for case in cases(number, arguments.seed) if arguments.only in case.name)
    rows.show(counted(map(judged, chosen)), arguments, name="goodput")


def cases(number: int, seed: int) -> Iterator[Case]:
    """Yield ``number`` cases that have a plan."""
    draw, num_drawn = random.Random(seed), 0
    while num_drawn < number:
        types = draw.sample(sorted(NODE_SIZES), draw.randint(2, 4))
        nodes = [(draw.randint(1, 8), NODE_SIZES[gpu], gpu) for gpu in types]
        model, lengths = draw.choice(MODELS), draw.choice(LENGTHS)
        ttft_s, tpot_s = draw.choice(TTFT_S), draw.choice(TPOT_S)
        posed = problem(
            fleet(f"fleet {num_drawn}", *nodes),
            model=model,
            workload=lengths,
            objective=Objective(ttft_limit_s=ttft_s, tpot_limit_s=tpot_s),
        )
        posed = replace(posed, family=run_by(posed.family, EngineRules(name=DEFAULT_ENGINE)))
        try:
            plan = solve_placement(posed, budget=Budget(time_limit_s=TIME_LIMIT_S, clock=time.process_time))
        except InfeasibleError:
            continue
        num_drawn += 1
        words = f"{model} on {posed.cluster.num_gpus()} GPUs, {lengths}, {ttft_s:g} s, {1e3 * tpot_s:g} ms"
        yield Case(name=words, problem=posed, plan=plan)


def judged(case: Case) -> Row:
    """Simulate a plan at its rate, and search for the highest rate within the limits."""
    objective, plan = case.plan.objective, verified(
        case.plan, case.problem, seed=0, cancelled=threading.Event(), report=lambda _given, _total: None
    )  # fmt: skip
    found = verification_of(plan)
    assert found is not None, "the plan has replicas and limits"
    assert objective.ttft_limit_s is not None, "drawn"
    assert objective.tpot_limit_s is not None, "drawn"
    best_rps = best_rate(case)
    headed_rps = plan.result.value if found.kept else kept_rate(plan) or 0.0
    roles = [replica.role for replica in plan.replicas]
    return {
        "name": case.name,
        "replicas": len(roles),
        "prefill": roles.count(Role.PREFILL),
        "decode": roles.count(Role.DECODE),
        "planned_rps": plan.result.value,
        "kept": "yes" if found.kept else "no",
        "ttft": found.ttft_p95_s / objective.ttft_limit_s,
        "tpot": found.tpot_mean_s / objective.tpot_limit_s,
        "best_rps": best_rps,
        "planned_over_best": plan.result.value / best_rps if best_rps else None,
        "headed": headed_rps / best_rps if best_rps else None,
    }


def best_rate(case: Case) -> float:
    """Return the highest simulated rate within the limits, or 0 if there is none."""
    objective = case.plan.objective
    load = Load(
        lengths=case.problem.workload,
        max_position=case.problem.model.max_position,
        arrivals=Arrivals.DRAWN,
        rate_rps=case.plan.result.value,
    )
    question = Question(
        load=load, num_requests=num_requests_of(case.plan), seeds=(1,), settings=AS_PLANNED, sweeps=True,
        limits=Limits(ttft_s=objective.ttft_limit_s, tpot_s=objective.tpot_limit_s), tolerance=TOLERANCE,
    )  # fmt: skip
    found = answer(
        case.plan, case.problem, question, processes=1, cancelled=threading.Event(), report=lambda _given, _total: None
    )
    assert found.sweep is not None, "rates were swept"
    return found.sweep.goodput_rps


def counted(judgements: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows, then one that summarises them."""
    shown = list[Row]()
    for row in judgements:
        shown.append(row)
        yield row
    kept = sum(row["kept"] == "yes" for row in shown)
    shares = sorted(float(row["planned_over_best"] or 0.0) for row in shown)
    yield {
        **dict.fromkeys(shown[0] if shown else ()),
        "name": "all: how many, and the median",
        "kept": f"{kept} of {len(shown)}",
        "planned_over_best": shares[len(shares) // 2] if shares else None,
    }


if __name__ == "__main__":
    main()
