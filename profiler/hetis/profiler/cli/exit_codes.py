"""The exit codes of `hetis-profile`. Scripts may rely on these numbers; docs/profiling.md lists them."""

from __future__ import annotations

from hetis.commands.exit_codes import ExitCodes


class ProfileExitCode(ExitCodes):
    """Exit codes of every verb, with the same meanings as those of `hetis-plan`."""

    OK = 0, "success"
    INTERNAL = 1, "internal error, or the machine failed (a full disk, a lost process, a missing library)"
    INVALID = 2, "invalid input or usage, every problem is listed"
    MISSED = 5, "missed, calibrate found no helpful correction and wrote nothing"
    UNREACHABLE = 6, "server unreachable, retrying is safe"
    INTERRUPTED = 130, "interrupted, what was measured is kept"
    BROKEN_PIPE = 141, "broken pipe, the reader of the output closed it"
