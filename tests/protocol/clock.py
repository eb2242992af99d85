"""An event loop whose time advances only when no work is left, so that minutes take milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
START_S = 1000.0
UNIX_S = 1.7e9  # Unix time at 0 of the loop's clock
AT_ONCE_S = 1e-6  # waiting this long runs all work that takes no time


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs the work of threads immediately, inline, so that nothing depends on the machine's load.

    Attributes:
        failures: failures of tasks that were never awaited.
    """

    def __init__(self) -> None:
        self._now_s = START_S
        self.failures: list[str] = []
        super().__init__(_Leap(self))
        self.set_exception_handler(self._note)

    def time(self) -> float:
        return self._now_s

    def leap(self, seconds: float) -> None:
        self._now_s += seconds

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        answer: asyncio.Future[T] = self.create_future()
        try:
            answer.set_result(func(*args))
        except Exception as error:
            answer.set_exception(error)
        return answer

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.run_until_complete(work)

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass, and run everything due in them."""
        self.run_until_complete(asyncio.sleep(seconds))

    def end(self) -> None:
        """Cancel the remaining tasks, and close the loop."""
        left = asyncio.all_tasks(self)
        for task in left:
            task.cancel()
        if left:
            self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self.run_until_complete(self.shutdown_asyncgens())
        self.close()

    def _note(self, _: Any, context: dict[str, Any]) -> None:
        self.failures.append(f"{context['message']}: {context.get('exception')!r}")


class VirtualClock:
    """The clock of the fleet and the daemons."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.time()

    def time(self) -> float:
        return UNIX_S + self._loop.time()


class _Leap(selectors.DefaultSelector):
    """A selector that moves the clock instead of waiting."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("everybody waits for somebody else")
        if timeout > 0:
            self._loop.leap(timeout)
        return []
