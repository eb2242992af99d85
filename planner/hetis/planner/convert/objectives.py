"""Objectives from messages: with the defaults of `hetis-plan place`, and every wrong field reported."""

from __future__ import annotations

import math
from collections.abc import Callable

from hetis.planner.use_cases import place as placing
from hetis.solver.plan import Objective, ObjectiveKind
from hetis.v1 import plan_pb2

Wrong = Callable[[str, str], object]
"""Called with the path of a wrong field, and what is wrong with it."""

_KINDS = {
    plan_pb2.OBJECTIVE_KIND_UNSPECIFIED: ObjectiveKind.GOODPUT,
    plan_pb2.OBJECTIVE_KIND_GOODPUT: ObjectiveKind.GOODPUT,
    plan_pb2.OBJECTIVE_KIND_THROUGHPUT: ObjectiveKind.THROUGHPUT,
    plan_pb2.OBJECTIVE_KIND_COST: ObjectiveKind.COST,
    plan_pb2.OBJECTIVE_KIND_GPUS: ObjectiveKind.GPUS,
}


def objective_from_proto(message: plan_pb2.Objective, field: str, wrong: Wrong) -> Objective:
    """Return the objective; ``wrong`` is called for every wrong field, whose path begins with ``field``."""
    kind = _KINDS.get(message.kind, ObjectiveKind.GOODPUT)
    demand_rps = message.demand_rps or None
    if demand_rps is not None and not (demand_rps > 0 and math.isfinite(demand_rps)):
        wrong(f"{field}.demand_rps", f"is {demand_rps:g}, must be above 0 and finite")
    elif kind in (ObjectiveKind.COST, ObjectiveKind.GPUS) and demand_rps is None:
        wrong(f"{field}.demand_rps", f"is missing: the objective {kind.name} needs a demanded rate")
    return placing.objective(
        kind,
        ttft_s=_limit_s(message, "ttft", field, wrong),
        tpot_s=_limit_s(message, "tpot", field, wrong),
        demand_rps=demand_rps,
    )


def _limit_s(message: plan_pb2.Objective, name: str, field: str, wrong: Wrong) -> float | None:
    """Return a limit, infinity for no limit, or None for the default."""
    limit, unlimited = f"{name}_limit_s", f"{name}_unlimited"
    if message.HasField(unlimited):  # type: ignore[arg-type]  # the stubs list the names as a literal
        if not getattr(message, unlimited):
            wrong(f"{field}.{unlimited}", "is false, must be true where it is set")
        return math.inf
    if not message.HasField(limit):  # type: ignore[arg-type]
        return None
    seconds: float = getattr(message, limit)
    if not (seconds > 0 and math.isfinite(seconds)):
        wrong(f"{field}.{limit}", f"is {seconds:g}, must be above 0 and finite; {unlimited} lifts it")
        return None
    return seconds
