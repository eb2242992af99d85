"""The bytes of weights that the GPUs of a replica load, by the cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hetis.planner.use_cases.sources import PlanAndProblem
from hetis.solver.plan import ReplicaPlan


def load_bytes_of(found: PlanAndProblem) -> Callable[[ReplicaPlan], int]:
    """Return a function for the bytes that a replica of this plan loads; equal shapes are computed once."""
    from hetis.solver.placement.explanation.replica_view import replica_views

    known: dict[tuple[object, ...], int] = {}

    def load_bytes(replica: ReplicaPlan) -> int:
        shape = _shape(replica)
        if shape not in known:
            views = replica_views(replace(found.plan, replicas=(replica,)), found.problem)
            known[shape] = sum(bar.num_devices * bar.weight_bytes for view in views for bar in view.memory())
        return known[shape]

    return load_bytes


def _shape(replica: ReplicaPlan) -> tuple[object, ...]:
    """Return what determines the weights: layers and GPU types, but not the names of GPUs."""
    return tuple((s.gpu, s.tp, s.copies, s.first_layer, s.num_layers) for s in replica.stages)
