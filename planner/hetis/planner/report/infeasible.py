"""The reasons why a problem has no plan, as data: conflicts, and changes that would resolve them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hetis.solver.errors import InfeasibleError

if TYPE_CHECKING:
    from hetis.solver.placement.infeasible import Conflict, Relaxation, Requirement


def infeasible_parts(error: InfeasibleError) -> Mapping[str, Any]:
    """Return ``reasons`` in sentences, and ``conflicts`` and ``relaxations`` if the solver gave them."""
    from hetis.solver.placement.infeasible import ExplainedInfeasibleError

    if not isinstance(error, ExplainedInfeasibleError):
        return {"reasons": list(error.reasons)}
    return {
        "reasons": list(error.reasons),
        "conflicts": [_conflict(conflict) for conflict in error.why.conflicts],
        "relaxations": [_relaxation(relaxation) for relaxation in error.why.relaxations if relaxation.is_tried],
    }


def _conflict(conflict: Conflict) -> dict[str, Any]:
    return {"members": [_member(member) for member in conflict.members], "minimal": conflict.is_minimal}


def _member(member: Requirement) -> dict[str, Any]:
    return {"subject": member.subject.name.lower(), "name": str(member), "value": member.value or None}


def _relaxation(relaxation: Relaxation) -> dict[str, Any]:
    return {
        "of": None if relaxation.about is None else str(relaxation.about),
        "change": relaxation.change,
        "option": relaxation.option or None,
        "usd_per_hour": relaxation.usd_per_hour,
    }
