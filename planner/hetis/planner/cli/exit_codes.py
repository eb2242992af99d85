"""Exit codes of `hetis-plan`. Scripts may rely on these numbers; docs/cli.md lists them."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every verb. 10 is reserved for differences found."""

    OK = 0
    INTERNAL = 1
    INVALID = 2
    INFEASIBLE = 3
    NO_PLAN = 4
    MISSED = 5
    UNREACHABLE = 6
    CONFLICT = 7
    INTERRUPTED = 130
    BROKEN_PIPE = 141

    @property
    def meaning(self) -> str:
        """Return the meaning in one line; the part before the comma is the short form."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.OK: "success",
    ExitCode.INTERNAL: "internal error, or the machine failed (a full disk)",
    ExitCode.INVALID: "invalid input or usage, every problem is listed",
    ExitCode.INFEASIBLE: "proved infeasible, the reasons are listed",
    ExitCode.NO_PLAN: "stopped without a plan, which proves nothing",
    ExitCode.MISSED: "--strict missed, the plan is printed and saved (export: nothing is written)",
    ExitCode.UNREACHABLE: "planner unreachable or busy, the call may be repeated",
    ExitCode.CONFLICT: "conflict, somebody was faster or the state does not allow it",
    ExitCode.INTERRUPTED: "interrupted, the best plan so far is printed and saved",
    ExitCode.BROKEN_PIPE: "broken pipe, the reader of the output went away",
}
