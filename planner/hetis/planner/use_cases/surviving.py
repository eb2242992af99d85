"""The rate left after the loss of a node or a zone, and plans that are large enough to survive one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from hetis.solver.errors import InvalidProblemError, NoPlanFoundError
from hetis.solver.losses import Loss, worst_node, worst_zone
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

LOSSES = "losses"  # entry of `Plan.inputs`: by ``node`` and ``zone``, the `Loss` of the worst one
MOST_TRIES = 6  # demands that are tried
ENOUGH = 1.0 - 1e-9


def with_losses(plan: Plan, problem: PlacementProblem) -> Plan:
    """Return the plan with its worst loss of any one node, and of any one zone."""
    found = {"node": worst_node(plan, problem.cluster), "zone": worst_zone(plan, problem.cluster)}
    rows = {kind: asdict(loss) for kind, loss in found.items() if loss is not None}
    return replace(plan, inputs={**plan.inputs, LOSSES: rows}) if rows else plan


def losses_of(plan: Plan) -> dict[str, Loss]:
    """Return a plan's losses by kind of place; none if they are in another version's form."""
    rows = plan.inputs.get(LOSSES)
    try:
        return {str(kind): Loss(**row) for kind, row in rows.items()} if isinstance(rows, Mapping) else {}
    except TypeError:
        return {}


def surviving_plan(
    solve: Callable[[PlacementProblem], Plan], problem: PlacementProblem
) -> tuple[Plan, PlacementProblem]:
    """Return a plan that serves the demand even if any one node is lost, and the problem that it solves.

    That problem has a larger demand.

    The demand grows by the worst loss until enough is left. So the plan is the best for some demand, not among all that
    survive; no surviving plan costs less than the best plan for the original demand.

    Raises:
        InvalidProblemError: the objective has no demand to keep.
        NoPlanFoundError: the demand was still not kept after some tries.
        InfeasibleError: a larger demand has no plan.
    """
    demand = problem.objective.demand_rps
    if problem.objective.maximises or demand is None:
        raise InvalidProblemError("what survives is a demand: --survive goes with --objective cost or gpus and --rate")
    utilisation, asked, alone = problem.assumptions.planned_utilisation, demand, None
    for _ in range(MOST_TRIES):
        posed = replace(problem, objective=replace(problem.objective, demand_rps=asked))
        plan = solve(posed)
        alone = plan if alone is None else alone
        left = worst_node(plan, problem.cluster)
        rate, whole = (0.0, asked) if left is None else (utilisation * left.rate, utilisation * left.whole)
        if rate >= demand * ENOUGH:
            return replace(plan, notes=(*plan.notes, _cost(plan, alone, asked, rate))), posed
        asked = max(asked, demand + whole - rate)
    raise NoPlanFoundError(
        f"no plan was found that serves {demand:.4g} requests/s without its worst node, nor proved that there is none; "
        f"the last for {asked:.4g} requests/s leaves {rate:.4g}"
    )


def _cost(plan: Plan, alone: Plan, asked: float, rate: float) -> str:
    demand, unit = alone.objective.demand_rps or 0.0, plan.objective.unit
    if plan is alone:
        return f"any one node may be lost at no cost: {rate:.4g} of {demand:.4g} requests/s are served then"
    more, least = plan.result.value / alone.result.value - 1.0, alone.result.bound
    return (
        f"sized for {asked:.4g} requests/s, so that {rate:.4g} are served when any one node is lost: {more:.1%} more "
        f"than {alone.result.value:.4g} {unit} of the plan for {demand:.4g} requests/s without that; no plan that "
        f"keeps it takes less than {least:.4g} {unit}"
    )
