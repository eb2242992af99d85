"""File descriptors: each connection, file and process pipe takes one, and their number is limited per process."""

from __future__ import annotations

import logging
import resource

_ENOUGH = 16_384  # 10,000 agents, watchers, solver processes, the status page
_log = logging.getLogger("hetis.planner")


def raise_descriptor_limit() -> int:
    """Raise the limit as far as this process may, and return it; logs a warning if it is low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError) as error:  # some systems report no limit, but do not accept that value
            _log.warning("the limit of open files stays at %d: %s", soft, error)
    if soft != resource.RLIM_INFINITY and soft < _ENOUGH:
        _log.warning(
            "at most %d files and connections can be open; %d are enough for 10,000 agents (LimitNOFILE, ulimit -n)",
            soft,
            _ENOUGH,
        )
    return soft


def reserved_for_page(limit: int) -> int:
    """Return how many descriptors the status page may take: an eighth; the rest is for gRPC and the store."""
    return 256 if limit == resource.RLIM_INFINITY else max(8, min(256, limit // 8))
