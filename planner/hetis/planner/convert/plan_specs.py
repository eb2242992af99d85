"""Placement requests as PlanSpecs, and back."""

from __future__ import annotations

from hetis.planner.convert.names import duration
from hetis.planner.convert.plans import OBJECTIVE_KINDS, TO_PROTO
from hetis.planner.use_cases.request import LIMITS, NO_LIMIT, PlacementRequest, ratio_of
from hetis.v1 import plan_pb2

# Fields with the same name and value in a request and in a PlanSpec, in which 0 and empty stand for the default.
SAME = (
    *("weights", "kv", "mtp", "strategy", "engine", *LIMITS, "max_num_seqs", "kv_blocks", "survive"),
    *("kv_between_vendors", "rung", "target"),
    *("ttft_statistic", "tpot_statistic"),
)


def spec_from_request(request: PlacementRequest) -> plan_pb2.PlanSpec:
    """Return the spec of a request, without its cluster, model, workload and profiles, which are resources there."""
    spec = plan_pb2.PlanSpec(
        objective=_objective(request),
        roles=[TO_PROTO[role] for role in request.all_roles],
        chunk_tokens=sorted(request.chunk_tokens),
        skip_verification=not request.verify,
        gap_target=ratio_of(request.gap),
        time_limit=duration(request.time_limit_s),
        seed=request.seed,
        attainment=ratio_of(request.attainment or 0.0),
        worth=ratio_of(request.worth),
        keep=ratio_of(request.keep or 0.0),
    )
    for name in SAME:
        if value := getattr(request, name):
            setattr(spec, name, value)
    return spec


def _objective(request: PlacementRequest) -> plan_pb2.Objective:
    goal = plan_pb2.Objective(kind=OBJECTIVE_KINDS[request.goal.kind], demand_rps=request.rate or 0.0)
    for name, limit_s in request.limits_s.items():
        if limit_s == NO_LIMIT:
            setattr(goal, f"{name}_unlimited", True)
        elif limit_s is not None:
            setattr(goal, f"{name}_limit_s", limit_s)
    return goal
