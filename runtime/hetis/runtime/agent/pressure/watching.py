"""Watches an engine: one scrape per interval, each reading judged against the previous one and marked with its age."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from hetis.runtime.agent.pressure.judging import DEFAULT_LIMITS, Pressure, PressureLimits, judge
from hetis.runtime.agent.pressure.reading import EngineReading
from hetis.runtime.agent.pressure.scraping import Scrape, ScrapeState, scrape


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNews:
    """The latest knowledge about an engine.

    Attributes:
        state: outcome of the last scrape. The readings are those of the last scrape that succeeded.
        readings: by model, in the order of their names. Empty: no scrape has succeeded yet.
        earlier: readings of the scrape before those, by model.
        pressure: judgement of every reading, by model.
        taken_s: when the readings were taken, in seconds of the given clock. 0: never.
        message: why the last scrape failed. Empty: it did not.
    """

    state: ScrapeState
    readings: dict[str, EngineReading]
    earlier: dict[str, EngineReading]
    pressure: dict[str, Pressure]
    taken_s: float
    message: str = ""

    def age_s(self, now_s: float) -> float:
        """Return the age of the readings in seconds, or 0 if there are none."""
        return max(now_s - self.taken_s, 0.0) if self.readings else 0.0


async def watch_engine(
    url: str,
    *,
    interval_s: float,
    timeout_s: float = 2.0,
    limits: PressureLimits = DEFAULT_LIMITS,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    take: Callable[[], Awaitable[Scrape]] | None = None,
) -> AsyncIterator[EngineNews]:
    """Yield news after every scrape, including failed ones, until the caller stops.

    A scrape that takes longer than the interval delays the next one, so a slow engine is never scraped twice at once.

    Args:
        url: of the metrics, such as ``http://127.0.0.1:8000/metrics``.
        interval_s: from the start of one scrape to the start of the next.
        timeout_s: for one scrape.
        limits: above which there is pressure.
        clock, sleep: replaced in tests.
        take: replaces the GET in tests.
    """

    async def get() -> Scrape:
        return await asyncio.to_thread(scrape, url, timeout_s=timeout_s)

    news = EngineNews(state=ScrapeState.UNREACHABLE, readings={}, earlier={}, pressure={}, taken_s=0.0)
    while True:
        begun_s = clock()
        news = after(news, await (take or get)(), begun_s, limits)
        yield news
        await sleep(max(interval_s - (clock() - begun_s), 0.0))


def after(news: EngineNews, taken: Scrape, now_s: float, limits: PressureLimits) -> EngineNews:
    """Return the news after one more scrape. A failed scrape keeps the readings, which grow older."""
    if taken.state is not ScrapeState.READ:
        return EngineNews(
            state=taken.state,
            readings=news.readings,
            earlier=news.earlier,
            pressure=news.pressure,
            taken_s=news.taken_s,
            message=taken.message,
        )
    readings = {reading.model: reading for reading in taken.readings}
    elapsed_s = now_s - news.taken_s
    return EngineNews(
        state=ScrapeState.READ,
        readings=readings,
        earlier={model: reading for model, reading in news.readings.items() if model in readings},
        pressure={
            model: judge(reading, news.readings.get(model), elapsed_s, limits) for model, reading in readings.items()
        },
        taken_s=now_s,
    )
