"""HetisError
+-- OptionError   options, files or names are not usable; the messages are all that is wrong
+-- LayoutError   the plan, or the machines that are there, do not allow it; the messages are all the reasons
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class _SeveralError(HetisError):
    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class OptionError(_SeveralError):
    """What was asked for is not valid."""


class LayoutError(_SeveralError):
    """The replica cannot be laid out as the plan has it."""
