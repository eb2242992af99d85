"""Parts of a family with which searches begin: those of other strategies, so that their plans are known first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hetis.solver.plan import Role
from hetis.solver.problem import Family

PLAIN = ((Role.UNIFIED,), (Role.PREFILL, Role.DECODE))
SHARE = 0.5  # largest share of the time left for each of them
INSIDE = (1 / 3, 1 / 6, 1 / 12)  # shares of the exact search's time left: for the first, the second, any wider part


@dataclass(frozen=True, slots=True)
class Part:
    """Replicas of some roles, with limits on stage copies and on attention workers of one class per copy."""

    roles: tuple[Role, ...]
    max_copies: int
    max_pool: int

    def describe(self, family: Part) -> str:
        """Return what the part leaves out of a family."""
        left_out = [
            name
            for name, is_less in (
                ("stage copies", self.max_copies < family.max_copies),
                ("attention workers", self.max_pool < family.max_pool),
            )
            if is_less
        ]
        roles = [f"{' and '.join(self.roles)} only"] if set(self.roles) != set(family.roles) else []
        return ", ".join([*roles, *([f"without {' and '.join(left_out)}"] if left_out else [])])


def whole(family: Family) -> Part:
    """Return the part that is the whole of a family."""
    return Part(family.roles, family.max_copies, family.max_pool)


def contained_parts(family: Family, roles: Collection[Role]) -> list[Part]:
    """Return the parts of a family to search before the whole, without any that equals the whole.

    Unified replicas without stage copies and attention workers are the family of `hexgen`; such prefill and decode
    replicas are that of `hexgen2`. ``roles`` are those of the search.
    """
    plain = [Part(part, 1, 0) for part in PLAIN if set(part) <= set(roles) and _has_plans(family, part, 0)]
    is_plain = family.max_copies == 1 and family.max_pool == 0
    return [part for part in plain if not (is_plain and len(part.roles) == len(roles))]


def parts_inside(family: Family) -> list[tuple[Part, float]]:
    """Return the parts that the exact search of a family turns to, each with its share of the time (`INSIDE`).

    Those of `contained_parts` come first, then all roles without stage copies, and without attention workers.
    """
    roles = family.roles
    plain = contained_parts(family, roles)
    wider = [Part(roles, 1, family.max_pool), Part(roles, family.max_copies, 0)]
    found = [part for part in dict.fromkeys([*plain, *wider]) if part != whole(family)]
    found = [part for part in found if _has_plans(family, part.roles, part.max_pool)]
    shares = dict(zip(PLAIN, INSIDE, strict=False))
    return [(part, shares[part.roles] if part in plain else INSIDE[-1]) for part in found]


def _has_plans(family: Family, roles: Collection[Role], max_pool: int) -> bool:
    """Return whether a part may hold plans: decode replicas that keep no head groups need attention workers."""
    return max_pool > 0 or family.decode_keeps_heads or Role.DECODE not in roles
