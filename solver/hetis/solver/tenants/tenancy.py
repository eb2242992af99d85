"""The tenants that share a fleet, each with its own placement problem on the same cluster; and the fleet's division."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from hetis.solver.cluster import Cluster
from hetis.solver.errors import InvalidProblemError
from hetis.solver.plan import Plan, Status
from hetis.solver.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One model and its traffic on the shared fleet.

    ``problem`` maximises goodput or throughput on the whole cluster. ``weight`` is the number of parts of the fleet to
    which the tenant has a claim. ``worth`` is the value of a request/s; None: 1 over the rate that the tenant reaches
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
        """Return the part of the fleet to which each tenant has a claim; the parts sum to 1."""
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


# --- the answer: a plan per tenant, the rate of each tenant, and the proof


class TenantRule(StrEnum):
    """The objective of a placement for several tenants, and the rates that it guarantees them."""

    EFFICIENCY = "efficiency"  # the highest total value, for any distribution of it
    EQUAL_THROUGHPUT = "equal-throughput"  # the same normalised rate per part for every tenant, as high as possible
    MAX_MIN = "max-min"  # the least normalised rate per part as high as possible, then the highest total value
    SHARING_INCENTIVE = "sharing-incentive"  # no tenant below its part of the fleet, then the highest total value

    @property
    def has_level(self) -> bool:
        """Return whether the rule first raises the least normalised rate."""
        return self in (TenantRule.EQUAL_THROUGHPUT, TenantRule.MAX_MIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPrice:
    """A row of the shared inventory and its price in units of value.

    ``limit`` is the maximum number of GPUs of a class in TP groups of at least ``tp_at_least``; 1 counts all GPUs.
    """

    gpu: str
    gpus_per_node: int
    tp_at_least: int
    limit: int
    price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceProof:
    """Prices that bound every placement of the tenants' families.

    With ``multipliers`` a_i >= 0 such that no replica of tenant i serves more than (price of its GPUs) / a_i of
    normalised rate u_i, any placement has ``sum a_i u_i <= sum price limit``. So with ``u_i >= floors_i`` and gains
    ``g_i <= a_i``

        sum g_i u_i  <=  sum price limit - sum (a_i - g_i) floors_i

    and, if ``sum a_i weight_i = 1``, the least ``u_i / weight_i`` is at most ``sum price limit``.
    """

    rows: tuple[RowPrice, ...]
    multipliers: tuple[float, ...]
    floors: tuple[float, ...]
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantShare:
    """The share of one tenant. Rates are in requests/s of its own objective (goodput, or saturated).

    Attributes:
        plan: its replicas on named GPUs; None if it has none.
        placed: the rate that these replicas serve.
        rate: the rate granted to it, which is less than ``placed`` only under the rule of equal throughput.
        alone, alone_bound: the rate that it would reach alone on the whole fleet, and a bound on that rate.
        part, part_bound: the same for its part of every device class.
    """

    name: str
    weight: float
    worth: float
    plan: Plan | None
    placed: float
    rate: float
    alone: float
    alone_bound: float
    part: float
    part_bound: float

    @property
    def normalised(self) -> float:
        """Return the rate over the rate that it would have alone on the whole fleet."""
        return self.rate / self.alone

    @property
    def value(self) -> float:
        return self.worth * self.rate

    @property
    def over_part(self) -> float:
        """Return the rate over that of its part of the fleet; from 1 on, sharing does not make the tenant worse off."""
        return self.rate / self.part if self.part > 0.0 else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetShares:
    """A divided fleet. ``value`` is the sum over tenants of worth times rate; ``gap`` is (bound - value) / value.

    ``level`` is the least normalised rate per part of weight; rules that first raise it prove it by ``level_proof``
    (None: by enumeration of all sub-fleets). ``bound`` then holds for placements that reach this level.
    """

    rule: TenantRule
    status: Status
    shares: tuple[TenantShare, ...]
    value: float
    bound: float
    level: float
    level_bound: float | None
    proof: PriceProof | None
    level_proof: PriceProof | None
    solve_s: float

    @property
    def gap(self) -> float:
        return abs(self.bound - self.value) / self.value if self.value else float("inf")

    @property
    def level_gap(self) -> float:
        """Return the gap of the level; 0 if the rule has no level."""
        if self.level_bound is None:
            return 0.0
        return abs(self.level_bound - self.level) / self.level if self.level else float("inf")
