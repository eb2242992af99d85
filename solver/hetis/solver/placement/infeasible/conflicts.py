"""Conflicts among requirements, found by leaving out each in turn (a deletion filter)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hetis.solver.placement.infeasible.requirements import Requirement
from hetis.solver.placement.infeasible.trials import Trials


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Requirements that no plan keeps together.

    ``is_minimal`` if for each of them a plan was found that keeps all others; False if a trial ended without an answer.
    """

    members: tuple[Requirement, ...]
    is_minimal: bool


def conflicts_among(trials: Trials, given: Sequence[Requirement]) -> Iterator[Conflict]:
    """Yield disjoint conflicts until the rest can be kept, or is not known to conflict.

    No plan keeps ``given``. Requirements of the fleet may be in several conflicts, since they cannot be given up.
    """
    rest = tuple(given)
    is_first = True
    while rest and (is_first or trials.of(rest).exists is False):
        found = _conflict_in(trials, rest)
        yield found
        rest = tuple(r for r in rest if r not in found.members or r.subject.is_of_fleet)
        if all(member.subject.is_of_fleet for member in found.members):
            return
        is_first = False


def _conflict_in(trials: Trials, given: Sequence[Requirement]) -> Conflict:
    """Return a minimal subset of ``given`` that no plan keeps."""
    kept, is_minimal = list(given), True
    for requirement in given:
        without = [r for r in kept if r != requirement]
        exists = trials.of(without).exists if without else True
        if exists is False:
            kept = without
        elif exists is None:
            is_minimal = False
    return Conflict(members=tuple(kept), is_minimal=is_minimal)
