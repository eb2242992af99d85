"""Exit codes of `hetis-plan`. Scripts may rely on these numbers; docs/cli.md lists them."""

from __future__ import annotations

from hetis.commands.exit_codes import ExitCodes


class ExitCode(ExitCodes):
    """Exit codes shared by all verbs. 10 is reserved for differences found."""

    OK = 0, "success"
    INTERNAL = 1, "internal error, or the machine failed (a full disk)"
    INVALID = 2, "invalid input or usage, every problem is listed"
    INFEASIBLE = 3, "proved infeasible, the reasons are listed"
    NO_PLAN = 4, "stopped without a plan, one may still exist"
    MISSED = 5, "--strict missed, the plan is printed and saved (export: nothing is written)"
    UNREACHABLE = 6, "planner unreachable or busy, retrying is safe"
    CONFLICT = 7, "conflict, another change came first or the state does not allow it"
    INTERRUPTED = 130, "interrupted, the best plan so far is printed and saved"
    BROKEN_PIPE = 141, "broken pipe, the reader of the output closed it"
