"""Connects the scheduler's side to its counts and, if there is an agent, to its way in."""

from __future__ import annotations

from hetis.runtime.vllm.counts import SchedulerCounts
from hetis.runtime.vllm.executing import ExecutorThread
from hetis.runtime.vllm.scheduler import SchedulerSide
from hetis.runtime.vllm.settings import SettingsError
from hetis.runtime.vllm.steering import SteeredVllm


def surround(side: SchedulerSide) -> SteeredVllm | None:
    """Attach both to a side that is connected to its block manager. Returns what an agent steers, or None.

    Raises:
        SettingsError: the executor's socket cannot be created.
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
