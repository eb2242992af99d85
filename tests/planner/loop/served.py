"""A small fleet of L4 and A10G, a plan of least cost on it, and histories of its traffic."""

from __future__ import annotations

from functools import cache

import numpy as np

from hetis.formats.documents import from_data
from hetis.planner.loop.forecast import BIN_S, History
from hetis.planner.use_cases.describing import describe
from hetis.planner.use_cases.place import search
from hetis.planner.use_cases.placement_settings import PlacementSettings
from hetis.planner.use_cases.saved_plans import PlanAndProblem
from hetis.planner.use_cases.sources import engine_rules, load_inputs
from hetis.solver.budget import Budget, silent
from hetis.solver.cluster import Cluster
from hetis.solver.plan import Objective, ObjectiveKind, Role

SETTINGS = PlacementSettings(engine=engine_rules(None, "hetis"), roles=(Role.UNIFIED,), rung="node")


@cache
def fleet(each: int = 6) -> Cluster:
    nodes = [
        {"name": "l4", "count": each, "gpus": [{"type": "L4", "count": 1}]},
        {"name": "a10", "count": each, "gpus": [{"type": "A10G", "count": 1}]},
    ]
    found = from_data(
        {
            "apiVersion": "hetis/v1", "kind": "Cluster", "name": "small", "nodes": nodes,
            "network": {"bandwidth": "100Gbps", "latency": "20us"},
        },
        name="small",
    )  # fmt: skip
    assert isinstance(found, Cluster)
    return found


@cache
def plan_for(demand_rps: float, kind: ObjectiveKind = ObjectiveKind.COST, each: int = 6) -> PlanAndProblem:
    """The plan of least cost for a demand; or that for the most goodput, whatever the demand."""
    loaded = load_inputs(cluster=fleet(each), model="Llama-3.1-8B", workload="500/100")
    objective = Objective(kind=kind, demand_rps=demand_rps if kind is ObjectiveKind.COST else None)
    problem = SETTINGS.problem(loaded.inputs, objective)
    plan = describe(search(problem, SETTINGS, budget=Budget(), report=silent), loaded, problem, SETTINGS)
    return PlanAndProblem(plan=plan, inputs=loaded.inputs, problem=problem, warnings=())


def steady(rate: float, bins: int = 200) -> History:
    """A history of equal rates, which leaves no doubt about the next."""
    return History(end_s=bins * BIN_S, rates=np.full(bins, rate))
