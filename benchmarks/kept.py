"""Whether plans on random fleets keep what they promise, and how near that is to the best plan.

    python -m benchmarks.kept [--quick] [--json] [--cases N] [--seed S] [--burstiness CV]

A case draws a fleet of two to four GPU types, a model, a trace or mean lengths, and limits on TTFT and TPOT. A fleet
without a plan is drawn again. ``planned_rps`` is the value of the default plan of `hetis-plan place` before simulation,
``bound_rps`` its bound, and ``value_rps`` what it becomes after simulation with Poisson arrivals, or in bursts.
``kept_again`` tells whether other traffic at this rate, by another seed, keeps the limits, up to chance. ``best_rps``
is the highest rate that simulation finds to keep them for any of several plans: this one, the best ones for tighter
limits on TTFT, and that of equal stages, by sweeps in runs as long as the longest that `place` makes. The ratios are
over it. The last rows summarise.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from threading import Event

from benchmarks.measuring import rows
from benchmarks.measuring.instances import NODE_SIZES, fleet, problem
from benchmarks.measuring.rows import Row
from hetis.planner.use_cases.grouping import shapes_of
from hetis.planner.use_cases.record.parts import Verified
from hetis.planner.use_cases.simulation.simulate import Question, answer, seats_of
from hetis.planner.use_cases.sources import named
from hetis.planner.use_cases.verification.equal_stages import budget_of_one
from hetis.planner.use_cases.verification.outcome import promising, settings_of
from hetis.planner.use_cases.verification.rates import (
    enough_of,
    kept_plan,
    longest_of,
    most_requests_of,
    simulated_at,
    simulated_part,
)
from hetis.simulator.arrivals import Arrivals, Load
from hetis.simulator.running import never, silent
from hetis.simulator.values import Settings
from hetis.solver.budget import Budget
from hetis.solver.engine_rules import EngineRules
from hetis.solver.errors import InfeasibleError
from hetis.solver.placement.families import DEFAULT_ENGINE, STRATEGIES, run_by
from hetis.solver.plan import Objective, Plan, Role
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem

CASES, QUICK_CASES = 6, 2
MODELS = ("Llama-2-70B", "Qwen3-32B", "Llama-3.1-8B", "Qwen2.5-72B-Instruct", "Mixtral-8x7B-v0.1", "Qwen3-30B-A3B")
LENGTHS = ("azure_conv_2023", "sharegpt_8k_lengths", "sharegpt_first_turn_lengths", "4000/300", "1000/500", "500/50")
TTFT_S, TPOT_S = (0.5, 1.0, 2.0, 5.0), (0.03, 0.05, 0.1, 0.2)
TIME_LIMIT_S = 10.0
TOLERANCE = 0.02  # relative tolerance of the sweep
TURNS = 20  # how many times the best rate's runs replace all the requests that a plan holds at once
TIGHTER = (0.5, 0.75)  # shares of the limit on TTFT for which other plans are searched
SEED, OTHER_SEED = 0, 7  # seeds of the traffic that `place` simulates, and of that which judges it


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan for a randomly drawn fleet."""

    name: str
    problem: PlacementProblem
    plan: Plan


def main() -> None:
    """Print one row per case, and a summary row."""
    parser = rows.parser("benchmarks.kept", __doc__)
    parser.add_argument("--cases", type=int, default=CASES, metavar="N", help=f"so many fleets (default {CASES})")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn (default 0)")
    parser.add_argument("--burstiness", type=float, default=1.0, metavar="CV", help="of the arrivals (default 1)")
    arguments = parser.parse_args()
    number = QUICK_CASES if arguments.quick else arguments.cases
    drawn = cases(number, arguments.seed, arguments.burstiness)
    chosen = (case for case in drawn if arguments.only in case.name)
    rows.show(counted(map(judged, chosen)), arguments, name="kept")


def cases(number: int, seed: int, burstiness: float = 1.0) -> Iterator[Case]:
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
        posed = replace(posed, workload=replace(posed.workload, burstiness=burstiness))
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
    """Simulate a plan, and search for the highest rate within the limits of this and of other plans."""
    plan = kept_plan(case.plan, case.problem, seed=SEED, budget=Budget(), report=lambda *_: None)
    found, objective = Verified.of(plan).verification, plan.objective
    assert found is not None, "the plan has replicas and limits"
    settings, value_rps = settings_of(found), plan.result.value
    other = (
        simulated_at(
            plan, case.problem, value_rps, objective, seed=OTHER_SEED, budget=Budget(), report=silent,
            lengths=(enough_of(plan), longest_of(plan)), settings=settings,
        )
        if value_rps
        else None
    )  # fmt: skip
    best_rps = max(best_rate(replace(case, plan=one), settings) for one in (plan, *other_plans(case)))
    roles = [replica.role for replica in plan.replicas]
    return {
        "name": case.name,
        "replicas": len(roles),
        "prefill": roles.count(Role.PREFILL),
        "decode": roles.count(Role.DECODE),
        "utilisation": case.plan.result.utilisation,
        "planned_rps": case.plan.result.value,
        "value_rps": value_rps,
        "bound_rps": plan.result.bound,
        "kept_again": "yes" if other is not None and other.kept else "no",
        "best_rps": best_rps,
        "planned_over_best": case.plan.result.value / best_rps if best_rps else None,
        "value_over_best": value_rps / best_rps if best_rps else None,
        "bound_over_value": plan.result.bound / value_rps if value_rps else None,
    }


def other_plans(case: Case) -> Iterator[Plan]:
    """Yield the best plans for tighter limits, held to those of the case, and the best one of equal stages."""
    objective = case.problem.objective
    assert objective.ttft_limit_s is not None, "drawn"
    for share in TIGHTER:
        tighter = replace(objective, ttft_limit_s=share * objective.ttft_limit_s)
        try:
            yield replace(searched(replace(case.problem, objective=tighter)), objective=objective)
        except InfeasibleError:
            continue
    if Role.UNIFIED in case.problem.family.roles:
        uniform = replace(case.problem, family=STRATEGIES["uniform"].restrict(case.problem.family))
        found = solve_placement(uniform, strategy="uniform", budget=budget_of_one(Event()), seed=SEED)
        if shapes_of(found) != shapes_of(case.plan):
            yield promising(replace(found, inputs={}))


def best_rate(case: Case, settings: Settings) -> float:
    """Return the highest simulated rate within the limits, or 0 if there is none.

    Of a plan with more seats than a run fills, a part with its share of the traffic is simulated, as by `place`, in
    runs that replace what it holds `TURNS` times: while seats fill, any rate seems to be kept.
    """
    plan = case.plan
    part = simulated_part(plan, case.problem, most_requests_of(plan).to_fill)
    load = Load(
        lengths=case.problem.workload,
        max_position=case.problem.model.max_position,
        arrivals=Arrivals.DRAWN,
        rate_rps=part.share * (plan.result.value or plan.planned_rate()),
        gap_cv=case.problem.workload.burstiness,
    )
    question = Question(
        load=load, num_requests=max(longest_of(part.plan), TURNS * seats_of(part.plan)), seeds=(OTHER_SEED,),
        settings=settings, sweeps=True, limits=plan.objective, tolerance=TOLERANCE,
    )  # fmt: skip
    found = answer(part.plan, case.problem, question, processes=1, is_cancelled=never, report=silent)
    assert found.sweep is not None, "rates were swept"
    return found.sweep.goodput_rps / part.share


def counted(judgements: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows, then those that summarise them."""
    shown = list[Row]()
    for row in judgements:
        shown.append(row)
        yield row
    of_best = {
        name: sorted(float(row[name] or 0.0) for row in shown) or [0.0]
        for name in ("planned_over_best", "value_over_best", "bound_over_value")
    }
    yield {
        **dict.fromkeys(shown[0] if shown else ()),
        "name": "all: how many, and the median",
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
