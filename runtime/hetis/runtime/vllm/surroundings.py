"""What stands around the scheduler's side: its counts, and the way in of an agent."""

from __future__ import annotations

from hetis.runtime.vllm.counts import SchedulerCounts
from hetis.runtime.vllm.executing import ExecutorThread
from hetis.runtime.vllm.scheduler import SchedulerSide
from hetis.runtime.vllm.settings import SettingsError
from hetis.runtime.vllm.steering import SteeredVllm


def surround(side: SchedulerSide) -> SteeredVllm | None:
    """Attaches both to a side that has met its block manager. Returns what an agent steers; None: nobody does.

    Raises:
        SettingsError: the executor's socket cannot be made.
    """
    path = side.settings.executor
    if path is None:
        side.attach(SchedulerCounts(side))
        return None
    steered = SteeredVllm(side)
    try:
        executor = ExecutorThread(path, steered, side.boundary)
    except OSError as error:
        raise SettingsError(f"hetis: executor: {error}") from None
    side.attach(SchedulerCounts(side), steered, executor)
    return steered
