"""Background tasks of the planner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

_log = logging.getLogger("hetis.planner")


class Loops:
    """Background tasks. A failed one is not restarted, since it may have left anything half done.

    Args:
        whole: tasks that these belong to, although they are stopped separately; failures are recorded there, too.
    """

    def __init__(self, whole: Loops | None = None) -> None:
        self.failures: list[str] = [] if whole is None else whole.failures  # names of the failed tasks
        self.failed: asyncio.Event = asyncio.Event() if whole is None else whole.failed  # set by the first failure
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._note_failure)
        self._tasks.append(task)

    async def stop(self) -> None:
        """Stop the tasks; new ones may be started later."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _note_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s failed: restart the planner", task.get_name(), exc_info=error)
            self.failures.append(task.get_name())
            self.failed.set()
