"""Sources of the agent's reports on its engine: `ExecutorService`, or the metrics of vLLM and SGLang."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence

from hetis.runtime.agent.executor import Executor
from hetis.runtime.agent.pressure import EngineNews, device_reports, replica_report, watch_engine
from hetis.runtime.agent.pressure.reports import unreachable_report
from hetis.runtime.agent.replica_state import ReplicaState
from hetis.v1.executor_service_pb2 import WatchReportsResponse

LEAST_REPORT_S = 0.2  # between two reports from an engine with `ExecutorService`
SCRAPE_S = 2.0
Reports = Callable[[], AsyncIterator[WatchReportsResponse]]


def executor_reports(executor: Executor) -> Reports:
    """Return the reports of an engine that serves `ExecutorService`."""

    async def reports() -> AsyncIterator[WatchReportsResponse]:
        async for report in executor.watch_reports(LEAST_REPORT_S):
            yield report

    return reports


def scraped_reports(
    url: str,
    held: Callable[[], Sequence[ReplicaState]],
    num_devices: int,
    *,
    clock: Callable[[], float] = time.monotonic,
    told: Callable[[EngineNews, float], None] = lambda news, age_s: None,
) -> Reports:
    """Return reports made from an engine's metrics.

    Args:
        held: returns the replicas that are assigned to the node.
        num_devices: number of the node's devices; the engine is assumed to run on all of them.
        told: called after every scrape, for metrics.
    """

    async def reports() -> AsyncIterator[WatchReportsResponse]:
        async for news in watch_engine(url, interval_s=SCRAPE_S, clock=clock):
            told(news, news.age_s(clock()))
            yield report_of(news, held(), num_devices, engine_id=url)

    return reports


def report_of(
    news: EngineNews, held: Sequence[ReplicaState], num_devices: int, *, engine_id: str
) -> WatchReportsResponse:
    """Return one report. A model belongs to the replica whose model document names it, or to the only replica."""
    report = WatchReportsResponse(
        engine_id=engine_id, devices=device_reports(news.readings.values(), range(num_devices))
    )
    assigned = [entry for entry in held if entry.assignment is not None]
    for entry in assigned:
        model = _model_of(entry, news, alone=len(assigned) == 1)
        if news.message or model is None:
            why = news.message or "the engine serves no model of that name"
            report.replicas.append(unreachable_report(entry.replica, why))
        else:
            report.replicas.append(
                replica_report(
                    entry.replica,
                    news.readings[model],
                    earlier=news.earlier.get(model),
                    pressure=news.pressure.get(model),
                )
            )
    return report


def _model_of(entry: ReplicaState, news: EngineNews, *, alone: bool) -> str | None:
    assert entry.assignment is not None
    text = entry.assignment.model.content.decode(errors="replace")
    named = [model for model in news.readings if f'"{model}"' in text or f" {model}\n" in text]
    if named:
        return named[0]
    return next(iter(news.readings)) if alone and len(news.readings) == 1 else None
