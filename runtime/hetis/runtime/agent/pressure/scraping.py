"""One GET of an engine's ``/metrics``: always a result, never an exception, and never more bytes than permitted."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from enum import StrEnum
from http.client import HTTPMessage
from typing import IO

from hetis.formats.answers import metrics_body, reason_of
from hetis.runtime.agent.pressure.reading import EngineReading
from hetis.runtime.agent.pressure.samples import UnreadableMetricsError, parse_samples
from hetis.runtime.agent.pressure.sglang import PREFIX as SGLANG
from hetis.runtime.agent.pressure.sglang import read_sglang
from hetis.runtime.agent.pressure.vllm import PREFIX as VLLM
from hetis.runtime.agent.pressure.vllm import read_vllm

MAX_BYTES = 4 * 2**20  # a busy engine with many models and buckets sends some hundred KiB


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
        samples = parse_samples(_known_prefixes(text))
    except UnreadableMetricsError as error:
        return Scrape(state=ScrapeState.UNREADABLE, message=f"{name}: {error}")
    readings = (*read_vllm(samples.beginning(VLLM)), *read_sglang(samples.beginning(SGLANG)))
    if not readings:
        return Scrape(state=ScrapeState.NO_ENGINE, message=f"{name}: no metric begins with {VLLM} or {SGLANG}")
    return Scrape(state=ScrapeState.READ, readings=readings)


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
