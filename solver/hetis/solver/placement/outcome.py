"""The outcome of any search, and bounds on every plan that need no search because they follow from dense work.

A replica with M micro-batches in flight takes ``t >= (sum of its stages) / M``, and its stages hold all L layers. With
w the least time of a layer on any GPU it may use, ``t >= L w / M``, so a mix whose latency limits require less has no
replica. For the other mixes, a GPU that spends all its time on dense work, without attention, processes at most
``1 / (n w)`` layers per second at the best mix and TP size n of a role, and every request needs all layers. With
separate prefill and decode a GPU serves at most a share of each request, and the bound holds for every split of a
request's price between the two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from hetis.solver.errors import BrokenProofError
from hetis.solver.placement.constraint_rows import unit_of
from hetis.solver.placement.master import MilpSolution
from hetis.solver.placement.replicas.kinds import Layout
from hetis.solver.placement.replicas.tables import CostTables, FloatArray
from hetis.solver.placement.replicas.template import Template
from hetis.solver.plan import Role

CROSSING = 1e-6  # ratio by which value and bound, both sums of rounded numbers, may cross


def sound_bound(bound: float, value: float, *, maximises: bool) -> float:
    """Return ``bound``, or ``value`` if rounding has put ``bound`` on the wrong side of it.

    Raises:
        BrokenProofError: they cross by more than rounding explains.
    """
    beyond = value - bound if maximises else bound - value
    if beyond > CROSSING * abs(value):
        raise BrokenProofError(f"a plan of value {value:.9g} contradicts the bound {bound:.9g}; please report this")
    return value if beyond > 0.0 else bound


def relative_gap(incumbent: MilpSolution | None, bound: float) -> float:
    """Return the distance between a plan and a bound as a ratio of the plan's value, or inf without a plan."""
    if incumbent is None:
        return float("inf")
    return abs(bound - incumbent.value) / max(abs(incumbent.value), 1e-12)


@dataclass(frozen=True, slots=True)
class Simplicity:
    """The points of a plan's complexity, and the bound below which no plan within the limits is (`simplicity.py`)."""

    missing: float
    several: float
    shapes: float
    bound: float

    @property
    def points(self) -> float:
        return self.missing + self.several + self.shapes


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a search; ``value`` and ``bound`` are in requests/s, or in USD/h or GPUs if cost is minimised."""

    chosen: tuple[tuple[Template, int], ...]
    value: float
    bound: float
    row_prices: FloatArray  # duals of the master's rows, at the bound
    rate_prices: FloatArray  # [sides] value of one more request/s on that side, at the bound
    flows: FloatArray  # [Z, Z] requests/s prefilled in the first zone and decoded in the second
    runners_up: tuple[Template, ...] = ()
    interrupted: bool = False
    left_bound: float | None = None  # on what any plan leaves after the worst loss, if that is maximised
    layouts: Mapping[Template, Sequence[Layout]] = field(default_factory=dict)  # of each one's replicas, if chosen
    simplicity: Simplicity | None = None
    best_value: float | None = None  # if a simpler outcome replaced the best


class Beyond(NamedTuple):
    """What a plan must exceed to be of use: a saturated rate that serves as much as a known plan keeps.

    If workers are all that the family adds to that of the known plan (``adds_workers``), its search found what is
    served without any, and the relaxation must have some.
    """

    rate: float = 0.0
    adds_workers: bool = False


ANY = Beyond()


# --- bounds from dense work


SHARES = np.linspace(0.0, 1.0, 21)  # shares of a request's price that its prompt gets
ROUNDING = 1e-9


def rate_bound(costs: CostTables, roles: Collection[Role] = tuple(Role), *, with_constraints: bool = True) -> float:
    """Return an upper bound on the requests/s of plans of these roles within the latency limits; 0 if none serves any.

    Memory is ignored. With ``with_constraints`` limits on rent and GPUs count, too.
    """
    if not costs.ranks or not costs.scopes:
        return 0.0
    none = np.zeros(len(costs.classes))
    available = np.array([float(c.available) for c in costs.classes])
    weights = np.array([np.ones_like(SHARES), SHARES, 1.0 - SHARES])
    of_ranges = []
    for number in range(max(1, len(costs.ranges))):
        speeds = np.array([layers_per_s(costs, role, number) if role in roles else none for role in Role])  # [roles, N]
        of_ranges.append((weights[:, :, None] * speeds[:, None, :]).max(axis=0))  # per GPU at every share, [shares, N]
    of_gpus = (_worth_of_ranges(costs, of_ranges)[:, None, None] * of_ranges).max(axis=0)
    totals = [of_gpus @ available]
    index = costs.problem.constraint_index if with_constraints else None
    for constraint in index.most if index is not None else ():
        units = np.array([unit_of(c, constraint.of) for c in costs.classes])
        totals.append(np.array([_filled(speed, available, units, constraint.most) for speed in of_gpus]))
    return float(min(total.min() for total in totals)) / costs.scopes[0].tables.num_layers


def is_out_of_reach(costs: CostTables, saturated_rps: float) -> bool:
    """Return whether no plan serves this rate, or with 0, whether the limits alone leave no replica."""
    bound = rate_bound(costs)
    return bound <= 0.0 or bound < saturated_rps * (1.0 - ROUNDING)


def _worth_of_ranges(costs: CostTables, speeds: Sequence[FloatArray]) -> FloatArray:
    """Return what a request of each range is worth in requests of all classes; [ranges].

    Any weights of the classes that sum to 1 give a bound (`master.py`). These are the shares of the classes in the
    dense work, at which all ranges gain about the same.
    """
    shares = np.array([*costs.problem.workload.shares.values()])
    if not len(shares):
        return np.ones(1)
    work = np.array([shares[k] / max(float(speed.max(initial=0.0)), 1e-300) for k, speed in enumerate(speeds[1:])])
    return np.array([1.0, *(work / work.sum() / shares)])


def layers_per_s(costs: CostTables, role: Role, number: int = 0) -> FloatArray:
    """Return layers/s of dense work per GPU of every class, in replicas of a role that keep the limits; [N].

    They serve the range of this number.
    """
    best = np.zeros(len(costs.classes))
    in_flight = np.array(costs.problem.family.in_flight)
    for part in (one for one in costs.scopes if one.number == number):
        t = part.tables
        mixes = [x for x, mix in enumerate(costs.mixes) if mix.role is role and part.serves(mix)]
        here = [s for s, (g, _) in enumerate(costs.ranks) if t.available[g] > 0]
        if not mixes or not here:
            continue
        layer_s = t.layer_s[np.ix_(mixes, here)]
        shortest = t.num_layers * np.maximum(layer_s, t.wire_s[np.ix_(mixes, here)]).min(axis=1)
        kept = (t.t_cap[mixes] * in_flight >= shortest[:, None] * (1.0 - ROUNDING)).any(axis=1)
        if kept.any():
            for s, fastest in zip(here, layer_s[kept].min(axis=0), strict=True):
                device_class, tp = costs.ranks[s]
                best[device_class] = max(best[device_class], 1.0 / (tp * fastest))
    return best


def _filled(speed: FloatArray, available: FloatArray, units: FloatArray, most: float) -> float:
    """Return the most layers/s within a limit on a sum: a fractional knapsack, most speed per unit first."""
    total = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        promise = np.where(units > 0.0, speed / units, np.inf)
    for g in np.argsort(-promise, kind="stable"):
        count = available[g] if units[g] == 0.0 else min(available[g], max(0.0, most) / units[g])
        total, most = total + count * speed[g], most - count * units[g]
    return float(total)
