"""The division of a fleet: a plan per tenant, the rate of each tenant, and the proof."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hetis.solver.plan import Plan, Status


class TenantRule(StrEnum):
    """The objective of a placement for several tenants, and the rates that it guarantees them."""

    EFFICIENCY = "efficiency"  # the highest total value, for any distribution of it
    EQUAL_THROUGHPUT = "equal-throughput"  # the same normalised rate per part for every tenant, as high as possible
    MAX_MIN = "max-min"  # the least normalised rate per part as high as possible, then the highest total value
    SHARING_INCENTIVE = "sharing-incentive"  # no tenant below its part of the fleet, then the highest total value

    @property
    def has_level(self) -> bool:
        """Return whether it raises the least normalised rate first."""
        return self in (TenantRule.EQUAL_THROUGHPUT, TenantRule.MAX_MIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPrice:
    """A row of the shared inventory and its price in units of value.

    ``limit`` is the greatest number of GPUs of a class in TP groups of at least ``tp_at_least``: 1 counts all GPUs.
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
        plan: its replicas on named GPUs; None: it has none.
        placed: the rate that they serve.
        rate: the rate that is granted to it: less than ``placed`` only under the rule of equal throughput.
        alone, alone_bound: the rate that it would reach alone on the whole fleet, and the rate that no plan exceeds.
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
        """Return the rate over that of its part of the fleet; if at least 1, sharing does not make it worse off."""
        return self.rate / self.part if self.part > 0.0 else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvyCell:
    """A tenant's rate with as many GPUs of every class as another has, and the rate that no plan there exceeds."""

    rate: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetShares:
    """The answer. ``value`` is the sum over tenants of worth times rate; ``gap`` is (bound - value) / value.

    ``level`` is the least normalised rate per part of weight; rules that raise it first prove it by ``level_proof``
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
