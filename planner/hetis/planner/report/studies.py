"""The reasons why there is no plan, as data."""

from __future__ import annotations

from typing import Any

from hetis.solver.errors import InfeasibleError
from hetis.solver.placement.infeasible import ExplainedInfeasibleError


def infeasible_parts(error: InfeasibleError) -> dict[str, Any]:
    """Return ``reasons`` as sentences, and ``conflicts`` and ``relaxations`` if the solver found them."""
    reasons = {"reasons": list(error.reasons)}
    if not isinstance(error, ExplainedInfeasibleError):
        return reasons
    return reasons | {
        "conflicts": [
            {
                "members": [
                    {"subject": one.subject.name.lower(), "name": str(one), "value": one.value or None}
                    for one in conflict.members
                ],
                "minimal": conflict.is_minimal,
            }
            for conflict in error.why.conflicts
        ],
        "relaxations": [
            {
                "of": None if one.about is None else str(one.about),
                "change": one.change,
                "option": one.option or None,
                "usd_per_hour": one.usd_per_hour,
            }
            for one in error.why.relaxations
            if one.is_tried
        ],
    }
