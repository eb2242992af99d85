"""What limits the traffic between prefill and decode replicas: one of the sides, or the links between zones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from hetis.solver.cluster import node_of
from hetis.solver.placement.wording import in_bytes
from hetis.solver.plan import Plan, Role
from hetis.solver.problem import PlacementProblem

USED_UP = 1 - 1e-4  # share of a side's rate from which the side counts as limiting its traffic
MAX_LINKS = 5  # maximum number of links described, the fullest first


def route_sentences(plan: Plan, problem: PlacementProblem) -> Iterator[str]:
    """Yield sentences on the sides, and on every link between zones that KV crosses."""
    if all(replica.role is Role.UNIFIED for replica in plan.replicas):
        return
    yield _sides(plan)
    yield from link_sentences(plan, problem)


def link_sentences(plan: Plan, problem: PlacementProblem) -> Iterator[str]:
    """Yield how much of the links between zones KV uses, the fullest first; nothing if all KV stays in its zone."""
    loads = _loads(plan, problem)
    links = sorted(loads, key=lambda pair: -loads[pair] / problem.cluster.network.zone_link(*pair).bytes_per_s)
    kv_bytes = _prompt_bytes(problem)
    for here, there in links[:MAX_LINKS]:
        bytes_per_s, limit = loads[here, there], problem.cluster.network.zone_link(here, there).bytes_per_s
        yield (
            f"From {here} to {there} go {bytes_per_s / kv_bytes:.3g} prompts/s of {in_bytes(kv_bytes)} of KV each, "
            f"{bytes_per_s / limit:.0%} of what the link carries ({limit / 1e9:.3g} GB/s)."
        )
    if len(links) > MAX_LINKS:
        yield f"{len(links) - MAX_LINKS} more links between zones carry less."


def _sides(plan: Plan) -> str:
    """Return the rates of both sides, and which of them the traffic exhausts."""
    rates = {role: sum(one.rate for one in plan.replicas if one.role is role) for role in (Role.PREFILL, Role.DECODE)}
    flow = sum(route.rate for route in plan.kv_routes)
    full = [role for role, rate in rates.items() if flow >= rate * USED_UP]
    match full:
        case [one]:
            other = Role.DECODE if one is Role.PREFILL else Role.PREFILL
            why = f"the {one} side limits, {1 - flow / rates[other]:.1%} of the {other} side is unused"
        case []:
            why = "neither side is fully used: the permitted pairs or the links between zones limit"
        case _:
            why = "both sides are fully used"
    return (
        f"Prefill replicas give {rates[Role.PREFILL]:.4g} requests/s, decode replicas "
        f"{rates[Role.DECODE]:.4g}, and {flow:.4g} go from one to the other: {why}."
    )


def _loads(plan: Plan, problem: PlacementProblem) -> dict[tuple[str, str], float]:
    """Return bytes/s of KV by pair of zones, without routes inside a zone."""
    zone_of_node = {node: group.zone for node, group in problem.cluster.nodes()}
    ends = {number for route in plan.kv_routes for number in (route.prefill, route.decode)}
    zones = {number: zone_of_node[node_of(plan.replicas[number].stages[0].devices[0])] for number in ends}
    loads: defaultdict[tuple[str, str], float] = defaultdict(float)
    for route in plan.kv_routes:
        here, there = zones[route.prefill], zones[route.decode]
        if here != there:
            loads[here, there] += route.rate * _prompt_bytes(problem)
    return dict(loads)


def _prompt_bytes(problem: PlacementProblem) -> float:
    """Return the KV bytes of a mean prompt."""
    return problem.model.prompt_kv_bytes(problem.moments().mean_prompt)
