"""One search inside a solver process: from a posed problem to an answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

from hetis.formats.canonical import canonical_json
from hetis.formats.documents import Value, from_data, to_data
from hetis.planner.convert.plans import result_to_proto
from hetis.planner.jobs.outcomes import Answer, FoundPlan, Infeasible, Invalid, NothingFound, Unsound
from hetis.planner.jobs.posed import PosedProblem
from hetis.planner.use_cases.errors import UncheckedPlanError
from hetis.planner.use_cases.place import make_plan
from hetis.solver.budget import Budget, Report
from hetis.solver.errors import InfeasibleError, InvalidProblemError, NoPlanFoundError


def solve(
    posed: PosedProblem,
    *,
    cancelled: threading.Event,
    report: Report,
    clock: Callable[[], float] = time.monotonic,
) -> Answer:
    """Search until the answer is good enough, the time is up, or ``cancelled`` is set, and check what is found."""
    budget = Budget(time_limit_s=posed.settings.time_limit_s, clock=clock, cancelled=cancelled)
    try:
        loaded, problem = posed.inputs_for_engine(), posed.problem()
        plan = make_plan(loaded, problem, posed.settings, budget=budget, report=report)
    except InfeasibleError as error:
        return Infeasible(error.reasons)
    except NoPlanFoundError as error:
        return NothingFound(str(error))
    except UncheckedPlanError as error:
        return Unsound(error.violations)
    except InvalidProblemError as error:
        return Invalid(str(error))
    document = document_bytes(plan)
    if document_bytes(from_data(json.loads(document))) != document:
        return Unsound(("its document reads as another plan",))
    return FoundPlan(document, result_to_proto(plan, document).SerializeToString())


def document_bytes(plan: Value) -> bytes:
    """Return the bytes that a plan's digest is computed from."""
    return canonical_json(to_data(plan, self_contained=True))
