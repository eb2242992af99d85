"""SGLang's metrics (``--enable-metrics``), from version 0.4 to today: the newest name of each quantity comes first.

Its unit of KV is the token. ``token_usage`` is that of the fullest pool and leaves evictable prefixes out.
``kv_used_tokens`` includes them in some versions, so used is computed as total less available less evictable.
"""

from __future__ import annotations

from hetis.runtime.agent.pressure.reading import EngineReading, ScrapedEngine, Total
from hetis.runtime.agent.pressure.samples import MetricSample, Samples

PREFIX = "sglang:"


def read_sglang(samples: Samples) -> list[EngineReading]:
    """Return one reading per served model. Its data-parallel ranks are combined."""
    return [_read(model, samples.where("model_name", model)) for model in samples.values_of("model_name") if model]


def _read(model: str, samples: Samples) -> EngineReading:
    total = _sum(samples.of("sglang:max_total_num_tokens"))
    evictable = _sum(samples.of("sglang:kv_evictable_tokens"))
    ratio = _ratio(samples)
    used = _used(samples, total, evictable, ratio)
    if ratio is None and total and used is not None:
        ratio = min(used / total, 1.0)
    return EngineReading(
        kind=ScrapedEngine.SGLANG,
        model=model,
        num_running=_sum(samples.of("sglang:num_running_reqs")),
        num_waiting=_sum(samples.of("sglang:num_queue_reqs")),
        total_blocks=total,
        used_blocks=used,
        evictable_blocks=evictable,
        kv_use_ratio=ratio,
        num_preempted=_sum(samples.of("sglang:num_retracted_requests_total")),
        num_preempted_now=_sum(samples.of("sglang:num_retracted_reqs")),
        num_finished=_sum(samples.of("sglang:num_requests_total")),
        ttft_s=_total(samples, "sglang:time_to_first_token_seconds"),
        tpot_s=_total(samples, "sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
    )


def _ratio(samples: Samples) -> float | None:
    """Return the use of the fullest pool of the fullest rank: if one is full, requests wait."""
    pools = [
        sample.value
        for name in ("sglang:token_usage", "sglang:full_token_usage", "sglang:swa_token_usage")
        for sample in samples.of(name)
    ]
    return min(max(*pools, 0.0), 1.0) if pools else None


def _used(samples: Samples, total: int | None, evictable: int | None, ratio: float | None) -> int | None:
    available = _sum(samples.of("sglang:kv_available_tokens"))
    if total is not None and available is not None and evictable is not None:
        counted: int | None = max(total - available - evictable, 0)
    else:
        counted = _sum(samples.of("sglang:kv_used_tokens", "sglang:num_used_tokens"))
    if total is not None and ratio is not None:
        return max(counted or 0, round(ratio * total))  # a pool other than the counted one may be fuller
    return counted


def _sum(samples: tuple[MetricSample, ...]) -> int | None:
    return round(_over_ranks(samples)) if samples else None


def _total(samples: Samples, *names: str) -> Total | None:
    for name in names:
        sums, counts = samples.of(f"{name}_sum"), samples.of(f"{name}_count")
        if sums and counts:
            return Total(sum=_over_ranks(sums), count=_over_ranks(counts))
    return None


def _over_ranks(samples: tuple[MetricSample, ...]) -> float:
    """Return the sum over data-parallel ranks. Tensor- and pipeline-parallel ranks all report the same requests."""
    per_rank: dict[tuple[str, ...], float] = {}
    for sample in samples:
        own = tuple(f"{name}={sample.labels[name]}" for name in sorted(sample.labels) if name not in _SAME_REQUESTS)
        per_rank[own] = max(per_rank.get(own, sample.value), sample.value)
    return sum(per_rank.values())


_SAME_REQUESTS = {"tp_rank", "pp_rank", "moe_ep_rank", "pid"}
