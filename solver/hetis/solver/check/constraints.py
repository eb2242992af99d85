"""The constraints of a problem, checked on a plan device by device, independently of the search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hetis.solver.check.fleet import Fleet, is_in
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
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem

RELATIVE = 1e-6  # tolerance for the rounding of sums


def check_constraints(plan: Plan, problem: PlacementProblem, fleet: Fleet) -> list[Violation]:
    """Return every constraint that a plan breaks; devices that do not exist are reported elsewhere."""
    return [
        Violation(rule=Rule.CONSTRAINT, where=str(each), message=message)
        for each in problem.constraints
        for message in _broken(each, plan, fleet)
    ]


def _broken(constraint: object, plan: Plan, fleet: Fleet) -> Iterator[str]:
    match constraint:
        case Exclude(gpus=gpus):
            used = sorted({name for name, _ in _duties(plan.replicas) if _is_of(gpus, name, fleet)})
            if used:
                yield f"{_some(used)} used"
        case RestrictRole(gpus=gpus, barred=barred):
            for duty in sorted(barred):
                having = sorted(
                    {name for name, duties in _duties(plan.replicas) if duty in duties and _is_of(gpus, name, fleet)}
                )
                if having:
                    yield f"{_some(having)} in the duty {duty}"
        case Use(gpus=gpus, least=least):
            count = len({name for name, _ in _duties(_serving(plan)) if _is_of(gpus, name, fleet)})
            if count < least:
                yield f"{count} of them are used, must be at least {least}"
        case WithoutTp(tp=tp):
            for number, replica in enumerate(plan.replicas):
                if any(stage.tp == tp for stage in replica.stages):
                    yield f"replica {number} has a stage of TP size {tp}"
                if replica.expert_parallel and any(stage.tp * stage.copies == tp for stage in replica.stages):
                    yield f"replica {number} has copies that share their experts on {tp} GPUs"
        case WithoutWorkers():
            for number, replica in enumerate(plan.replicas):
                if replica.attention_workers:
                    yield f"replica {number} has attention workers"
        case WithoutSharedExperts():
            for number, replica in enumerate(plan.replicas):
                if replica.expert_parallel:
                    yield f"replica {number} has copies that share their experts"
        case AtMost(of=of, most=most):
            names = {name for name, _ in _duties(plan.replicas)} & fleet.devices.keys()
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


def _duties(replicas: Iterable[ReplicaPlan]) -> Iterator[tuple[str, frozenset[Duty]]]:
    """Yield every device of these replicas with its duties."""
    for replica in replicas:
        for stage in replica.stages:
            for name in stage.devices:
                yield name, frozenset({Duty.PRIMARY, _of_role(replica)})
        for pool in replica.attention_workers:
            for name in pool.devices:
                yield name, frozenset({Duty.WORKER, _of_role(replica)})


def _of_role(replica: ReplicaPlan) -> Duty:
    return {Role.UNIFIED: Duty.UNIFIED, Role.PREFILL: Duty.PREFILL, Role.DECODE: Duty.DECODE}[replica.role]


def _is_of(gpus: Selection, name: str, fleet: Fleet) -> bool:
    device = fleet.devices.get(name)
    return device is not None and is_in(gpus, device)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
