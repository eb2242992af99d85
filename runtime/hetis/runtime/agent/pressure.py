"""Memory pressure of engines that hetis does not steer: vLLM's and SGLang's ``/metrics``, read and reported.

Readings are in hetis' terms: counts since the engine started, blocks in its own unit. The newest name of each quantity
comes first. vLLM, from version 0.6 to 0.32: ``kv_cache_usage_perc`` is a share from 0 to 1 despite its name, and counts
blocks that requests hold. Unused cached prefixes are free blocks to vLLM, so it reports no evictable blocks. SGLang
(``--enable-metrics``), from version 0.4 to today: its unit of KV is the token. ``token_usage`` is that of the fullest
pool and leaves evictable prefixes out. ``kv_used_tokens`` includes them in some versions, so used is computed as total
less available less evictable.

HetisError (hetis.solver.errors)
+-- UnreadableMetricsError   the text is not Prometheus exposition format
"""

from __future__ import annotations

import asyncio
import http.client
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from http.client import HTTPMessage
from typing import IO, TYPE_CHECKING

from hetis.commands.endpoints import metrics_body, reason_of
from hetis.runtime.moves.refusals import unreachable
from hetis.solver.errors import HetisError, InvalidProblemError
from hetis.solver.traffic import SCALES, Histogram, Scale, TrafficSketch
from hetis.v1 import report_pb2, traffic_pb2

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

VLLM, SGLANG = "vllm:", "sglang:"  # prefixes of their metrics
_WITHOUT_COLON = re.compile(r"^(# (?:TYPE|HELP) )?(vllm|sglang)_", re.MULTILINE)
_CAPACITY = "capacity"
FULL_RATIO = 0.9  # share of KV held by requests above which waiting requests are assumed to wait for KV
_SAME_REQUESTS = frozenset({"tp_rank", "pp_rank", "moe_ep_rank", "pid"})  # SGLang's ranks that report the same requests
_MOST = 2**32 - 1  # maximum of a uint32 field: an engine that reports more is broken, and must not break the report
MAX_BYTES = 4 * 2**20  # a busy engine with many models and buckets sends several hundred KiB


class UnreadableMetricsError(HetisError):
    """The answer is not in the Prometheus exposition format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReading:
    """One scrape of one model. None means that the engine does not report the value."""

    model: str  # name that the model is served under
    # num_running, num_waiting: requests now
    num_running: int | None = None
    num_waiting: int | None = None
    num_waiting_for_kv: int | None = None  # waiting requests that wait for KV blocks
    total_blocks: int | None = None  # KV blocks in total, in the engine's unit (SGLang: tokens)
    used_blocks: int | None = None  # blocks that are not evictable, that is, held by requests
    evictable_blocks: int | None = None  # blocks that hold only cached prefixes
    # Share of KV held by requests, from 0 to 1; may be reported even if block counts are not
    kv_use_ratio: float | None = None
    # num_preempted, num_finished, num_steps: since the engine started
    num_preempted: int | None = None
    num_finished: int | None = None
    num_steps: int | None = None
    # Requests since the engine started. What the engine does not report is 0; ``seconds`` is for `EngineNews` to set
    traffic: TrafficSketch = field(default_factory=TrafficSketch)

    @property
    def waiting_for_kv(self) -> int:
        """The requests that wait for blocks. If the engine does not report them, all that wait count while requests
        hold almost all KV: an engine with a prefix cache is always full, so evictable blocks do not count as held.
        """
        if self.num_waiting_for_kv is not None:
            return self.num_waiting_for_kv
        return (self.num_waiting or 0) if (self.kv_use_ratio or 0.0) > FULL_RATIO else 0


def read_metrics(text: str) -> list[EngineReading]:
    """Return one reading per model that either engine serves; its data-parallel ranks are combined. Raises
    UnreadableMetricsError if the text is malformed somewhere, so nothing in it can be trusted.
    """
    samples = list(_finite_samples(text))
    ours, theirs = (_by_model(one for one in samples if one.name.startswith(prefix)) for prefix in (VLLM, SGLANG))
    # In some versions vLLM's configuration has no model name, and there is only one model.
    nameless = _Samples(ours.pop("", ()))
    theirs.pop("", None)
    readings = [_read_vllm(model, _Samples(of_model), nameless) for model, of_model in ours.items()]
    same = _SAME_REQUESTS
    return readings + [_read_sglang(model, _Samples(own, same=same)) for model, own in theirs.items()]


def _read_vllm(model: str, samples: _Samples, nameless: _Samples) -> EngineReading:
    usage = samples.of("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
    # The mean, because the engines of one model have equally many blocks.
    ratio = _share(sum(sample.value for sample in usage) / len(usage)) if usage else None
    configuration = samples.of("vllm:cache_config_info") or nameless.of("vllm:cache_config_info")
    total_blocks = sum(_whole(sample.labels.get("num_gpu_blocks", "")) for sample in configuration) or None
    by_reason = samples.of("vllm:num_requests_waiting_by_reason")
    for_kv = [sample for sample in by_reason if sample.labels.get("reason") == _CAPACITY]
    return EngineReading(
        model=model,
        num_running=samples.count("vllm:num_requests_running"),
        num_waiting=samples.count("vllm:num_requests_waiting", "vllm:num_requests_waiting_by_reason"),
        num_waiting_for_kv=round(sum(sample.value for sample in for_kv)) if for_kv else None,
        total_blocks=total_blocks,
        used_blocks=None if ratio is None or total_blocks is None else round(ratio * total_blocks),
        kv_use_ratio=ratio,
        num_preempted=samples.count("vllm:num_preemptions_total"),
        num_finished=samples.count("vllm:request_success_total"),
        num_steps=samples.count("vllm:iteration_tokens_total_count"),
        traffic=_traffic(
            samples,
            of_requests=("vllm:request_success_total", "vllm:num_requests_running", "vllm:num_requests_waiting"),
            cached=("vllm:prompt_tokens_cached_total", "vllm:prefix_cache_hits_total"),
            prompt_tokens=("vllm:request_prompt_tokens",),
            output_tokens=("vllm:request_generation_tokens",),
            ttft_s=("vllm:time_to_first_token_seconds",),
            tpot_s=(
                "vllm:inter_token_latency_seconds",
                "vllm:time_per_output_token_seconds",
                "vllm:request_time_per_output_token_seconds",
            ),
            wait_s=("vllm:request_queue_time_seconds",),
        ),
    )


def _read_sglang(model: str, samples: _Samples) -> EngineReading:
    total, evictable = samples.count("sglang:max_total_num_tokens"), samples.count("sglang:kv_evictable_tokens")
    # The fullest pool of the fullest rank: if one is full, requests wait.
    names = ("sglang:token_usage", "sglang:full_token_usage", "sglang:swa_token_usage")
    pools = [sample.value for name in names for sample in samples.of(name)]
    ratio = _share(max(pools)) if pools else None
    available = samples.count("sglang:kv_available_tokens")
    used = samples.count("sglang:kv_used_tokens", "sglang:num_used_tokens")
    if total is not None and available is not None and evictable is not None:
        used = max(total - available - evictable, 0)
    if total is not None and ratio is not None:
        used = max(used or 0, round(ratio * total))  # a pool other than the counted one may be fuller
    elif total and used is not None:
        ratio = min(used / total, 1.0)
    return EngineReading(
        model=model,
        num_running=samples.count("sglang:num_running_reqs"),
        num_waiting=samples.count("sglang:num_queue_reqs"),
        total_blocks=total,
        used_blocks=used,
        evictable_blocks=evictable,
        kv_use_ratio=ratio,
        num_preempted=samples.count("sglang:num_retracted_requests_total"),
        num_finished=samples.count("sglang:num_requests_total"),
        traffic=_traffic(
            samples,
            of_requests=("sglang:num_requests_total", "sglang:num_running_reqs", "sglang:num_queue_reqs"),
            cached=("sglang:cached_tokens_total",),
            prompt_tokens=("sglang:prompt_tokens_histogram",),
            output_tokens=("sglang:generation_tokens_histogram",),
            ttft_s=("sglang:time_to_first_token_seconds",),
            tpot_s=("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
            wait_s=("sglang:queue_time_seconds",),
        ),
    )


def _traffic(
    samples: _Samples, *, of_requests: tuple[str, ...], cached: tuple[str, ...], **histograms: tuple[str, ...]
) -> TrafficSketch:
    """Return an engine's traffic; none if its numbers cannot be. Arrivals are requests that ended, run or wait."""
    numbers = {
        "arrivals": sum(samples.count(name) or 0 for name in of_requests) if samples.of(of_requests[0]) else 0,
        "cached_tokens": samples.count(*cached) or 0,
    }
    try:
        found = {name: samples.histogram(SCALES[name], *names) for name, names in histograms.items()}
        return TrafficSketch(**numbers, **found)  # type: ignore[arg-type]
    except InvalidProblemError:
        return TrafficSketch()


class _Samples:
    """The samples of one model. Ranks that differ only in labels of ``same`` report the same requests."""

    def __init__(self, samples: Iterable[Sample], *, same: Collection[str] = ()) -> None:
        self._same = same
        self._by_name: dict[str, list[Sample]] = {}
        for sample in samples:
            self._by_name.setdefault(sample.name, []).append(sample)

    def of(self, *names: str) -> list[Sample]:
        """Return the samples of the first of these names that has any, or nothing. Newer names come first."""
        return next((self._by_name[name] for name in names if name in self._by_name), [])

    def count(self, *names: str) -> int | None:
        """Return the sum over data-parallel ranks of the first name that has any samples."""
        found = self.of(*names)
        return round(self._summed(found)) if found else None

    def histogram(self, scale: Scale, *names: str) -> Histogram:
        """Return the first of these histograms that has a sum and a count; an empty one if none has."""
        for name in names:
            sums, counts = self.of(f"{name}_sum"), self.of(f"{name}_count")
            if sums and counts:
                bounds: dict[float, list[Sample]] = {}
                for sample in self.of(f"{name}_bucket"):
                    bounds.setdefault(float(sample.labels.get("le", "inf")), []).append(sample)
                buckets = {bound: self._summed(found) for bound, found in bounds.items() if not math.isnan(bound)}
                return Histogram.of_buckets(scale, buckets | {math.inf: self._summed(counts)}, self._summed(sums))
        return Histogram(scale=scale)

    def _summed(self, samples: list[Sample]) -> float:
        per_rank: dict[frozenset[tuple[str, str]], float] = {}
        for sample in samples:
            own = frozenset((name, text) for name, text in sample.labels.items() if name not in self._same)
            per_rank[own] = max(per_rank.get(own, sample.value), sample.value)
        return sum(per_rank.values())


def _by_model(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Return the samples of each model, in the order of the names; those without a model are under an empty one."""
    found: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.labels.get("model_name", "")):
        found.setdefault(sample.labels.get("model_name", ""), []).append(sample)
    return found


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _whole(text: str) -> int:
    """Return the blocks of an info label, which is ``None`` until the engine has measured its memory."""
    return int(text) if text.isdecimal() and len(text) < 19 else 0


def _finite_samples(text: str) -> Iterator[Sample]:
    """Yield one sample per line: counters end in ``_total``, means come as _sum and _count."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        for family in text_string_to_metric_families(text):
            yield from (sample for sample in family.samples if math.isfinite(sample.value))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # raised by the parser on bad text
        raise UnreadableMetricsError(f"not Prometheus text: {error}"[:300]) from None


def replica_report(
    replica: str, reading: EngineReading, *, earlier: EngineReading | None = None
) -> report_pb2.ReplicaReport:
    """Return the report of a replica whose engine hetis does not steer. Means cover the time since ``earlier``."""
    recent = reading.traffic.since(earlier.traffic if earlier else TrafficSketch())
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
        ttft_s=recent.ttft_s.mean,
        tpot_s=recent.tpot_s.mean,
        traffic=traffic_pb2.Traffic(**reading.traffic.packed()),
    )


def unreachable_report(replica: str, message: str) -> report_pb2.ReplicaReport:
    """Return the report of a replica whose engine does not answer, or whose answer is not metrics."""
    state, failure = report_pb2.ASSIGNMENT_STATE_UNMANAGED, unreachable(message)
    return report_pb2.ReplicaReport(replica=replica, assignment_state=state, is_primary=True, failure=failure)


def device_reports(readings: Iterable[EngineReading], devices: Iterable[int]) -> list[report_pb2.DeviceReport]:
    """Return the KV of every device that the engines run on. Each device counts the blocks of all engines together.

    Only the KV fields are set; `Devices.sample` fills in the rest. ``readings``: one for every model that is served on
    these devices; ``devices``: indices on the node.
    """
    counts = [(one.total_blocks, one.used_blocks, one.evictable_blocks) for one in readings] or [(0, 0, 0)]
    total, used, evictable = (sum(map(_count, column)) for column in zip(*counts, strict=True))
    return [
        report_pb2.DeviceReport(index=i, total_blocks=total, used_blocks=used, evictable_blocks=evictable)
        for i in devices
    ]


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
    """Fetch and read metrics. Blocks for at most four times ``timeout_s``, unless the engine trickles its header."""
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
        # SGLang and collectors that refuse colons write ``sglang_`` and ``vllm_``.
        readings = read_metrics(_WITHOUT_COLON.sub(r"\1\2:", "\n".join(text.splitlines()) + "\n"))
    except UnreadableMetricsError as error:
        return Scrape(state=ScrapeState.UNREADABLE, message=f"{name}: {error}")
    if not readings:
        return Scrape(state=ScrapeState.NO_ENGINE, message=f"{name}: no metric begins with {VLLM} or {SGLANG}")
    return Scrape(state=ScrapeState.READ, readings=tuple(readings))


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
            raise urllib.error.URLError(f"it redirects to another server, {newurl[:100]!r}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


# No proxy, because the engine is on this node.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), _SameServer())


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineNews:
    """The latest readings of an engine; none at first."""

    # Outcome of the last scrape. The readings are those of the last scrape that succeeded.
    state: ScrapeState = ScrapeState.UNREACHABLE
    # Readings by model, in the order of the names. Empty: no scrape has succeeded yet.
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
        readings = {one.model: replace(one, traffic=replace(one.traffic, seconds=now_s)) for one in taken.readings}
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
    """Yield news after every scrape of ``url``, including failed ones, until the caller stops.

    Scrapes start every ``interval_s``. One that takes longer delays the next, so a slow engine is never scraped twice
    at once. ``clock``, ``sleep`` and ``take``, which stands for the GET, are replaced in tests.
    """

    async def get() -> Scrape:
        return await asyncio.to_thread(scrape, url, timeout_s=timeout_s)

    news = EngineNews()
    while True:
        begun_s = clock()
        news = news.after(await (take or get)(), begun_s)
        yield news
        await sleep(max(interval_s - (clock() - begun_s), 0.0))
