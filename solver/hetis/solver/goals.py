"""Goals of plans: what each counts, in which unit, and whether it needs a demanded rate.

A goal either maximises the served rate, or minimises a cost that every GPU in use adds to (`Goal.cost_of`) while a
demanded rate is served. The master, the heuristics, the checker and the report take all that differs between goals from
here, so a further goal is a further entry of `ObjectiveKind` and of `GOALS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from hetis.solver.cluster import Cluster, GpuType

GoalName = Literal["goodput", "throughput", "cost", "gpus"]  # those of `ObjectiveKind`, for types of texts
ROUNDING = 1e-6  # of a bound on a whole number


class ObjectiveKind(StrEnum):
    GOODPUT = "goodput"
    THROUGHPUT = "throughput"
    COST = "cost"  # least USD per hour for a demanded rate
    GPUS = "gpus"  # fewest GPUs for a demanded rate

    @property
    def goal(self) -> Goal:
        return GOALS[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a plan is best at.

    Attributes:
        label: the value's name for people.
        unit: the value's unit.
        cost_of: what one GPU in use adds to the value, from its type and its USD per hour, or None if that is unknown;
            None: the served rate is the value, and maximised.
        unknown: what is missing, and where to set it, if `cost_of` is None for a GPU type.
        is_planned: whether only the planned utilisation of the saturated rate counts.
        is_whole: whether values are whole numbers.
        better: what a better plan is.
    """

    label: str
    unit: str = "requests/s"
    cost_of: Callable[[GpuType, float | None], float | None] | None = None
    unknown: str = ""
    is_planned: bool = True
    is_whole: bool = False
    better: str = "better"

    @property
    def maximises(self) -> bool:
        return self.cost_of is None

    @property
    def needs_demand(self) -> bool:
        return self.cost_of is not None

    def cost(self, gpu: GpuType, usd_per_hour: float | None) -> float:
        """Return what one GPU in use adds to the value: nothing if the rate is maximised or it is unknown."""
        return (self.cost_of(gpu, usd_per_hour) if self.cost_of is not None else None) or 0.0

    def tightened(self, bound: float, value: float) -> float:
        """Return the bound that follows from ``bound`` and whole values, if they are; at most ``value``."""
        return min(value, float(math.ceil(bound - ROUNDING))) if self.is_whole else bound

    def without_cost(self, cluster: Cluster) -> dict[str, str]:
        """Return the GPU types of which some GPU's cost is unknown, with the first node (group) that has such GPUs."""
        found, cost_of = dict[str, str](), self.cost_of
        for group in cluster.node_groups:
            for slots in group.gpus:
                if cost_of is not None and cost_of(cluster.gpu_types[slots.gpu], cluster.price_of(slots)) is None:
                    found.setdefault(slots.gpu, group.name)
        return found


GOALS: Mapping[ObjectiveKind, Goal] = {
    ObjectiveKind.GOODPUT: Goal(label="Goodput"),
    ObjectiveKind.THROUGHPUT: Goal(label="Throughput", is_planned=False),
    ObjectiveKind.COST: Goal(
        label="Cost",
        unit="USD/h",
        cost_of=lambda _gpu, usd_per_hour: usd_per_hour,
        unknown="the price of every GPU type: set usd_per_hour in the cluster",
        better="cheaper",
    ),
    ObjectiveKind.GPUS: Goal(
        label="GPUs", unit="GPUs", cost_of=lambda _gpu, _price: 1.0, is_whole=True, better="smaller"
    ),
}
