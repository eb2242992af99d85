"""A node whose agent starts a stand-in for vLLM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from hetis.runtime.agent.launched.executor import LaunchExecutor
from hetis.v1.executor_service_pb2 import (
    ApplyAssignmentRequest,
    WatchReportsResponse,
)
from hetis.v1.report_pb2 import AssignmentState, ReplicaReport
from tests.runtime.agent.launched.assigning import (
    NODE,
    REPLICA,
    asked,
    control,
    fake_settings,
    lives,
)

LIMIT_S = 120.0  # on a busy machine
OTHER = "clusters/c/replicas/p-1"


def state(name: str) -> AssignmentState.ValueType:
    return AssignmentState.Value(f"ASSIGNMENT_STATE_{name}")


class Node:
    """An executor of fake engines, and its reports."""

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.monotonic, *, name: str = NODE, **settings: Any
    ) -> None:
        self.folder = folder
        self.settings = fake_settings(folder, **settings)
        self.executor = LaunchExecutor(self.settings, node=name, folder=folder / "engines", clock=clock)

    async def report(self) -> WatchReportsResponse:
        """Return the current report."""
        return await self.until(lambda _: True)

    async def apply(self, request: ApplyAssignmentRequest) -> str:
        answer = await self.executor.call(request)
        return AssignmentState.Name(answer.state).removeprefix("ASSIGNMENT_STATE_")

    async def until(self, holds: Callable[[WatchReportsResponse], bool]) -> WatchReportsResponse:
        """Return the first report for which ``holds`` is true."""
        last = None
        try:
            async with asyncio.timeout(LIMIT_S), aclosing(self.executor.watch_reports(0.01)) as reports:  # type: ignore[type-var]
                async for report in reports:
                    last = report
                    if holds(report):
                        return report
        except TimeoutError:
            pass
        raise AssertionError(f"waited in vain; last report {last}; lives {lives(self.folder)}")

    async def until_state(self, name: str, replica: str = REPLICA) -> ReplicaReport:
        """Return the first report of a replica in a state."""

        def found(report: WatchReportsResponse) -> list[ReplicaReport]:
            return [one for one in report.replicas if (one.replica, one.assignment_state) == (replica, state(name))]

        return found(await self.until(lambda report: bool(found(report))))[0]

    async def until_lives(self, *expected: str) -> None:
        await wait_until(
            lambda: lives(self.folder) == list(expected), lambda: f"{lives(self.folder)} are not {expected}"
        )

    async def until_asked(self, running: int) -> None:
        """Wait until the engine's metrics reported this many running requests twice more; one may predate the call."""
        before = len(asked(self.folder))
        await wait_until(lambda: asked(self.folder)[before:].count(str(running)) >= 2, lambda: "nobody asks")

    def sessions(self) -> list[int]:
        """Return the leaders of the recorded sessions."""
        return sorted(int(file.name) for file in (self.folder / "engines" / "sessions").glob("*"))


async def wait_until(holds: Callable[[], bool], what: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline_s, what()
        await asyncio.sleep(0.02)


@asynccontextmanager
async def node_in(folder: Path, **settings: Any) -> AsyncIterator[Node]:
    node = Node(folder, **settings)
    try:
        yield node
    finally:
        control(folder)
        await node.executor.close()


def run(story: Awaitable[None]) -> None:
    async def whole() -> None:
        await story

    asyncio.run(whole())
