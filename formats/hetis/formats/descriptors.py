"""The limit on open files of a command that serves: raised as far as it should be, or refused in one line."""

from __future__ import annotations

import resource
from contextlib import suppress

from hetis.formats.errors import single_problem

_MOST_ON_MACOS = 10_240  # it reports no limit, but accepts no more


def raise_descriptor_limit(command: str, *, least: int, enough: int | None = None) -> int:
    """Raise the limit on this process's open files, and return it (`resource.RLIM_INFINITY`: none).

    Args:
        command: the command's name in messages.
        least: the number without which the command fails in odd ways.
        enough: how far to raise it if the hard limit permits; None: up to the hard limit.

    Raises:
        DocumentError: the limit remains below ``least``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard if enough is None else _lower(enough, hard), _MOST_ON_MACOS):
        if wanted == soft or _lower(soft, wanted) != soft:
            break  # it is there, or above
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
            break
    if _lower(soft, least) != least:
        raise single_problem(
            "ulimit -n",
            f"{command} may have at most {soft} files and connections open, and needs at least {least}: raise the hard"
            " limit (ulimit -Hn, LimitNOFILE= of a systemd unit, --ulimit nofile= of a container)",
        )
    return soft


def _lower(one: int, other: int) -> int:
    return min((limit for limit in (one, other) if limit != resource.RLIM_INFINITY), default=resource.RLIM_INFINITY)
