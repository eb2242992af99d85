"""Observations of the intervals between scrapes of ``/metrics``.

An interval says less than a log: the mean latency between tokens, which is the mean time of the iterations that decode,
and what they computed together. Iterations with a prompt are told from those without by the number of first tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from hetis.formats.errors import single_problem
from hetis.profiler.calibrate.observed import Observation, Observed, ObservedKind, ObservedWork
from hetis.profiler.calibrate.scraping import EngineState, Scrape

LEAST = 8
LEAST_TOKENS = 10  # latencies in an interval, below which it is no mean


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
        """Return the difference of the first counter that the version has."""
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
    context = _context(before, after) if context_tokens is None else context_tokens
    if context is None:
        raise single_problem(url, "does not say how full the KV cache is: --context gives the tokens of a request")
    decoding = max(1.0, decoded / iterations)
    decode = ObservedWork(decoding=decoding, attended_tokens=decoding * context)
    prompt_tokens = max(0.0, tokens - generated)  # without those that a prefix cache had
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


def _context(before: EngineState, after: EngineState) -> float | None:
    """Return the mean KV tokens of a running request at both ends, less the empty half of its last block."""
    try:
        block = int(after.cache.get("block_size", ""))
        capacity = float(after.cache.get("kv_cache_size_tokens") or int(after.cache["num_gpu_blocks"]) * block)
    except (KeyError, ValueError):
        return None
    usage = "kv_cache_usage_perc" if "kv_cache_usage_perc" in after.values else "gpu_cache_usage_perc"
    held = [one.values[usage] * capacity for one in (before, after)]
    running = sum(one.values["num_requests_running"] for one in (before, after))
    if usage not in after.values or not 0 < capacity < float("inf"):
        return None
    return max(1.0, sum(held) / running - (block - 1) / 2) if running else 1.0
