"""The one error of this room; a module of its own because every source raises it.

HetisError (hetis.solver.errors)
+-- DevicesUnavailableError   the source that was asked for cannot be read on this machine
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class DevicesUnavailableError(HetisError):
    """The source of devices that was asked for cannot be read on this machine."""
