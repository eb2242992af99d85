"""Exit codes of `hetis-planner`. Service managers may rely on these numbers; docs/reference lists them."""

from __future__ import annotations

from hetis.commands.exit_codes import ExitCodes


class ServiceExitCode(ExitCodes):
    """Exit codes of `hetis-planner`. 0 to 2 mean the same as for `hetis-plan`, whose 3 to 7 and 10 differ."""

    OK = 0, "stopped on request"
    INTERNAL = 1, "internal error, or the machine failed (a full disk)"
    INVALID = 2, "invalid configuration, certificate or token file; every problem is listed"
    ADDRESS = 8, "cannot listen on an address, because it is in use or not of this machine"
    STORE = 9, "the store cannot be used, because another planner holds it, its version is newer, or it does not exist"
    INTERRUPTED = 130, "stopped at once, by a second SIGINT"
    BROKEN_PIPE = 141, "broken pipe, because the reader of the output exited"
    TERMINATED = 143, "stopped at once, by a second SIGTERM"
