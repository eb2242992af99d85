"""The plan checker, which trusts neither what a plan states nor what the search computed.

`check_plan` looks up every device, derives every number again from ``docs/cost-model.md`` and the problem with code of
its own, and compares. It shares no code with the search. Its time grows with the number of devices; replicas of equal
shape are derived once.

Two things must be taken on trust, because only a search can prove them: the bound (it must lie on the far side of the
value, and gap and status must follow from both) and the prices (the rows of their table are counted, and no price may
be negative).

A replica for some classes of requests is derived from the requests of these alone, with their limits.
"""

from __future__ import annotations

from hetis.solver.check.constraint_rules import check_constraints
from hetis.solver.check.rederive import Rederivation, check_replica_claims
from hetis.solver.check.replica_shapes import Fleet, kv_partners, replica_shape
from hetis.solver.check.result import check_class_table, check_classes, check_link_capacity, check_result, check_routes
from hetis.solver.check.structure import check_devices_once, check_replica_structure, check_types_of_roles
from hetis.solver.check.violation import Rule, Violation
from hetis.solver.check.waiting import check_waits
from hetis.solver.plan import Plan
from hetis.solver.problem import PlacementProblem

__all__ = ["Rule", "Violation", "check_plan"]


def check_plan(plan: Plan, problem: PlacementProblem) -> tuple[Violation, ...]:
    """Return all violations in the plan; empty if it is sound.

    A replica with a broken structure (an unknown device, missing layers) is reported only for that: its numbers would
    be meaningless, so they are not derived.
    """
    problem = problem.at(plan.result.utilisation, plan.lanes())
    whole = Fleet.of(problem.cluster)
    fleet = whole.without_left_out(problem.constraints)
    rederivation = Rederivation(problem)
    violations = check_devices_once(plan) + check_classes(plan, problem)
    violations += check_constraints(plan, problem, whole)
    partners = kv_partners(plan, fleet)
    for number, replica in enumerate(plan.replicas):
        where = f"replica {number}"
        broken = check_replica_structure(replica, where, problem, fleet)
        violations += broken
        if not broken and replica.classes in problem.ranges():
            shape = replica_shape(replica, problem, fleet, partners.get(number, ()))
            derived, limits = (
                rederivation.serving(replica.classes).of(shape),
                problem.of_classes(replica.classes).objective,
            )
            violations += check_replica_claims(replica, where, limits, derived, may_claim_less=fleet.has_uneven_links)
    violations += check_types_of_roles(plan, problem)
    violations += check_routes(plan, problem, fleet)
    violations += check_link_capacity(plan, problem, fleet)
    violations += check_result(plan, problem, fleet)
    violations += check_class_table(plan, whole)
    if not violations:
        violations += check_waits(plan, problem)
    return tuple(violations)
