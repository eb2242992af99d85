"""Refused changes on their way into the audit log. Accepted ones are logged in the transaction of the change."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from hetis.planner.failures import ServiceError
from hetis.planner.store.audit import AuditedChange

EVERY_S = 60.0
"""Within this many seconds, refusals with the same caller, method and reason become one line with their number."""
NOT_KEPT = frozenset({"QUOTA_EXCEEDED", "DRAINING", "NOT_LEADER", "STORE_UNAVAILABLE", "CREDENTIALS"})
"""Reasons that are not logged: CREDENTIALS identifies no caller, and the others do not depend on the request."""
_MOST_KINDS = 1000
_log = logging.getLogger("hetis.planner.audit")


class AuditRefusals:
    """Collects refusals by kind, and writes those that are due in one transaction.

    Args:
        append: writes lines durably, or raises ServiceError.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        append: Callable[[Sequence[AuditedChange]], Awaitable[None]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._append, self._clock = append, clock
        self._waiting: dict[tuple[str, str, str], AuditedChange] = {}
        self._written_s: dict[tuple[str, str, str], float] = {}
        self._came = asyncio.Event()

    def note(self, change: AuditedChange) -> None:
        """Add a refusal. Kinds beyond a thousand at a time are only in the log of calls."""
        key = change.caller, change.method, change.outcome
        if (same := self._waiting.get(key)) is not None:
            self._waiting[key] = replace(change, times=same.times + 1)
        elif len(self._waiting) < _MOST_KINDS:
            self._waiting[key] = change
        self._came.set()

    async def run(self) -> None:
        while True:
            wait_s = await self.step()
            self._came.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._came.wait(), wait_s)

    async def step(self) -> float | None:
        """Write the refusals that are due; return the seconds until the next ones are due, or None if none wait."""
        now_s = self._clock()
        self._written_s = {key: at_s for key, at_s in self._written_s.items() if now_s - at_s < EVERY_S}
        due = {key: change for key, change in self._waiting.items() if key not in self._written_s}
        if due:
            for key in due:
                del self._waiting[key]
                self._written_s[key] = now_s
            await self._write(list(due.values()))
        ends = [self._written_s[key] + EVERY_S - now_s for key in self._waiting if key in self._written_s]
        return max(0.0, min(ends)) if ends else None

    async def _write(self, changes: Sequence[AuditedChange]) -> None:
        """Write these lines. Lines that cannot be written are logged and dropped, so that the loop continues."""
        try:
            await self._append(changes)
        except ServiceError as error:
            _log.error("%d refusals could not be written to the audit log: %s", len(changes), error)
        except Exception:
            if len(changes) > 1:  # if a single line causes the failure, only that line is dropped
                for change in changes:
                    await self._write([change])
            else:
                _log.exception("a refusal could not be written to the audit log", extra={"method": changes[0].method})
