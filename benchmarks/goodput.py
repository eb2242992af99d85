"""Whether plans on random fleets keep their latency limits under simulated traffic at the planned rate.

    python -m benchmarks.goodput [--quick] [--json] [--cases N] [--seed S]

A case draws a fleet of two to four GPU types, a model, a trace or mean lengths, and limits on TTFT and TPOT. A fleet
without a plan is drawn again. The case gets the default plan of `hetis-plan place`, which is then simulated as
`place` does, with Poisson arrivals at the planned rate; where it misses a limit, ``place`` plans again for a tighter
one, whose share of the limit is ``tightened``. ``kept`` tells whether p95 TTFT and mean TPOT of the plan that is shown
stay within their limits, up to chance. ``ttft`` and ``tpot`` are the simulated values over the limits. ``kept_rps``
is the highest rate that the plan is reported to keep, lower than the planned one if that misses a limit, and
``kept_again`` whether other traffic at this rate, by another seed, keeps the limits. ``best_rps`` is the highest rate
that keeps the limits, found by a sweep in runs as long as the longest that `place` makes; ``planned_over_best`` and
``kept_over_best`` are the two rates over it. The last rows summarise.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.measuring import rows
from benchmarks.measuring.instances import NODE_SIZES, fleet, problem
from benchmarks.measuring.rows import Row
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.simulation.simulate import Question, answer
from hetis.planner.use_cases.sources import named
from hetis.planner.use_cases.verification.choosing import verified_plan
from hetis.planner.use_cases.verification.equal_stages import other_plan
from hetis.planner.use_cases.verification.outcome import settings_of
from hetis.planner.use_cases.verification.rates import enough_of, longest_of, no_progress, simulated_at
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.running import never, silent
from hetis.simulator.values import Settings
from hetis.solver.budget import Budget
from hetis.solver.errors import InfeasibleError
from hetis.solver.placement.families import DEFAULT_ENGINE, run_by
from hetis.solver.plan import Objective, Plan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import EngineRules, PlacementProblem

CASES, QUICK_CASES = 24, 2
MODELS = ("Llama-2-70B", "Qwen3-32B", "Llama-3.1-8B", "Qwen2.5-72B-Instruct", "Mixtral-8x7B-v0.1", "Qwen3-30B-A3B")
LENGTHS = ("azure_conv_2023", "sharegpt_8k_lengths", "sharegpt_first_turn_lengths", "4000/300", "1000/500", "500/50")
TTFT_S, TPOT_S = (0.5, 1.0, 2.0, 5.0), (0.03, 0.05, 0.1, 0.2)
TIME_LIMIT_S = 10.0
TOLERANCE = 0.02  # relative tolerance of the sweep
SEED, OTHER_SEED = 0, 7  # seeds of the traffic that `place` simulates, and of that which judges it


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
        posed = replace(posed, family=run_by(posed.family, named(EngineRules(name=""), DEFAULT_ENGINE)))
        try:
            plan = searched(posed)
        except InfeasibleError:
            continue
        num_drawn += 1
        words = f"{model} on {posed.cluster.num_gpus()} GPUs, {lengths}, {ttft_s:g} s, {1e3 * tpot_s:g} ms"
        yield Case(name=words, problem=posed, plan=plan)


def searched(posed: PlacementProblem) -> Plan:
    """Return the plan that is found in the time limit."""
    budget = Budget(time_limit_s=TIME_LIMIT_S, clock=time.process_time, explains=False)
    return solve_placement(posed, budget=budget)


def judged(case: Case) -> Row:
    """Simulate a plan at its rate, plan again if it misses a limit, and search for the highest rate within them."""
    plan = verified_plan(
        case.plan,
        case.problem,
        searched,
        seed=SEED,
        budget=Budget(),
        report=no_progress,
        equal_stages=lambda: other_plan(case.plan, case.problem, SEED, Budget()),
    )
    verified, objective = Verified.of(plan), plan.objective
    found, tightening = verified.verification, verified.tightened
    assert found is not None, "the plan has replicas and limits"
    assert objective.ttft_limit_s is not None, "drawn"
    assert objective.tpot_limit_s is not None, "drawn"
    kept_rps = found.kept_rps or 0.0
    other = (
        simulated_at(
            plan,
            case.problem,
            kept_rps,
            objective,
            seed=OTHER_SEED,
            budget=Budget(),
            report=silent,
            lengths=(enough_of(plan), longest_of(plan)),
            settings=settings_of(found),
        )
        if kept_rps
        else None
    )
    best_rps = best_rate(replace(case, plan=plan), settings_of(found))
    roles = [replica.role for replica in plan.replicas]
    return {
        "name": case.name,
        "replicas": len(roles),
        "prefill": roles.count(Role.PREFILL),
        "decode": roles.count(Role.DECODE),
        "planned_rps": plan.result.value,
        "tightened": None if tightening is None else tightening.planned_s / tightening.asked_s,
        "equal_stages": "yes" if verified.equal_stages_chosen else "no",
        "kept": "yes" if found.kept else "no",
        "ttft": found.ttft_p95_s / objective.ttft_limit_s,
        "tpot": found.tpot_mean_s / objective.tpot_limit_s,
        "kept_rps": kept_rps,
        "kept_again": "yes" if other is not None and other.kept else "no",
        "best_rps": best_rps,
        "planned_over_best": plan.result.value / best_rps if best_rps else None,
        "kept_over_best": kept_rps / best_rps if best_rps else None,
    }


def best_rate(case: Case, settings: Settings) -> float:
    """Return the highest simulated rate within the limits, or 0 if there is none."""
    load = Load(
        lengths=case.problem.workload,
        max_position=case.problem.model.max_position,
        arrivals=Arrivals.DRAWN,
        rate_rps=case.plan.result.value,
    )
    question = Question(
        load=load, num_requests=longest_of(case.plan), seeds=(OTHER_SEED,), settings=settings, sweeps=True,
        limits=case.plan.objective, tolerance=TOLERANCE,
    )  # fmt: skip
    found = answer(case.plan, case.problem, question, processes=1, is_cancelled=never, report=silent)
    assert found.sweep is not None, "rates were swept"
    return found.sweep.goodput_rps


def counted(judgements: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows, then those that summarise them."""
    shown = list[Row]()
    for row in judgements:
        shown.append(row)
        yield row
    of_best = {
        name: sorted(float(row[name] or 0.0) for row in shown) or [0.0]
        for name in ("planned_over_best", "kept_over_best")
    }
    yield {
        **dict.fromkeys(shown[0] if shown else ()),
        "name": "all: how many, and the median",
        "kept": _count(shown, "kept"),
        "kept_again": _count(shown, "kept_again"),
        **{name: shares[len(shares) // 2] for name, shares in of_best.items()},
    }
    yield {
        **dict.fromkeys(shown[0] if shown else ()),
        "name": "all: the least",
        **{name: shares[0] for name, shares in of_best.items()},
    }


def _count(shown: list[Row], name: str) -> str:
    return f"{sum(row[name] == 'yes' for row in shown)} of {len(shown)}"


if __name__ == "__main__":
    main()
