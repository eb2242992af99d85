"""Conversion of flows between zones into routes between replicas."""

from __future__ import annotations

from collections.abc import Sequence

from hetis.solver.placement.routes import FloatArray
from hetis.solver.placement.tables import CostTables
from hetis.solver.placement.template import Template
from hetis.solver.plan import KvRoute, Role

DUST = 1e-12  # share of a flow that may remain from rounding


def kv_routes(costs: CostTables, templates: Sequence[Template], flows: FloatArray) -> tuple[KvRoute, ...]:
    """Split ``flows`` [Z, Z] over the replicas of their zones so that none sends or receives more than its rate.

    ``templates`` are the plan's replicas in order. Flows between zones come first and use replicas that may send to
    all zones; the remaining capacity of these joins that of replicas that send to their own zone only. Replicas are
    filled in turn, which gives few routes: fewer than there are replicas, for every pair of zones.
    """
    left = [template.rate for template in templates]
    on_side: dict[int, list[int]] = {}
    for i, template in enumerate(templates):
        on_side.setdefault(costs.side_of(template.scope, template.mix), []).append(i)
    rates: dict[tuple[int, int], float] = {}
    zones = range(len(costs.routes.zones))
    for z, y in sorted(((z, y) for z in zones for y in zones), key=lambda pair: pair[0] == pair[1]):
        senders = on_side.get(costs.routes.side(Role.PREFILL, z, sends_afar=True), [])
        if z == y:
            senders = on_side.get(costs.routes.side(Role.PREFILL, z), []) + senders
        receivers = on_side.get(costs.routes.side(Role.DECODE, y), [])
        flow, dust = float(flows[z, y]), DUST * float(flows[z, y])
        send, receive = iter(senders), iter(receivers)
        i, j = next(send, -1), next(receive, -1)
        while flow > dust and i >= 0 and j >= 0:
            rate = min(flow, left[i], left[j])
            if rate > dust:
                rates[i, j] = rates.get((i, j), 0.0) + rate
            flow, left[i], left[j] = flow - rate, left[i] - rate, left[j] - rate
            i = next(send, -1) if left[i] <= dust else i
            j = next(receive, -1) if left[j] <= dust else j
    return tuple(KvRoute(prefill=i, decode=j, rate=rate) for (i, j), rate in sorted(rates.items()))
