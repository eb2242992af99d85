"""How a fleet is shared: a plan per tenant, what everybody gets, and the proof."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hetis.solver.plan import Plan, Status


class TenantRule(StrEnum):
    """What a placement for several tenants is good for, and what it owes them."""

    EFFICIENCY = "efficiency"  # the most total value, whoever has it
    EQUAL_THROUGHPUT = "equal-throughput"  # the same normalised rate per part for everybody, as high as can be
    MAX_MIN = "max-min"  # the least normalised rate per part as high as can be, then the most total value
    SHARING_INCENTIVE = "sharing-incentive"  # nobody below its part of the fleet, then the most total value

    @property
    def has_level(self) -> bool:
        """Whether it raises the least normalised rate first."""
        return self in (TenantRule.EQUAL_THROUGHPUT, TenantRule.MAX_MIN)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPrice:
    """A row of the shared inventory and its price in units of value.

    GPUs of a class in TP groups of at least ``tp_at_least`` are ``limit`` at most: 1 counts all GPUs.
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

    and, where ``sum a_i weight_i = 1``, the least ``u_i / weight_i`` is at most ``sum price limit``.
    """

    rows: tuple[RowPrice, ...]
    multipliers: tuple[float, ...]
    floors: tuple[float, ...]
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantShare:
    """What one tenant gets. Rates are in requests/s of its own objective (goodput, or saturated).

    Attributes:
        plan: its replicas on named GPUs; None: it has none.
        placed: what they serve.
        rate: what it is granted of that: less only under the rule of equal throughput.
        alone, alone_bound: what it would reach with the whole fleet to itself, and no plan exceeds.
        part, part_bound: what it would reach with its part of every device class.
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
        """The rate over what it would be alone on the whole fleet."""
        return self.rate / self.alone

    @property
    def value(self) -> float:
        return self.worth * self.rate

    @property
    def over_part(self) -> float:
        """The rate over that of its part of the fleet; at least 1: it is not worse off for sharing."""
        return self.rate / self.part if self.part > 0.0 else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvyCell:
    """What a tenant would serve with as many GPUs of every class as another has, and no plan there exceeds."""

    rate: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetShares:
    """The answer. ``value`` is the sum over tenants of worth times rate; ``gap`` is (bound - value) / value.

    ``level`` is the least normalised rate per part of weight; rules that raise it first prove it by ``level_proof``
    (None: by exhausting all sub-fleets). ``bound`` then speaks of placements that reach this level.
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
        """0 where the rule has no level."""
        if self.level_bound is None:
            return 0.0
        return abs(self.level_bound - self.level) / self.level if self.level else float("inf")
