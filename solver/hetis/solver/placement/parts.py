"""Parts of a family that searches begin with: those of other strategies, so that their plans are known first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hetis.solver.plan import Role
from hetis.solver.problem import Family

PLAIN = ((Role.UNIFIED,), (Role.PREFILL, Role.DECODE))
SHARE = 0.5  # of the time that is left, at most, for each of them


@dataclass(frozen=True, slots=True)
class Part:
    """Replicas of these roles with at most so many copies of a stage and attention workers of one class."""

    roles: tuple[Role, ...]
    max_copies: int
    max_pool: int


def whole(family: Family) -> Part:
    """All of a family."""
    return Part(family.roles, family.max_copies, family.max_pool)


def contained_parts(family: Family, roles: Collection[Role]) -> list[Part]:
    """The parts of a family to search before the whole, fewer those that it does not go beyond.

    Unified replicas without stage copies and attention workers are the family of `hexgen`, prefill and decode replicas
    that of `hexgen2`. ``roles`` are those of the search.
    """
    plain = [Part(part, 1, 0) for part in PLAIN if set(part) <= set(roles)]
    is_plain = family.max_copies == 1 and family.max_pool == 0
    return [part for part in plain if not (is_plain and len(part.roles) == len(roles))]
