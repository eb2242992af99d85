"""The exit codes of `hetis-profile`. Scripts may rely on these numbers; docs/profiling.md lists them."""

from __future__ import annotations

from enum import IntEnum


class ProfileExitCode(IntEnum):
    """Exit codes of every verb, with the same meanings as those of `hetis-plan`."""

    OK = 0
    INTERNAL = 1
    INVALID = 2
    MISSED = 5
    UNREACHABLE = 6
    INTERRUPTED = 130
    BROKEN_PIPE = 141

    @property
    def meaning(self) -> str:
        """The meaning in one line; the part before the comma is the short form."""
        return _MEANINGS[self]


_MEANINGS = {
    ProfileExitCode.OK: "success",
    ProfileExitCode.INTERNAL: "internal error, or the machine failed (a full disk, a lost process, a missing library)",
    ProfileExitCode.INVALID: "invalid input or usage, every problem is listed",
    ProfileExitCode.MISSED: "missed, calibrate found no correction that helps and nothing is written",
    ProfileExitCode.UNREACHABLE: "server unreachable, the call may be repeated",
    ProfileExitCode.INTERRUPTED: "interrupted, what was measured is kept",
    ProfileExitCode.BROKEN_PIPE: "broken pipe, the reader of the output went away",
}
