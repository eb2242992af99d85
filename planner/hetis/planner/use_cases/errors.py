"""Errors around the solver.

HetisError (hetis.solver.errors)
+-- UncheckedPlanError   the solver's plan fails the independent checker; a bug, please report it
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class UncheckedPlanError(HetisError):
    """The solver returned a plan that violates its own problem, so nothing is printed or saved.

    ``violations`` are the checker's findings, one sentence each.
    """

    def __init__(self, violations: tuple[str, ...]) -> None:
        super().__init__(f"the plan violates {len(violations)} of its checks; this is a bug in hetis, please report it")
        self.violations = violations
