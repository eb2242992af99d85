"""The constraints of a problem, checked on a plan device by device, independently of the search."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from hetis.solver.check.replica_shapes import Fleet, is_in
from hetis.solver.check.violation import Rule, Violation
from hetis.solver.constraints import (
    AtMost,
    Duty,
    Exclude,
    Replicas,
    RestrictRole,
    Selection,
    Sum,
    Use,
    WithoutSharedExperts,
    WithoutTp,
    WithoutWorkers,
)
from hetis.solver.plan import Plan, ReplicaPlan, Role, StagePlan
from hetis.solver.problem import PlacementProblem

RELATIVE = 1e-6  # tolerance for the rounding of sums
# A table of its own, as the search may be wrong in its.
_DUTIES = {Role.UNIFIED: Duty.UNIFIED, Role.PREFILL: Duty.PREFILL, Role.DECODE: Duty.DECODE}


def check_constraints(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> list[Violation]:
    """Return every constraint that a plan breaks; devices that do not exist are reported elsewhere."""
    return [
        Violation(rule=Rule.CONSTRAINT, where=str(each), message=message)
        for each in problem.constraints
        for message in _broken(each, plan, fleet)
    ]


def _broken(constraint: object, plan: Plan, fleet: Fleet) -> Iterator[str]:
    replicas = tuple(enumerate(plan.replicas))
    match constraint:
        case Exclude(gpus=gpus):
            if used := _duties(gpus, plan.replicas, fleet):
                yield f"{_some(used)} used"
        case RestrictRole(gpus=gpus, barred=barred):
            duties_of = _duties(gpus, plan.replicas, fleet)
            for duty in sorted(barred):
                if having := [name for name, duties in duties_of.items() if duty in duties]:
                    yield f"{_some(having)} in the duty {duty}"
        case Use(gpus=gpus, least=least):
            if (count := len(_duties(gpus, _serving(plan), fleet))) < least:
                yield f"{count} of them are used, must be at least {least}"
        case WithoutTp(tp=tp):
            for number, replica in replicas:
                if any(stage.tp == tp for stage in replica.stages):
                    yield f"replica {number} has a stage of TP size {tp}"
                if replica.expert_parallel and any(stage.tp * stage.copies == tp for stage in replica.stages):
                    yield f"replica {number} has copies that share their experts on {tp} GPUs"
        case WithoutWorkers():
            yield from (f"replica {i} has attention workers" for i, one in replicas if one.attention_workers)
        case WithoutSharedExperts():
            yield from (
                f"replica {i} has copies that share their experts" for i, one in replicas if one.expert_parallel
            )
        case AtMost(of=of, most=most):
            names = fleet.devices.keys() & plan.devices()
            total = float(len(names)) if of is Sum.GPUS else sum(map(fleet.usd_per_hour, names))
            if total > most * (1 + RELATIVE):
                yield f"the plan takes {total:.9g}, must be at most {most:.9g}"
        case Replicas() if not constraint.allows(len(plan.replicas)):
            yield f"the plan has {len(plan.replicas)} replicas"
        case Replicas() if not constraint.allows(count := len(_serving(plan))):
            yield f"{count} of the plan's {len(plan.replicas)} replicas serve: KV leaves or reaches no other"


def _serving(plan: Plan) -> list[ReplicaPlan]:
    """Return the replicas that serve requests: unified ones, and those that KV leaves or reaches."""
    ends = {end for route in plan.kv_routes for end in (route.prefill, route.decode)}
    return [replica for i, replica in enumerate(plan.replicas) if i in ends or replica.role is Role.UNIFIED]


def _duties(gpus: Selection, replicas: Iterable[ReplicaPlan], fleet: Fleet) -> dict[str, set[Duty]]:
    """Return the duties of every selected device of these replicas, ordered by name."""
    found = defaultdict[str, set[Duty]](set)
    for replica in replicas:
        for part in replica.parts():
            duty = Duty.PRIMARY if isinstance(part, StagePlan) else Duty.WORKER
            for name in part.devices:
                if name in fleet.devices and is_in(gpus, fleet.devices[name]):
                    found[name] |= {duty, _DUTIES[replica.role]}
    return dict(sorted(found.items()))


def _some(devices: Iterable[str]) -> str:
    names = list(devices)
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
