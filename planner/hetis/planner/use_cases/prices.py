"""Prices of plans and of idle GPUs, and the GPUs that could be added to a fleet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hetis.formats import catalogue
from hetis.profiler.defaults import default_profile
from hetis.solver.cluster import Cluster
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Plan

if TYPE_CHECKING:
    from hetis.solver.placement.infeasible import Offer


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
