"""Rungs: how much complexity of its replicas an operator accepts, so that the best plan of each has a proven bound.

A rung restricts a family as a strategy does, and independently of it. The plans of a rung are among those of the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from hetis.solver.cluster import node_of
from hetis.solver.engine_rules import Family
from hetis.solver.errors import InvalidProblemError
from hetis.solver.placement.families import STRATEGIES
from hetis.solver.plan import Plan, ReplicaPlan, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One rung: its name, what its replicas are, and what an operator needs to run them.

    Attributes:
        max_nodes: the most nodes of a replica; None: as many as the engine allows.
        is_unified: every replica prefills and decodes.
        has_workers: stages may have attention workers.
    """

    name: str
    summary: str
    needs: str
    max_nodes: int | None = None
    is_unified: bool = True
    has_workers: bool = False

    def restrict(self, family: Family, strategy: str = "hetis") -> Family:
        """Return the replicas of a family that are on this rung, for a search by a strategy, which still restricts it.

        Raises:
            InvalidProblemError: all replicas of the strategy are above the rung, or the family is of no engine.
        """
        if family.engine is None:
            raise InvalidProblemError(f"rung {self.name} is of plans for an engine: give the family its rules")
        roles = STRATEGIES[strategy].restrict(family).roles
        if self.is_unified:
            if Role.UNIFIED not in roles:
                raise InvalidProblemError(
                    f"strategy {strategy} keeps prefill and decode apart, rung {self.name} does not"
                )
            roles = (Role.UNIFIED,)
        limits = [limit for limit in (self.max_nodes, family.engine.max_nodes) if limit is not None]
        return replace(
            family,
            roles=roles,
            max_pool=family.max_pool if self.has_workers else 0,
            engine=replace(family.engine, max_nodes=min(limits, default=None)),
        )

    def allows(self, replica: ReplicaPlan) -> bool:
        """Return whether a replica is on this rung or below."""
        num_nodes = len({node_of(name) for name in replica.devices()})
        return (
            (self.max_nodes is None or num_nodes <= self.max_nodes)
            and (replica.role is Role.UNIFIED or not self.is_unified)
            and (self.has_workers or not replica.attention_workers)
        )


RUNGS = {  # from the simplest
    rung.name: rung
    for rung in (
        Rung(
            name="node",
            summary="every replica in one node, prefilling and decoding",
            needs="no special engine or router",
            max_nodes=1,
        ),
        Rung(
            name="pipelines",
            summary="layers over several nodes and GPU types",
            needs="an engine that starts one replica on several nodes",
        ),
        Rung(
            name="apart",
            summary="prefill and decode apart",
            needs="transfer of KV and a router of pairs",
            is_unified=False,
        ),
        Rung(
            name="workers",
            summary="attention workers",
            needs="the plugin of this project",
            is_unified=False,
            has_workers=True,
        ),
    )
}


class Known(NamedTuple):
    """A plan that is the best of a smaller family, by its search."""

    plan: Plan
    family: Family


def rungs_of(family: Family, strategy: str = "hetis") -> dict[str, Family]:
    """Return the family on each rung that it has, from the simplest: without those that add no replica."""
    found: dict[str, Family] = {}
    for rung in RUNGS.values():
        try:
            restricted = rung.restrict(family, strategy)
        except InvalidProblemError:
            if family.engine is None:
                raise
            continue  # all replicas of the strategy are above it
        searched = STRATEGIES[strategy].restrict(restricted)
        if searched not in (STRATEGIES[strategy].restrict(lower) for lower in found.values()):
            found[rung.name] = restricted
    return found


def lowest_rung(replicas: Iterable[ReplicaPlan]) -> Rung:
    """Return the simplest rung that has all of these replicas."""
    listed = tuple(replicas)
    return next(rung for rung in RUNGS.values() if all(map(rung.allows, listed)))
