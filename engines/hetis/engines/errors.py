"""HetisError
+-- OptionError   options, files or names are not usable; one message per problem
+-- LayoutError   the plan or the available machines do not permit the request; one message per reason
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class _SeveralError(HetisError):
    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class OptionError(_SeveralError):
    """The request is invalid."""


class LayoutError(_SeveralError):
    """The replica cannot be laid out as planned."""
