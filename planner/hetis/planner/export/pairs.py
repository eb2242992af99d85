"""Pairs of one prefill and one decode replica, for targets that only support pairs."""

from __future__ import annotations

from hetis.planner.export.replicas import Launchable
from hetis.solver.plan import Role


def paired(launchable: Launchable, target: str) -> tuple[Launchable, dict[int, int], dict[int, tuple[str, ...]]]:
    """Pair replicas along the plan's routes, those with most traffic first, and leave out replicas without a partner.

    Returns:
        The remaining replicas, the decode replica of every prefill replica, and why the others are left out.

    Raises:
        NotExportableError: nothing is left.
    """
    pairs, taken = dict[int, int](), set[int]()
    there = launchable.replicas.keys()
    for route in sorted(launchable.plan.kv_routes, key=lambda one: (-one.rate, one.prefill, one.decode)):
        if {route.prefill, route.decode} <= there and not {route.prefill, route.decode} & taken:
            pairs[route.prefill] = route.decode
            taken |= {route.prefill, route.decode}
    left_out: dict[int, tuple[str, ...]] = {
        number: (f"{target} knows pairs of a prefill and a decode replica, and no partner is left for this one",)
        for number, one in launchable.replicas.items()
        if one.plan.role is not Role.UNIFIED and number not in taken
    }
    return launchable.without(left_out), pairs, left_out
