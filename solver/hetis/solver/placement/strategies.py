"""Strategies: restrictions of the template family, which therefore share the master, the bound and the checker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from hetis.solver.constraints import Constraint, Constraints, Exclude, WithoutTp
from hetis.solver.plan import Role
from hetis.solver.problem import Family


@dataclass(frozen=True, slots=True)
class Strategy:
    """A strategy's name, one sentence for people, and how it restricts a family.

    The shapes are the strategy's. The sizes tried (TP, micro-batches, chunks, limits on copies and attention workers)
    are the family's.
    """

    name: str
    summary: str
    restrict: Callable[[Family], Family]
    is_published: bool = False  # a heuristic of `hetis.solver.published`, not a search with a proof

    @property
    def has_engines(self) -> bool:
        """Whether it plans for named engines: heuristics know none, and none has workers for decode replicas."""
        return not self.is_published and self.restrict(Family()).decode_keeps_heads


def _uniform(family: Family) -> Family:
    return replace(
        family, name="uniform", mixed_types=False, uneven_layers=False, max_copies=1, max_pool=0, roles=(Role.UNIFIED,)
    )


def _hexgen(family: Family) -> Family:
    return replace(
        family, name="hexgen", mixed_types=True, uneven_layers=True, max_copies=1, max_pool=0, roles=(Role.UNIFIED,),
        attention_dp=(),
    )  # fmt: skip


def _hexgen2(family: Family) -> Family:
    return replace(
        family, name="hexgen2", mixed_types=True, uneven_layers=True, max_copies=1, max_pool=0,
        roles=(Role.PREFILL, Role.DECODE), one_type_per_role=False, attention_dp=(),
    )  # fmt: skip


def _splitwise(family: Family) -> Family:
    return replace(_hexgen2(family), name="splitwise", mixed_types=False, one_type_per_role=True)


def _hexgen3(family: Family) -> Family:
    return replace(_hexgen2(family), name="hexgen3", max_pool=family.max_pool, decode_keeps_heads=False)


def _splitwise_paper(family: Family) -> Family:
    # Without unified replicas there is no mixed pool; every zone has pools, with types of its own.
    return replace(_splitwise(family), name="splitwise-paper", roles=family.roles, one_type_per_role=False)


def _hexgen_paper(family: Family) -> Family:
    return replace(_hexgen(family), name="hexgen-paper")


def _hexgen2_paper(family: Family) -> Family:
    return replace(_hexgen2(family), name="hexgen2-paper")


def _hetis_paper(family: Family) -> Family:
    return replace(_hexgen(family), name="hetis-paper", max_pool=family.max_pool)


STRATEGIES: Mapping[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            "hetis",
            "every shape: mixed types, uneven layers, stage copies, attention workers; prefill and decode apart or not",
            lambda family: replace(family, name="hetis", mixed_types=True, uneven_layers=True, one_type_per_role=False),
        ),
        Strategy("uniform", "what engines do today: one GPU type per replica, equal layers", _uniform),
        Strategy("hexgen", "asymmetric TP x PP with uneven layers, no copies, no attention workers", _hexgen),
        Strategy("hexgen2", "the same for replicas that prefill and replicas that decode, never both", _hexgen2),
        Strategy("hexgen3", "prefill apart; decode with all attention on workers, all else on stages", _hexgen3),
        Strategy("splitwise", "prefill replicas of one GPU type, decode replicas of one", _splitwise),
        Strategy("splitwise-paper", "Splitwise's own search: prompt, token, mixed pool", _splitwise_paper, True),
        Strategy("hexgen-paper", "HexGen's own heuristic: genetic search over groups", _hexgen_paper, True),
        Strategy("hexgen2-paper", "HexGen-2's own heuristic: partition, maximum flow, swaps", _hexgen2_paper, True),
        Strategy("hetis-paper", "Hetis's own heuristic: 5% rule, workers shared by a replica", _hetis_paper, True),
    )
}


def constraints_ignored(strategy: str, constraints: Constraints) -> tuple[Constraint, ...]:
    """Return constraints that a strategy ignores: a published heuristic knows a fleet and TP sizes but no GPU roles."""
    if not STRATEGIES[strategy].is_published:
        return ()
    return tuple(each for each in constraints if not isinstance(each, Exclude | WithoutTp))
