"""Exit codes of `hetis-planner`. Service managers may rely on these numbers; docs/planner.md lists them."""

from __future__ import annotations

from hetis.formats.exit_codes import ExitCodes


class ServiceExitCode(ExitCodes):
    """Exit codes of `hetis-planner`. 0 to 2 mean the same as for `hetis-plan`, whose 3 to 7 and 10 differ."""

    OK = 0, "stopped when asked to"
    INTERNAL = 1, "internal error, or the machine failed (a full disk)"
    INVALID = 2, "invalid configuration, certificate or token file, every problem is listed"
    ADDRESS = 8, "an address cannot be listened on, in use or not of this machine"
    STORE = 9, "the store cannot be used, held by another planner or of a newer version"
    INTERRUPTED = 130, "stopped at once, by a second SIGINT"
    BROKEN_PIPE = 141, "broken pipe, the reader of the output went away"
    TERMINATED = 143, "stopped at once, by a second SIGTERM"
