"""An event loop whose time passes only when nothing is left to do, so that minutes take milliseconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
START_S = 1000.0
UNIX_S = 1.7e9  # Unix time of the moment 0 of the loop's clock
AT_ONCE_S = 1e-6  # waiting so long lets everything happen that needs no time


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs what would go to threads at once, in line: nothing depends on how busy the machine is.

    Attributes:
        failures: of tasks that nobody waited for.
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
        """Lets ``seconds`` pass, and everything happen in them."""
        self.run_until_complete(asyncio.sleep(seconds))

    def end(self) -> None:
        """Cancels what is left, and closes."""
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
