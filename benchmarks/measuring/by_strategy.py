"""Measure and check one placement by a named strategy. A heuristic without a plan is a valid answer, too."""

from __future__ import annotations

import math
import time
import traceback
from dataclasses import dataclass, replace

from hetis.planner.cli.native_output import no_native_output
from hetis.solver.budget import Budget
from hetis.solver.check import check_plan
from hetis.solver.errors import HetisError, InfeasibleError
from hetis.solver.placement.strategies import STRATEGIES
from hetis.solver.plan import Status
from hetis.solver.planning import solve_placement
from hetis.solver.problem import PlacementProblem

FAILED = "failed"  # a crash, or a plan that the checker refuses


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The result of a strategy. Without a plan, the value is 0, and so is the bound if infeasibility is proved."""

    status: str
    value: float
    bound: float
    seconds: float
    note: str = ""


def answer(problem: PlacementProblem, strategy: str, *, time_limit_s: float) -> Answer:
    """Solve by one strategy, including the naming of GPUs.

    All seconds are CPU seconds of this process, so that a busy machine hardly changes plan and figures. The checker is
    not timed.
    """
    started = time.process_time()
    try:
        budget = Budget(time_limit_s=time_limit_s, clock=time.process_time)
        with no_native_output():
            plan = solve_placement(problem, strategy=strategy, budget=budget)
    except InfeasibleError as error:
        return _without_plan(Status.INFEASIBLE.value, 0.0, started, str(error))
    except HetisError as error:
        return _without_plan("none", math.inf, started, str(error))
    except Exception as error:  # a bug: the row says so, and later rows are still measured
        traceback.print_exc()
        return _without_plan(FAILED, math.inf, started, repr(error))
    seconds = time.process_time() - started
    violations = check_plan(plan, replace(problem, family=STRATEGIES[strategy].restrict(problem.family)))
    if violations:
        return _without_plan(FAILED, math.inf, started, f"the checker objects: {violations[0]}")
    result = plan.result
    return Answer(status=result.status.value, value=result.value, bound=result.bound, seconds=seconds)


def _without_plan(status: str, bound: float, started: float, note: str) -> Answer:
    return Answer(status=status, value=0.0, bound=bound, seconds=time.process_time() - started, note=note)
