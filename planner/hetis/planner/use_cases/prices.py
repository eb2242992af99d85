"""Prices: what the objective would gain without each constraint, and the GPUs that could be added to a fleet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hetis.formats import catalogue
from hetis.planner.use_cases.record.parts import ConstraintCosts
from hetis.profiler.defaults import default_profile
from hetis.solver.budget import SearchSettings
from hetis.solver.cluster import Cluster
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

if TYPE_CHECKING:
    from hetis.solver.placement.infeasible import Offer
    from hetis.solver.planning import ConstraintPrice


def with_constraint_prices(
    plan: Plan, problem: PlacementProblem, search: SearchSettings
) -> tuple[Plan, tuple[ConstraintPrice, ...]]:  # fmt: skip
    """Return the plan with the cost of every constraint, and these; none if the problem has no constraints."""
    if not problem.constraints:
        return plan, ()
    from hetis.solver.planning import price_constraints

    prices = price_constraints(problem, plan, search)
    rows = [
        {
            "constraints": [str(each) for each in price.constraints],
            "least": price.least,
            "most": price.most,
            "solved": price.is_solved,
        }
        for price in prices
    ]
    return ConstraintCosts(prices=tuple(rows)).on(plan), prices


def catalogue_market() -> Sequence[Offer]:
    """Return what could be added to any fleet: the catalogue's GPU types with a price, with their default profiles."""
    from hetis.solver.placement.infeasible import Offer

    offers = []
    for entry in catalogue.gpus():
        if entry.gpu.usd_per_hour is not None:
            try:
                _, profile = default_profile(entry.gpu)
            except InvalidProblemError:
                continue
            offers.append(Offer(gpu=entry.gpu, profile=profile))
    return offers


def price_of_plan(plan: Plan, cluster: Cluster) -> float | None:
    """Return the cost of the used GPUs in USD per hour, or None if one of them has no price."""
    used = set(plan.devices())
    return _price(cluster, lambda device: device in used)


def price_of_idle(plan: Plan, cluster: Cluster) -> float | None:
    """Return the cost of the GPUs that neither the plan nor other tenants hold, or None if one has no price."""
    held = {*plan.devices(), *plan.held_by_others()}
    return _price(cluster, lambda device: device not in held)


def _price(cluster: Cluster, is_counted: Callable[[str], bool]) -> float | None:
    total = 0.0
    for node, group in cluster.nodes():
        prices = [cluster.price_of(slots) for slots in group.gpus for _ in range(slots.count)]
        for index, price in zip(group.gpus_of_node(), prices, strict=True):
            if is_counted(f"{node}/{index}"):
                if price is None:
                    return None
                total += price
    return total
