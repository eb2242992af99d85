"""HetisError
+-- OptionError   options, files or names are not usable; one message for each problem
+-- LayoutError   the plan, or the available machines, do not allow it; one message for each reason
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class _SeveralError(HetisError):
    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class OptionError(_SeveralError):
    """The request is not valid."""


class LayoutError(_SeveralError):
    """The replica cannot be laid out as planned."""
