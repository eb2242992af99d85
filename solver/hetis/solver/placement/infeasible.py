"""Why no plan exists: what is missing, in numbers, the most telling first."""

from __future__ import annotations

from hetis.solver.placement.tables import Atlas
from hetis.solver.plan import ObjectiveKind

GIB = 2**30


def why_infeasible(atlas: Atlas) -> tuple[str, ...]:
    """Sentences on memory, limits and demand, for a problem that was proved infeasible."""
    problem = atlas.problem
    model = problem.model
    reasons = []
    if not atlas.ranks:
        sizes = "/".join(map(str, problem.family.tp_sizes))
        return (f"{model.name}: its {model.q_heads} query heads cannot be split by any of TP {sizes} on this fleet",)
    weights = model.params() * model.weight_bytes
    usable = sum(
        (problem.profiles[c.gpu].usable_bytes - problem.profiles[c.gpu].reserve_bytes) * c.available
        for c in atlas.classes
    )
    if usable < weights:
        reasons.append(
            f"{model.name} needs {weights / GIB:.1f} GiB for weights alone; "
            f"this fleet has {usable / GIB:.1f} GiB usable"
        )
        return tuple(reasons)
    objective = problem.objective
    reasons.append(
        f"{model.name} needs {weights / GIB:.1f} GiB for weights; {usable / GIB:.1f} GiB are usable on the fleet, "
        "but no replica of the family fits with KV room"
        + (" and meets the limits" if objective.ttft_limit_s or objective.tpot_limit_s else "")
    )
    if objective.tpot_limit_s is not None:
        reasons.append(f"mean TPOT limit {objective.tpot_limit_s * 1e3:.4g} ms: try a longer one, or --tpot none")
    if objective.ttft_limit_s is not None:
        reasons.append(f"p95 TTFT limit {objective.ttft_limit_s:.4g} s: try a longer one, or --ttft none")
    if objective.kind in (ObjectiveKind.COST, ObjectiveKind.GPUS):
        reasons.append(f"demand {objective.demand_rps:.4g} requests/s: the fleet may be too small for it")
    return tuple(reasons)
