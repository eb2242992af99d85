"""Errors of a store when a planner starts.

HetisError (hetis.solver.errors)
+-- StoreError   the store cannot be opened; nothing in it was changed. Later trouble is a ServiceError
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class StoreError(HetisError):
    """The store cannot be used: damaged, not writable, newer than this planner, or used by another planner."""
