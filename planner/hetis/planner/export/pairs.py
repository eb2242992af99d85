"""Pairs of prefill and decode replicas that a router may make although the plan rules them out.

A plan's routes say which replicas exchange KV. Some routers choose the two replicas of a request separately. That is
harmless where the KV of every pair takes the same links. If nodes have explicit links, replicas were planned for those
to their partners, in sets of nodes; a prefill replica sends to other zones only if the plan says so; and engines of
different precisions or connectors cannot read each other's KV, nor can those of different vendors unless both have
the same attention backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product

from hetis.formats.documents import from_data
from hetis.formats.errors import DocumentError
from hetis.planner.export.pair_routers import pair_groups
from hetis.planner.export.replicas import Launchable, LaunchableReplica
from hetis.planner.use_cases.record.parts import MadeFrom
from hetis.solver.check.replica_shapes import Fleet, slowest
from hetis.solver.cluster import Cluster, Link
from hetis.solver.plan import Plan, Role

_MOST_NAMED = 5  # pairs, or groups of replicas, in a sentence

Pair = tuple[int, int]  # positions of a prefill and a decode replica in the plan


def pairs_beyond_the_plan(launchable: Launchable, router: str, *, in_groups: bool = False) -> Iterator[str]:
    """Yield a sentence for each kind of pairs that ``router``, which chooses replicas separately, makes unplanned.

    ``in_groups``: there is a router for each of `pair_groups`.
    """
    routed = {(route.prefill, route.decode) for route in launchable.plan.kv_routes}
    of_role = {role: [n for n, one in launchable.replicas.items() if one.plan.role is role] for role in Role}
    sides: list[tuple[Iterable[int], Iterable[int]]] = [(of_role[Role.PREFILL], of_role[Role.DECODE])]
    if in_groups:
        sides = [(group.prefill, group.decode) for group in pair_groups(launchable)]
    others = [pair for side in sides for pair in product(*side) if pair not in routed]
    unlike = [pair for pair in others if _are_unlike(launchable, pair)]
    cluster = cluster_of(launchable.plan)
    fleet = None if cluster is None else Fleet.of(cluster)
    apart = [] if fleet is None else [pair for pair in others if _are_apart(launchable.plan, fleet, pair)]
    slow = [pair for pair in apart if pair not in unlike]
    for found, which in ((unlike, "cannot exchange KV"), (slow, "exchange KV over slower links than planned")):
        if found:
            yield (
                f"pairs of prefill and decode: {router} chooses both separately, also {_named(launchable, found)}, "
                f"which {which}{_advice(launchable)}"
            )


def _are_unlike(launchable: Launchable, pair: Pair) -> bool:
    """Return whether engines cannot exchange KV, since their GPUs have other vendors or precisions, or one writes KV
    (`NixlPushConnector`) and the other reads it, which replicas that the plan's routes join have in common.
    """

    def kind(one: LaunchableReplica) -> tuple[object, ...]:
        return launchable.model.on(one.plan.stages[0].gpu), one.layout.pushes_kv

    prefill, decode = (launchable.replicas[number] for number in pair)
    backends = {one.layout.attention_backend for one in (prefill, decode)}
    have_one = len(backends) == 1 and backends != {""}
    return kind(prefill) != kind(decode) or (prefill.layout.vendor != decode.layout.vendor and not have_one)


def _are_apart(plan: Plan, fleet: Fleet, pair: Pair) -> bool:
    """Return whether the KV of a pair goes to a zone, or over a link, for which one of the two was not planned."""
    prefill, decode = (plan.replicas[number] for number in pair)
    if not {*prefill.devices(), *decode.devices()} <= fleet.devices.keys():
        return False
    if prefill.kv_zones and not set(fleet.zones_of(decode.devices())) <= set(prefill.kv_zones):
        return True
    between = slowest([link for number in pair for link in fleet.nic_links(plan.replicas[number].devices())])
    between = slowest([between, *fleet.node_links(prefill.devices(), decode.devices())])
    planned = (_planned_link(plan, fleet, number) for number in pair)
    return any(one is not None and one.slower_of(between) != one for one in planned)


def _planned_link(plan: Plan, fleet: Fleet, number: int) -> Link | None:
    """Return the slowest link between a replica and those to which its routes lead; None: it has no route."""
    ends = [(route.prefill, route.decode) for route in plan.kv_routes if number in (route.prefill, route.decode)]
    own = plan.replicas[number].devices()
    partners = [name for end in ends for other in end if other != number for name in plan.replicas[other].devices()]
    if not partners or not set(partners) <= fleet.devices.keys():
        return None
    return slowest([*fleet.nic_links([*own, *partners]), *fleet.node_links(own, partners)])


def cluster_of(plan: Plan) -> Cluster | None:
    """Return the cluster in a plan's inputs; None if they have none that can be read."""
    try:
        cluster = from_data(MadeFrom.of(plan).document("cluster"), name="cluster")
    except DocumentError:
        return None
    return cluster if isinstance(cluster, Cluster) else None


def _named(launchable: Launchable, pairs: Sequence[Pair]) -> str:
    names = [" → ".join(launchable.replicas[number].name for number in pair) for pair in pairs[:_MOST_NAMED]]
    rest = f" and {len(pairs) - _MOST_NAMED:,} more" if len(pairs) > _MOST_NAMED else ""
    return f"{', '.join(names)}{rest}"


def _advice(launchable: Launchable) -> str:
    """Return how to keep to the plan, if its routes join replicas to several groups."""
    names = {number: one.name for number, one in launchable.replicas.items()}
    groups = [[names[n] for n in group if n in names] for group in launchable.plan.joined_by_routes()]
    names_of_groups = ["+".join(group) for group in groups if group]
    if len(names_of_groups) < 2:
        return ""
    which = (
        ", ".join(names_of_groups)
        if len(names_of_groups) <= _MOST_NAMED
        else f"the {len(names_of_groups)} groups that its routes join"
    )
    return f": a router of its own for each of {which} keeps to the plan"
