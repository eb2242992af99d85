"""Memory pressure of engines that hetis does not steer: vLLM's and SGLang's ``/metrics``, read, judged and reported."""

from __future__ import annotations

from hetis.runtime.agent.pressure.judging import Pressure, PressureLimits, judge
from hetis.runtime.agent.pressure.reading import EngineReading
from hetis.runtime.agent.pressure.reports import device_reports, replica_report
from hetis.runtime.agent.pressure.scraping import Scrape, ScrapeState, scrape
from hetis.runtime.agent.pressure.watching import EngineNews, watch_engine

__all__ = [
    "EngineNews",
    "EngineReading",
    "Pressure",
    "PressureLimits",
    "Scrape",
    "ScrapeState",
    "device_reports",
    "judge",
    "replica_report",
    "scrape",
    "watch_engine",
]
