"""The devices of a node, read in a thread for which nobody waits, not even the end: a hung driver never answers."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from hetis.runtime.agent.devices import Devices
from hetis.v1.inventory_pb2 import NodeInventory
from hetis.v1.report_pb2 import DeviceReport

CLOSE_S = 2.0  # how long the driver may take to be released
AnswerT = TypeVar("AnswerT")


class DeviceReader:
    """Makes one call at a time, in order, in a daemon thread: unlike those of `asyncio.to_thread`, it does not keep the
    process from ending while a call has not returned. Errors of a call are raised where its answer is awaited.

    ``open_devices`` is called in that thread, too, by `start`.
    """

    def __init__(self, open_devices: Callable[[], Devices]) -> None:
        self._open = open_devices
        self._devices: Devices | None = None
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="devices", daemon=True).start()

    async def start(self) -> NodeInventory:
        """Open the devices and return the node's hardware. Call it once, before anything else."""
        self._devices = await self._call(self._open)
        return await self.inventory()

    def inventory(self) -> asyncio.Future[NodeInventory]:
        assert self._devices is not None
        return self._call(self._devices.inventory)

    def sample(self) -> asyncio.Future[list[DeviceReport]]:
        assert self._devices is not None
        return self._call(self._devices.sample)

    async def close(self) -> None:
        """Release the devices, or leave that to the end of the process if the driver does not answer."""
        if self._devices is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._call(self._devices.close)
        self._calls.put(None)

    def _call(self, work: Callable[[], AnswerT]) -> asyncio.Future[AnswerT]:
        answer = Future[AnswerT]()
        self._calls.put((work, answer))
        return asyncio.wrap_future(answer)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            work, answer = call
            if answer.set_running_or_notify_cancel():  # otherwise nobody waits for it any more
                try:
                    answer.set_result(work())
                except BaseException as error:
                    answer.set_exception(error)
