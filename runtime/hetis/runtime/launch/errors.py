"""HetisError
+-- LayoutError   a plan, or memory, does not allow an engine here; the messages are all the reasons
"""

from __future__ import annotations

from hetis.solver.errors import HetisError


class LayoutError(HetisError):
    """The engine cannot be laid out as asked for."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages
