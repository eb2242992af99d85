"""How many bytes of weights the GPUs of a replica load, by the cost model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hetis.planner.use_cases.sources import PlanAndProblem
from hetis.solver.plan import ReplicaPlan


def load_bytes_of(found: PlanAndProblem) -> Callable[[ReplicaPlan], int]:
    """Return the bytes that the replicas of this plan load; equal shapes are worked out once."""
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
    """Return what decides about weights: layers and GPU types, whatever the GPUs are called."""
    return tuple((s.gpu, s.tp, s.copies, s.first_layer, s.num_layers) for s in replica.stages)
