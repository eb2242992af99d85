"""Plans whose engines may run more requests at once than decode when they are saturated."""

from __future__ import annotations

from dataclasses import replace

from hetis.simulator.simulate import batch_with_room
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, replica_shape
from hetis.solver.plan import Plan, Role
from hetis.solver.problem import PlacementProblem

MOST_SEATS = 1024  # of a micro-batch: more is beyond what engines are set to


def with_more_seats(plan: Plan, problem: PlacementProblem, factor: float) -> Plan:
    """Return the plan with engines that may run ``factor`` times the planned requests at once, as KV has room.

    Replicas that only prefill, or that have attention workers, are left as they are, and so are all if the engines'
    number of requests is given.
    """
    if problem.family.engine_settings.max_num_seqs is not None:
        return plan
    fleet, derivation, replicas = Fleet.of(problem.cluster), Rederivation(problem), list(plan.replicas)
    for number, one in enumerate(plan.replicas):
        if one.role is Role.PREFILL or one.attention_workers:
            continue
        most = int(max(one.micro_batch + 1, min(factor * one.micro_batch, MOST_SEATS)))
        shape = replace(replica_shape(one, problem, fleet), micro_batch=most)
        size = batch_with_room(shape, derivation.serving(one.classes))
        if size > one.micro_batch:
            replicas[number] = replace(one, max_num_seqs=size * one.in_flight)
    return replace(plan, replicas=tuple(replicas))
