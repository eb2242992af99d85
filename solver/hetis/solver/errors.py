"""The errors of planning, as one small tree.

HetisError
+-- InvalidProblemError   the input contradicts itself: a number out of range, a GPU without a profile
+-- InfeasibleError       proved: no plan of the family meets the constraints
+-- NoPlanFoundError      stopped (time limit, Ctrl-C) before any plan was found; proves nothing
+-- BrokenProofError      a plan is better than its bound; a bug, please report it
+-- UnboundPlanError      a placement could not be turned into named GPUs; a bug, please report it
+-- UncheckedPlanError    a plan fails the independent checker; a bug, please report it
"""

from __future__ import annotations

from typing import Any


class HetisError(Exception):
    """Base class of every error that hetis raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by message and attributes: Python would call ``__init__``, which may not take a message."""
        return Exception.__new__, (type(self), *self.args), self.__dict__


class InvalidProblemError(HetisError):
    """The input contradicts itself; the message names the thing, the value and the limit."""


class InfeasibleError(HetisError):
    """No plan of the family exists.

    Attributes:
        reasons: one sentence per cause, each with the numbers of both sides, the most telling first.
    """

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class NoPlanFoundError(HetisError):
    """The search was stopped before it found a plan. A plan may still exist: allow more time."""


class BrokenProofError(HetisError):
    """A plan is better than what was proved possible, so one of the two is wrong."""


class UnboundPlanError(HetisError):
    """The chosen replicas could not be placed on named GPUs although the master's packing rows held."""


class UncheckedPlanError(HetisError):
    """A plan that a search returned violates its own problem, so nothing is printed or saved.

    ``violations`` are the checker's findings, one sentence each.
    """

    def __init__(self, violations: tuple[str, ...]) -> None:
        super().__init__(f"the plan violates {len(violations)} of its checks; this is a bug in hetis, please report it")
        self.violations = violations
