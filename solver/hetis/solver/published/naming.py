"""GPUs by name for the stages of a replica whose group of GPUs is already chosen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from hetis.solver.placement.binding import BoundStage
from hetis.solver.placement.tables import Atlas
from hetis.solver.placement.template import Template
from hetis.solver.published.graph import FleetGraph


def named_stages(atlas: Atlas, graph: FleetGraph, group: Sequence[int], template: Template) -> list[BoundStage]:
    """TP groups inside nodes, the largest first, each into the fullest node that holds it.

    TP sizes are powers of two, so that this succeeds for every shape that the group's nodes admit.
    """
    free: dict[tuple[int, str], list[int]] = defaultdict(list)
    for gpu in sorted(group):
        free[graph.kind(gpu)].append(gpu)
    ranks = [atlas.ranks[stage.rank] for stage in template.stages]
    bound = [BoundStage() for _ in ranks]
    for i in sorted(range(len(ranks)), key=lambda i: (-ranks[i][1], i)):
        device_class, tp = ranks[i]
        places = [kind for kind, gpus in free.items() if kind[0] == device_class and len(gpus) >= tp]
        place = min(places, key=lambda kind: (len(free[kind]), kind[1]))
        bound[i].devices.extend(graph.names[gpu] for gpu in free[place][:tp])
        del free[place][:tp]
    return bound
