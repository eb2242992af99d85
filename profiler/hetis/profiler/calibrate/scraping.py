"""Observations of the intervals between scrapes of a running vLLM's ``/metrics``, by engine.

An interval contains less than a log: the mean latency between tokens, which is the mean time of the iterations that
decode, and what they computed together. The number of first tokens separates iterations with a prompt from the others.
"""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from urllib.parse import urlsplit, urlunsplit

from hetis.commands.endpoints import metrics_body, reason_of
from hetis.formats.errors import single_problem
from hetis.profiler.calibrate.observed import Observation, Observed, ObservedKind, ObservedWork
from hetis.solver.errors import HetisError

TIMEOUT_S = 10.0  # time limit for a whole answer
MAX_BYTES = 16 * 2**20  # a busy server with many adapters and buckets sends several MiB
LEAST = 8
LEAST_TOKENS = 10  # minimum number of latencies in an interval for a mean
_MOST = 1e18  # limit of any value; larger ones have lost their precision, or are not numbers

# Collectors that refuse colons write `vllm_`. Buckets are most of the lines, and not needed.
_SAMPLE = re.compile(r"^vllm[:_]([a-zA-Z0-9_]{1,100})(?:\{(.*)\})?[ \t]+([0-9.eE+-]{1,40})(?:[ \t]|$)")
_LABEL = re.compile(r'(\w{1,100})="((?:[^"\\]|\\.)*)"')


class UnreachableError(HetisError):
    """A server did not answer, or not as an HTTP server does; a later call may succeed."""


@dataclass(slots=True)
class EngineState:
    """Metrics of one engine of the server: values by name without ``vllm:``, and its cache's settings."""

    values: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cache: Mapping[str, str] = field(default_factory=dict)


Scrape = tuple[float, dict[str, EngineState]]  # time, and the engines by their label


def watch(
    url: str, *, for_s: float, every_s: float, clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Scrape]:  # fmt: skip
    """Return scrapes of ``url`` over ``for_s`` seconds, one every ``every_s``. Only the first one must succeed.

    Raises UnreachableError if the first call has no answer, and DocumentError if that is not a URL, or no vLLM answers
    there. ``clock`` and ``sleep`` are replaced by tests.
    """
    address = metrics_address(url)
    found = [(clock(), engines_in(fetch_text(address), address))]
    for number in range(1, max(1, round(for_s / every_s)) + 1):
        sleep(max(0.0, found[0][0] + number * every_s - clock()))
        try:
            found.append((clock(), engines_in(fetch_text(address), address)))
        except HetisError:  # a restart, or a moment without an answer, only lengthens an interval
            continue
    return found


def metrics_address(url: str) -> str:
    """Return the URL with a path. Raises DocumentError if it is not an http or https URL."""
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
        raise single_problem(name, "has no vLLM metric (vllm:...): check that this is the server's /metrics")
    return engines


def fetch_text(url: str) -> str:
    """Return the body of an answer, within a time and a size. Raises UnreachableError if there is none, and
    DocumentError if it is too large.
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


def observed_in_scrapes(url: str, scrapes: Sequence[Scrape], *, context_tokens: float | None = None) -> Observed:
    """Return an observation for each engine and interval with enough work. Raises DocumentError if the context of
    decoding requests is not known.
    """
    found, left_out = list[Observation](), Counter[str]()
    for (_, before), (_, after) in pairwise(scrapes):
        for engine, state in after.items():
            if engine not in before:
                continue
            seen = _observation(url, before[engine], state, context_tokens)
            if isinstance(seen, str):
                left_out[seen] += 1
            else:
                found.append(seen)
    return Observed(
        what="intervals", origin="vLLM's /metrics", least=LEAST, observations=tuple(found), left_out=left_out
    )  # fmt: skip


def _observation(url: str, before: EngineState, after: EngineState, context_tokens: float | None) -> Observation | str:
    """Return the mean iteration of an interval, or the reason why there is none."""

    def grown(*names: str) -> float:
        """Return the increase of the first of these counters that the version has."""
        name = next((name for name in names if name in after.values), names[0])
        return after.values[name] - before.values[name]

    latency = next(
        (n for n in ("inter_token_latency_seconds", "time_per_output_token_seconds") if f"{n}_sum" in after.values), ""
    )
    waited_s, decoded = grown(f"{latency}_sum"), grown(f"{latency}_count")
    iterations, tokens = grown("iteration_tokens_total_count"), grown("iteration_tokens_total_sum")
    first_tokens, generated = grown("time_to_first_token_seconds_count"), grown("generation_tokens_total")
    if min(waited_s, decoded, iterations, tokens, first_tokens, generated) < 0:
        return "the server was restarted"
    if decoded < LEAST_TOKENS or iterations < 1 or waited_s <= 0:
        return "idle"
    if grown("spec_decode_num_draft_tokens_total") > 0:
        return "speculative decoding"
    running = before.values["num_requests_running"] + after.values["num_requests_running"]
    if context_tokens is None and not running:
        return "no request running at either end"
    context = _context(before, after, running) if context_tokens is None else context_tokens
    if context is None:
        raise single_problem(url, "does not report KV cache usage: give the mean tokens of a request with --context")
    decoding = max(1.0, decoded / iterations)
    decode = ObservedWork(decoding=decoding, attended_tokens=decoding * context)
    prompt_tokens = max(0.0, tokens - generated)  # without those found in a prefix cache
    with_prompt = min(iterations, first_tokens) if prompt_tokens > 0 else 0.0
    share = with_prompt / iterations
    parts = [(1.0 - share, decode)] if share < 1 else []
    if share > 0:
        chunk = ObservedWork(
            decoding=decoding,
            attended_tokens=decoding * context,
            prompts=max(1.0, first_tokens / with_prompt),
            chunk_tokens=prompt_tokens / with_prompt,
        )
        parts.append((share, chunk))
    return Observation(kind=ObservedKind.INTERVAL, seconds=waited_s / decoded, parts=tuple(parts))


def _context(before: EngineState, after: EngineState, running: float) -> float | None:
    """Return the mean KV tokens of the requests ``running`` at both ends, less the empty half of their last blocks;
    None if the server does not report them.
    """
    try:
        block = int(after.cache.get("block_size", ""))
        capacity = float(after.cache.get("kv_cache_size_tokens") or int(after.cache["num_gpu_blocks"]) * block)
    except (KeyError, ValueError):
        return None
    usage = next((name for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc") if name in after.values), None)
    if usage is None or not 0 < capacity < float("inf"):
        return None
    held = (before.values[usage] + after.values[usage]) * capacity
    return max(1.0, held / running - (block - 1) / 2)
