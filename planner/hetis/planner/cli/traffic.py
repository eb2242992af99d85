"""The traffic of servers that run: by ``/metrics`` of vLLM or SGLang, or by a Prometheus that has kept these."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlsplit

from hetis.commands.endpoints import Opened, metrics_body, reason_of
from hetis.formats.errors import DocumentError, single_problem
from hetis.formats.fields import listed, mapping
from hetis.formats.traces.rates import HISTOGRAMS, Measured, of_histograms, of_metrics

WINDOW = "7d"
_WINDOW = re.compile(r"[1-9]\d{0,5}[smhdwy]")
_TIMEOUT_S, _MOST_BYTES = 60.0, 64 * 2**20


def traffic_of(
    url: str, *, window: str = WINDOW, opened: Opened = urllib.request.urlopen, now_s: Callable[[], float] = time.time
) -> Measured:
    """Return the workload that a server has measured: a Prometheus over ``window``, an engine since its start.

    Raises DocumentError if it does not answer, is neither, or has measured no requests.
    """
    if not _WINDOW.fullmatch(window):
        raise single_problem("--window", f"is {window[:40]!r}, must be a duration of Prometheus such as 7d or 12h")
    name = re.sub(r"[^\w.-]", "-", urlsplit(url).netloc) or "traffic"
    if urlsplit(url).path.endswith("/metrics"):
        return of_metrics(url, _text(url, opened), name=name, at_s=now_s())
    base = url.rstrip("/").removesuffix("/api/v1/query").removesuffix("/api/v1")

    def ask(query: str) -> list[dict[str, Any]]:
        return _answer(f"{base}/api/v1/query?query={quote(query)}", opened)

    try:
        ask("vector(1)")
    except DocumentError:  # no Prometheus
        return of_metrics(url, _text(f"{base}/metrics", opened), name=name, at_s=now_s())
    for pair in HISTOGRAMS:
        found = [_histogram(ask, metric, window) for metric in pair]
        if not all(buckets for buckets, _ in found):
            continue
        rate, peak = (
            _value(ask(f"{of}_over_time(sum(rate({pair[0]}_count[1h]))[{window}:1h])")) for of in ("avg", "max")
        )
        notes = [f"the rate is the mean of the last {window}"]
        notes += [f"the hour of most requests has {peak:.3g}/s"] if peak else []
        form = f"Prometheus, {pair[0].partition(':')[0]}"
        return of_histograms(url, found, name=name, form=form, rate_rps=rate, notes=notes)
    wanted = " nor ".join(f"{prompts}_bucket" for prompts, _ in HISTOGRAMS)
    raise single_problem(url, f"has measured no requests in the last {window}: neither {wanted} has increased")


def _histogram(
    ask: Callable[[str], list[dict[str, Any]]], metric: str, window: str
) -> tuple[dict[float, float], float | None]:  # fmt: skip
    rows = ask(f"sum by (le) (increase({metric}_bucket[{window}]))")
    buckets = {float(mapping(row.get("metric")).get("le", "inf")): _value([row]) or 0.0 for row in rows}
    if not any(buckets.values()):
        return {}, None
    # Extrapolated increases may fall by a little from one bound to the next.
    most, rising = 0.0, dict[float, float]()
    for bound, count in sorted(buckets.items()):
        most = max(most, count)
        rising[bound] = most
    return rising, _value(ask(f"sum(increase({metric}_sum[{window}]))"))


def _value(rows: list[dict[str, Any]]) -> float | None:
    """Return the number of the first row, or None if there is none."""
    value = listed(rows[0].get("value")) if rows else []
    try:
        found = float(value[1])
    except (IndexError, TypeError, ValueError):
        return None
    return found if 0 <= found < 1e18 else None


def _answer(url: str, opened: Opened) -> list[dict[str, Any]]:
    try:
        answer = mapping(json.loads(_text(url, opened)))
    except ValueError:
        answer = {}
    if answer.get("status") != "success":
        raise single_problem(url, f"is no answer of Prometheus: {str(answer.get('error', ''))[:200]}")
    return [mapping(row) for row in listed(mapping(answer.get("data")).get("result"))]


def _text(url: str, opened: Opened) -> str:
    try:
        body = metrics_body(url, timeout_s=_TIMEOUT_S, max_bytes=_MOST_BYTES, opened=opened)
    except Exception as error:  # OSError, ValueError and HTTPException of the library
        raise single_problem(url, f"does not answer: {reason_of(error)}") from None
    if body is None:
        raise single_problem(url, f"answers with more than {_MOST_BYTES // 2**20} MiB")
    return body.decode("utf-8", "replace")
