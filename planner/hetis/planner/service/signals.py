"""SIGTERM and SIGINT: the first asks to stop in order, the second ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal

from hetis.planner.service.exit_codes import ServiceExitCode

_CODES = {signal.SIGINT: ServiceExitCode.INTERRUPTED, signal.SIGTERM: ServiceExitCode.TERMINATED}


class StopSignals:
    """Waits for the first signal of this process."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        for number in _CODES:
            asyncio.get_running_loop().add_signal_handler(number, self._came, number)

    async def wait(self) -> None:
        await self._asked.wait()

    def close(self) -> None:
        for number in _CODES:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _came(self, number: signal.Signals) -> None:
        if self._asked.is_set():
            os._exit(_CODES[number])  # whatever hangs, hangs no more; the store is made to bear this
        self._asked.set()
