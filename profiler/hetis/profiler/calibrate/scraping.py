"""``/metrics`` of a running vLLM, read every few seconds: counters and gauges of each of its engines."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

from hetis.formats.endpoints import metrics_body, reason_of
from hetis.formats.errors import single_problem
from hetis.solver.errors import HetisError

TIMEOUT_S = 10.0  # for a whole answer
MAX_BYTES = 16 * 2**20  # a busy server with many adapters and buckets sends some MiB
_MOST = 1e18  # of any value; what is more has lost its precision, or is no number

# Collectors that refuse colons write `vllm_`. Buckets are most of the lines, and not needed.
_SAMPLE = re.compile(r"^vllm[:_]([a-zA-Z0-9_]{1,100})(?:\{(.*)\})?[ \t]+([0-9.eE+-]{1,40})(?:[ \t]|$)")
_LABEL = re.compile(r'(\w{1,100})="((?:[^"\\]|\\.)*)"')


class UnreachableError(HetisError):
    """A server did not answer, or not as an HTTP server does; a later call may find it."""


@dataclass(slots=True)
class EngineState:
    """Metrics of one engine of the server: values by name without ``vllm:``, and its cache's settings."""

    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cache: Mapping[str, str] = field(default_factory=dict)


Scrape = tuple[float, dict[str, EngineState]]  # when, and the engines by their label


def watch(
    url: str, *, for_s: float, every_s: float, fetch: Callable[[str], str] | None = None,
    clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
) -> list[Scrape]:  # fmt: skip
    """Return scrapes of ``url`` over ``for_s`` seconds. Only the first one must succeed.

    Args:
        url: of the server; its path is ``/metrics`` if it has none.
        for_s: from the first scrape to the last.
        every_s: from one scrape to the next.
        fetch, clock, sleep: replaced by tests.

    Raises:
        UnreachableError: no answer to the first call.
        DocumentError: that is no URL, or no vLLM answers there.
    """
    address, fetch = metrics_address(url), fetch or fetch_text
    found = [(clock(), engines_in(fetch(address), address))]
    for number in range(1, max(1, round(for_s / every_s)) + 1):
        sleep(max(0.0, found[0][0] + number * every_s - clock()))
        try:
            found.append((clock(), engines_in(fetch(address), address)))
        except HetisError:  # a restart, or a moment without an answer, only lengthens an interval
            continue
    return found


def metrics_address(url: str) -> str:
    """Return the URL with a path. Raises DocumentError if it is no http or https URL."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or (parts.port or 1) < 1:
            raise ValueError("expected http://HOST:PORT or https://HOST:PORT")
    except ValueError as error:
        raise single_problem(url[:200], f"is no URL of a server: {error}") from None
    return urlunsplit(parts._replace(path="/metrics" if parts.path in ("", "/") else parts.path, fragment=""))


def engines_in(text: str, name: str) -> dict[str, EngineState]:
    """Return the engines in what ``/metrics`` answers, by their label. Raises DocumentError if no metric is vLLM's."""
    found = defaultdict[str, EngineState](EngineState)
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None or sample[1].endswith("_bucket"):
            continue
        try:
            value = float(sample[3])
        except ValueError:
            continue
        if not abs(value) < _MOST:
            continue
        labels = dict(_LABEL.findall(sample[2] or ""))
        engine = found[labels.get("engine", "")]
        engine.values[sample[1]] += value
        if sample[1] == "cache_config_info":
            engine.cache = labels
    engines = {label: one for label, one in found.items() if "generation_tokens_total" in one.values}
    if not engines:  # some metrics are of the server as a whole
        raise single_problem(name, "answers without a metric of vLLM (vllm:...): is that the server, and its /metrics?")
    return engines


def fetch_text(url: str) -> str:
    """Return the body of an answer, within a time and a size.

    Raises:
        UnreachableError: there is none.
        DocumentError: it is too large.
    """
    try:
        body = metrics_body(url, timeout_s=TIMEOUT_S, max_bytes=MAX_BYTES, opened=urllib.request.urlopen)
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            raise UnreachableError(f"{url}: no answer: {error}"[:400]) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnreachableError(f"{url}: no answer: {reason_of(error)}"[:400]) from None
    if body is None:
        raise single_problem(url, f"answers with more than {MAX_BYTES // 2**20} MiB")
    return body.decode("utf-8", errors="replace")
