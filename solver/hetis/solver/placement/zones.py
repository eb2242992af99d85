"""Large fleets over several zones: a search that treats them as one zone, then gives every zone its own columns.

If zones differ only in their numbers of nodes, the fleet with all nodes in one zone is a relaxation of the real one:
links inside a zone are at least as fast as links between zones, every replica of the real family is a replica there,
and what it takes is available there. So its bound holds, at the cost of one zone instead of all of them and their
combinations, and each of its replicas can be placed in any zone that has the GPUs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hetis.solver.cluster import Network
from hetis.solver.placement.classes import DeviceClass
from hetis.solver.placement.tables import CostTables, FloatArray
from hetis.solver.placement.template import Template, TemplateStage, interval_of
from hetis.solver.plan import Role
from hetis.solver.problem import PlacementProblem

MERGED = "all zones"


def merged_problem(problem: PlacementProblem) -> PlacementProblem | None:
    """Return the same fleet in one zone, or None if that is not a relaxation or there is just one zone."""
    cluster = problem.cluster
    zones, network = cluster.zones(), cluster.network
    inside = {network.zone_link(zone, zone) for zone in zones}
    if len(zones) < 2 or len(inside) != 1 or network.between_nodes:
        return None
    link = inside.pop()
    between = [network.zone_link(a, b) for i, a in enumerate(zones) for b in zones[i + 1 :]]
    if any(other.slower_of(link) != other for other in between):
        return None  # some zones have faster links to each other than inside themselves
    groups = tuple(
        replace(group, zone=MERGED, nic=group.nic if group.nic is not None else network.default)
        for group in cluster.node_groups
    )
    merged = replace(cluster, node_groups=groups, network=Network(default=link))
    return replace(problem, cluster=merged)


def _kind(c: DeviceClass) -> tuple[object, ...]:
    return c.gpu, c.gpus_per_node, c.nic, c.intra, c.usd_per_hour, c.constraints


def zone_templates(merged: CostTables, costs: CostTables, templates: list[Template]) -> list[Template]:
    """Return every template in every zone with its GPU classes; prefill replicas also as senders to all zones."""
    found = []
    mixes_like: dict[tuple[int, int, int], list[int]] = {}
    for x, mix in enumerate(costs.mixes):
        mixes_like.setdefault((mix.micro_batch, mix.chunk_tokens, mix.attention_dp), []).append(x)
    for scope, part in enumerate(costs.scopes):
        if len(part.zones) != 1:
            continue
        here = {_kind(c): g for g, c in enumerate(costs.classes) if c.zone == part.zones[0]}
        class_of = [here.get(_kind(c), -1) for c in merged.classes]
        for template in templates:
            stages = _stages_on(merged, class_of, costs, template)
            mix = merged.mixes[template.mix]
            alike = mixes_like[mix.micro_batch, mix.chunk_tokens, mix.attention_dp]
            for x in alike if stages and part.serves(mix) else ():
                moved = replace(template, scope=scope, mix=x, stages=stages)
                if mix.role is not Role.UNIFIED:  # KV to or from other zones takes longer
                    moved = replace(moved, interval_s=interval_of(costs, moved))
                    if moved.interval_s > part.tables.t_cap[x, moved.in_flight_index]:
                        continue
                found.append(moved)
    return found


def _stages_on(
    merged: CostTables, class_of: list[int], costs: CostTables, template: Template
) -> tuple[TemplateStage, ...]:  # fmt: skip
    """Return a template's stages on a zone's own classes, or none if the zone lacks a class."""
    stages = []
    for stage in template.stages:
        device_class, size = merged.ranks[stage.rank]
        rank = costs.rank_of(class_of[device_class], size, merged.rank_dp[stage.rank])
        pool_class = class_of[stage.pool_class] if stage.pool_class >= 0 else -1
        if rank is None or (stage.pool_class >= 0 and pool_class < 0):
            return ()
        stages.append(TemplateStage(rank, stage.copies, stage.layers, pool_class, stage.pool_cards, stage.pool_groups))
    return tuple(stages)


def row_prices_of(merged: CostTables, costs: CostTables, prices: FloatArray) -> FloatArray:
    """Return prices of the merged fleet's rows for the rows of the real fleet."""
    of_kind = {(_kind(merged.classes[g]), p): prices[i] for i, (g, p) in enumerate(merged.resources.rows)}
    return np.array([of_kind.get((_kind(costs.classes[g]), p), 0.0) for g, p in costs.resources.rows])


def rate_prices_of(merged: CostTables, costs: CostTables, prices: FloatArray) -> FloatArray:
    """Return rate prices of the merged fleet's sides for the sides of the real one, the same in every zone."""
    if not costs.routes.splits_roles:
        return prices
    local, _, receiving = merged.routes.parts(prices)
    return np.concatenate([prices[:1], np.repeat([local[0], local[0], receiving[0]], len(costs.routes.zones))])
