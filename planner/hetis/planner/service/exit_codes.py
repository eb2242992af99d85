"""Exit codes of `hetis-planner`. Service managers may rely on these numbers; docs/planner.md lists them."""

from __future__ import annotations

from enum import IntEnum


class ServiceExitCode(IntEnum):
    """Exit codes of `hetis-planner`. 0 to 2 mean the same as for `hetis-plan`, whose 3 to 7 and 10 differ."""

    OK = 0
    INTERNAL = 1
    INVALID = 2
    ADDRESS = 8
    STORE = 9
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143

    @property
    def meaning(self) -> str:
        """The meaning in one line; the part before the comma is the short form."""
        return _MEANINGS[self]


_MEANINGS = {
    ServiceExitCode.OK: "stopped when asked to",
    ServiceExitCode.INTERNAL: "internal error, or the machine failed (a full disk)",
    ServiceExitCode.INVALID: "invalid configuration, certificate or token file, every problem is listed",
    ServiceExitCode.ADDRESS: "an address cannot be listened on, in use or not of this machine",
    ServiceExitCode.STORE: "the store cannot be used, held by another planner or of a newer version",
    ServiceExitCode.INTERRUPTED: "stopped at once, by a second SIGINT",
    ServiceExitCode.BROKEN_PIPE: "broken pipe, the reader of the output went away",
    ServiceExitCode.TERMINATED: "stopped at once, by a second SIGTERM",
}
