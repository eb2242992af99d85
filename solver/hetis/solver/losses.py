"""The rate that a plan still serves after the loss of a node or a zone.

A replica is lost with any of its GPUs, including attention workers. The remaining prefill and decode replicas serve
what can flow between them: inside zones up to the rates of both sides, between zones no more than the plan's routes
carried. The true rate is therefore no less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hetis.solver.cluster import Cluster, node_of
from hetis.solver.plan import Plan, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The worst loss of one place of a kind: its name, and the saturated requests/s after and before the loss."""

    name: str
    rate: float
    whole: float

    @property
    def share(self) -> float:
        """Return the rate after the loss as a share of the rate before it."""
        return self.rate / self.whole


@dataclass(slots=True)
class _Rates:
    """Saturated requests/s: of unified replicas, and by zone of local prefill, prefill for all zones, and decode."""

    unified: float
    local: dict[str, float]
    afar: dict[str, float]
    decode: dict[str, float]

    def served(self, routes: Mapping[tuple[str, str], float]) -> float:
        """Return the rate that the replicas serve together, with flows between zones limited to ``routes``."""
        return self.unified + max(self._flow(routes, afar_first=first) for first in (True, False))

    def _flow(self, routes: Mapping[tuple[str, str], float], *, afar_first: bool) -> float:
        local, afar, decode, total = dict(self.local), dict(self.afar), dict(self.decode), 0.0

        def inside() -> float:
            flows = 0.0
            for zone, rate in decode.items():
                own = min(local.get(zone, 0.0), rate)
                other = min(afar.get(zone, 0.0), rate - own)
                decode[zone] = rate - own - other
                afar[zone] = afar.get(zone, 0.0) - other
                flows += own + other
            return flows

        if not afar_first:
            total += inside()
        for (here, there), most in routes.items():
            flow = max(0.0, min(afar.get(here, 0.0), decode.get(there, 0.0), most))
            afar[here], decode[there] = afar.get(here, 0.0) - flow, decode.get(there, 0.0) - flow
            total += flow
        return total + inside() if afar_first else total


def worst_node(plan: Plan, cluster: Cluster) -> Loss | None:
    """Return the loss of the node whose loss costs most, or None if the plan serves nothing."""
    return _worst(plan, cluster, lambda node, zone: node)


def worst_zone(plan: Plan, cluster: Cluster) -> Loss | None:
    """Return the loss of the zone whose loss costs most, or None if the fleet has one zone or nothing is served."""
    return _worst(plan, cluster, lambda node, zone: zone) if len(cluster.zones()) > 1 else None


def _worst(plan: Plan, cluster: Cluster, place_of: Callable[[str, str], str]) -> Loss | None:
    zones = {group.node_name(i): group.zone for group in cluster.node_groups for i in range(group.count)}
    on = defaultdict[str, list[int]](list)
    home = list[str]()
    for number, replica in enumerate(plan.replicas):
        nodes = dict.fromkeys(node_of(name) for name in replica.devices())
        home.append(zones[next(iter(nodes))])
        for place in dict.fromkeys(place_of(node, zones[node]) for node in nodes):
            on[place].append(number)
    routes = defaultdict[tuple[str, str], float](float)
    for route in plan.kv_routes:
        if home[route.prefill] != home[route.decode]:
            routes[home[route.prefill], home[route.decode]] += route.rate
    everything = _rates(plan, home, range(len(plan.replicas)))
    whole = everything.served(routes)
    if not whole > 0.0:
        return None
    found = {place: _without(everything, plan, home, lost).served(routes) for place, lost in on.items()}
    name = min(found, key=lambda place: found[place])
    return Loss(name=name, rate=found[name], whole=whole)


def _rates(plan: Plan, home: list[str], which: Iterable[int]) -> _Rates:
    rates = _Rates(0.0, {}, {}, {})
    for number in which:
        replica, zone = plan.replicas[number], home[number]
        if replica.role is Role.UNIFIED:
            rates.unified += replica.rate
            continue
        sends_afar = any(there != zone for there in replica.kv_zones)
        side = rates.decode if replica.role is Role.DECODE else rates.afar if sends_afar else rates.local
        side[zone] = side.get(zone, 0.0) + replica.rate
    return rates


def _without(whole: _Rates, plan: Plan, home: list[str], lost: list[int]) -> _Rates:
    gone = _rates(plan, home, lost)

    def rest(all_of: Mapping[str, float], less: Mapping[str, float]) -> dict[str, float]:
        return {zone: max(0.0, rate - less.get(zone, 0.0)) for zone, rate in all_of.items()}

    return _Rates(
        max(0.0, whole.unified - gone.unified),
        rest(whole.local, gone.local),
        rest(whole.afar, gone.afar),
        rest(whole.decode, gone.decode),
    )
