"""Memory pressure of engines that hetis does not steer: vLLM's and SGLang's ``/metrics``, read and reported."""

from __future__ import annotations

import asyncio
import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from http.client import HTTPMessage
from typing import IO

from hetis.formats.endpoints import metrics_body, reason_of
from hetis.runtime.agent.pressure.readings import SGLANG, VLLM, EngineReading, UnreadableMetricsError, read_metrics
from hetis.runtime.moves.refusals import unreachable
from hetis.v1 import report_pb2

_MOST = 2**32 - 1  # of a uint32 field: an engine that reports more is broken, and must not break the report
MAX_BYTES = 4 * 2**20  # a busy engine with many models and buckets sends some hundred KiB


def replica_report(
    replica: str, reading: EngineReading, *, earlier: EngineReading | None = None
) -> report_pb2.ReplicaReport:
    """Return the report of a replica whose engine hetis does not steer. Means cover the time since ``earlier``."""
    return report_pb2.ReplicaReport(
        replica=replica,
        assignment_state=report_pb2.ASSIGNMENT_STATE_UNMANAGED,
        is_primary=True,
        num_running=_count(reading.num_running, _MOST),
        num_waiting=_count(reading.num_waiting, _MOST),
        num_waiting_for_kv=_count(reading.waiting_for_kv, _MOST),
        num_preempted=_count(reading.num_preempted),
        num_steps=_count(reading.num_steps),
        num_finished=_count(reading.num_finished),
        ttft_s=reading.ttft_s.mean_since(earlier.ttft_s if earlier else None) if reading.ttft_s else 0.0,
        tpot_s=reading.tpot_s.mean_since(earlier.tpot_s if earlier else None) if reading.tpot_s else 0.0,
    )


def unreachable_report(replica: str, message: str) -> report_pb2.ReplicaReport:
    """Return the report of a replica whose engine does not answer, or whose answer is not metrics."""
    state, failure = report_pb2.ASSIGNMENT_STATE_UNMANAGED, unreachable(message)
    return report_pb2.ReplicaReport(replica=replica, assignment_state=state, is_primary=True, failure=failure)


def device_reports(readings: Iterable[EngineReading], devices: Iterable[int]) -> list[report_pb2.DeviceReport]:
    """Return the KV of every device that the engines run on. Each device counts the blocks of all engines together.

    Only the KV fields are set; `Devices.sample` knows the rest. ``readings``: one for every model that is served on
    these devices; ``devices``: indices on the node.
    """
    counts = [(one.total_blocks, one.used_blocks, one.evictable_blocks) for one in readings] or [(0, 0, 0)]
    total, used, evictable = (sum(map(_count, column)) for column in zip(*counts, strict=True))
    reports = report_pb2.DeviceReport
    return [reports(index=i, total_blocks=total, used_blocks=used, evictable_blocks=evictable) for i in devices]


def _count(value: int | None, most: int = 2**64 - 1) -> int:
    return min(max(value or 0, 0), most)


class ScrapeState(StrEnum):
    """The outcome of a scrape."""

    READ = "read"
    UNREACHABLE = "unreachable"  # no answer in time, or an error status
    TOO_LARGE = "too large"
    UNREADABLE = "unreadable"  # the answer is not Prometheus text
    NO_ENGINE = "no engine"  # metrics of neither engine: wrong port, or SGLang without --enable-metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """The result of one scrape: readings in the order of their models, or the reason why there are none."""

    state: ScrapeState
    readings: tuple[EngineReading, ...] = ()
    message: str = ""


def scrape(url: str, *, timeout_s: float, max_bytes: int = MAX_BYTES) -> Scrape:
    """Fetch and read metrics. Blocks for at most four times ``timeout_s``, unless the engine drips its header."""
    try:
        body = _fetch(url, timeout_s, max_bytes)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Scrape(state=ScrapeState.UNREACHABLE, message=f"{url}: {reason_of(error)}"[:300])
    if body is None:
        return Scrape(state=ScrapeState.TOO_LARGE, message=f"{url}: the answer is larger than {max_bytes} bytes")
    return read_text(body.decode("utf-8", errors="replace"), name=url)


def read_text(text: str, *, name: str) -> Scrape:
    """Read the text that an engine sent. ``name`` is its source, for messages."""
    try:
        readings = read_metrics(_known_prefixes(text))
    except UnreadableMetricsError as error:
        return Scrape(state=ScrapeState.UNREADABLE, message=f"{name}: {error}")
    if not readings:
        return Scrape(state=ScrapeState.NO_ENGINE, message=f"{name}: no metric begins with {VLLM} or {SGLANG}")
    return Scrape(state=ScrapeState.READ, readings=tuple(readings))


def _known_prefixes(text: str) -> str:
    """Restore the prefixes' colons: SGLang and collectors that refuse colons write ``sglang_`` and ``vllm_``."""
    lines = []
    for line in text.splitlines():
        for known in (VLLM, SGLANG):
            other = known.replace(":", "_")
            if line.startswith(other):
                line = known + line.removeprefix(other)
            elif line.startswith((f"# TYPE {other}", f"# HELP {other}")):
                line = line.replace(other, known, 1)
        lines.append(line)
    return "\n".join(lines) + "\n"


def _fetch(url: str, timeout_s: float, max_bytes: int) -> bytes | None:
    """Return the body, or None if it is larger than ``max_bytes``."""
    if not url.startswith(("http://", "https://")):
        raise ValueError("not an http or https address")
    return metrics_body(url, timeout_s=timeout_s, max_bytes=max_bytes, opened=_OPENER.open)


class _SameServer(urllib.request.HTTPRedirectHandler):
    """Follow a redirect to another path (vLLM's is ``/metrics/``), once, and never to another server."""

    max_redirections = 1

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if newurl.partition("://")[0] != req.type or urllib.parse.urlsplit(newurl).netloc != req.host:
            raise urllib.error.URLError(f"it sends us to another server, {newurl[:100]!r}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


# No proxy, because the engine is on this node.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _SameServer())


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNews:
    """The latest knowledge about an engine; nothing at first."""

    # Outcome of the last scrape. The readings are those of the last scrape that succeeded.
    state: ScrapeState = ScrapeState.UNREACHABLE
    # By model, in the order of their names. Empty: no scrape has succeeded yet.
    readings: Mapping[str, EngineReading] = field(default_factory=dict)
    # Readings of the scrape before those, by model
    earlier: Mapping[str, EngineReading] = field(default_factory=dict)
    taken_s: float = 0.0  # when the readings were taken, in seconds of the given clock. 0: never.
    message: str = ""  # why the last scrape failed. Empty: it did not.

    def age_s(self, now_s: float) -> float:
        """Return the age of the readings in seconds, or 0 if there are none."""
        return max(now_s - self.taken_s, 0.0) if self.readings else 0.0

    def after(self, taken: Scrape, now_s: float) -> EngineNews:
        """Return the news after one more scrape. A failed scrape keeps the readings, which grow older."""
        if taken.state is not ScrapeState.READ:
            return replace(self, state=taken.state, message=taken.message)
        readings = {reading.model: reading for reading in taken.readings}
        return EngineNews(
            state=ScrapeState.READ,
            readings=readings,
            earlier={model: reading for model, reading in self.readings.items() if model in readings},
            taken_s=now_s,
        )


async def watch_engine(
    url: str,
    *,
    interval_s: float,
    timeout_s: float = 2.0,
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
        clock, sleep: replaced in tests.
        take: replaces the GET in tests.
    """

    async def get() -> Scrape:
        return await asyncio.to_thread(scrape, url, timeout_s=timeout_s)

    news = EngineNews()
    while True:
        begun_s = clock()
        news = news.after(await (take or get)(), begun_s)
        yield news
        await sleep(max(interval_s - (clock() - begun_s), 0.0))
