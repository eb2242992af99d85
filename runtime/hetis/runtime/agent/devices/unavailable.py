"""The one error of this package, in a module of its own because every source raises it.

HetisError (hetis.solver.errors)
+-- DevicesUnavailableError   the requested source cannot be read on this machine
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class DevicesUnavailableError(HetisError):
    """The requested source of devices cannot be read on this machine."""
