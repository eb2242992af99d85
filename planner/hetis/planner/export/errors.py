"""HetisError (hetis.solver.errors)
+-- NotExportableError   no replica of the plan can be launched on the target
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class NotExportableError(HetisError):
    """No part of the plan can be launched in this way.

    Attributes:
        reasons: why, one sentence each.
    """

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__("\n".join(reasons))
        self.reasons = reasons
