"""HetisError
+-- ModelError   a model folder cannot be used; the message names file, field and value
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class ModelError(HetisError):
    """A model folder cannot be used, or not in the way that was asked for."""
