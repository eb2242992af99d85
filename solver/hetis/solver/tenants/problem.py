"""The tenants that share a fleet, each with a placement problem of its own on the same cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hetis.solver.cluster import Cluster
from hetis.solver.errors import InvalidProblemError
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One model and its traffic on the shared fleet.

    ``problem`` maximises goodput or throughput on the whole cluster. ``weight`` is the number of parts of the fleet
    that the tenant has a claim to. ``worth`` is the worth of a request/s; None: 1 over the rate that the tenant reaches
    alone, so that the whole fleet is worth 1 to every tenant.
    """

    name: str
    problem: PlacementProblem
    weight: float = 1.0
    worth: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenancy:
    """A fleet and its tenants.

    Raises:
        InvalidProblemError: the tenants cannot share one fleet, with every reason.
    """

    tenants: tuple[Tenant, ...]

    def __post_init__(self) -> None:
        problems = list(_problems(self.tenants))
        if problems:
            raise InvalidProblemError("; ".join(problems))

    @property
    def cluster(self) -> Cluster:
        return self.tenants[0].problem.cluster

    @property
    def claims(self) -> tuple[float, ...]:
        """Return the part of the fleet that each tenant has a claim to; the parts sum to 1."""
        total = sum(tenant.weight for tenant in self.tenants)
        return tuple(tenant.weight / total for tenant in self.tenants)


def _problems(tenants: tuple[Tenant, ...]) -> Iterator[str]:
    if not tenants:
        yield "nobody shares the fleet: give at least one tenant"
        return
    first = tenants[0].problem
    seen: set[str] = set()
    zones = first.cluster.zones()
    if len(zones) > 1:
        yield f"cluster {first.cluster.name} has {len(zones)} zones: tenants share a fleet of one zone"
    for tenant in tenants:
        problem = tenant.problem
        if tenant.name in seen:
            yield f"tenant {tenant.name} appears twice"
        seen.add(tenant.name)
        if not tenant.weight > 0.0:
            yield f"tenant {tenant.name}: weight is {tenant.weight}, must be > 0"
        if tenant.worth is not None and not tenant.worth > 0.0:
            yield f"tenant {tenant.name}: worth is {tenant.worth}, must be > 0"
        if not problem.objective.maximises:
            kind = problem.objective.kind
            yield f"tenant {tenant.name}: objective is {kind}, must be goodput or throughput to be shared"
        if problem.cluster != first.cluster:
            yield f"tenant {tenant.name}: cluster is not that of {tenants[0].name}"
        if problem.family.tp_sizes != first.family.tp_sizes:
            yield f"tenant {tenant.name}: TP sizes are not those of {tenants[0].name}"
        if problem.family.one_type_per_role or not (problem.family.mixed_types and problem.family.uneven_layers):
            yield f"tenant {tenant.name}: a fleet is shared in families hetis, hexgen or hexgen2"
