"""vLLM's metrics, from version 0.6 to 0.32: the newest name of each quantity comes first.

``kv_cache_usage_perc`` is a share from 0 to 1 despite its name, and counts blocks that requests hold. Unused cached
prefixes are free blocks to vLLM, so it reports no evictable blocks.
"""

from __future__ import annotations

from hetis.runtime.agent.pressure.reading import EngineReading, ScrapedEngine, Total
from hetis.runtime.agent.pressure.samples import MetricSample, Samples

PREFIX = "vllm:"
_CAPACITY = "capacity"


def read_vllm(samples: Samples) -> list[EngineReading]:
    """Return one reading per served model. Its engines (data-parallel ranks) are combined."""
    models = [model for model in samples.values_of("model_name") if model]
    # In some versions the configuration has no model name, and there is only one model.
    nameless = samples.where("model_name", "")
    return [_read(model, samples.where("model_name", model), nameless) for model in models]


def _read(model: str, samples: Samples, nameless: Samples) -> EngineReading:
    ratio = _mean(samples.of("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"))
    configuration = samples.of("vllm:cache_config_info") or nameless.of("vllm:cache_config_info")
    total_blocks = sum(_whole(sample.labels.get("num_gpu_blocks", "")) for sample in configuration) or None
    by_reason = samples.of("vllm:num_requests_waiting_by_reason")
    for_kv = [sample for sample in by_reason if sample.labels.get("reason") == _CAPACITY]
    return EngineReading(
        kind=ScrapedEngine.VLLM,
        model=model,
        num_running=_sum(samples.of("vllm:num_requests_running")),
        num_waiting=_sum(samples.of("vllm:num_requests_waiting") or by_reason),
        num_waiting_for_kv=_sum(tuple(for_kv)) if by_reason else None,
        total_blocks=total_blocks,
        used_blocks=None if ratio is None or total_blocks is None else round(ratio * total_blocks),
        kv_use_ratio=ratio,
        num_preempted=_sum(samples.of("vllm:num_preemptions_total")),
        num_finished=_sum(samples.of("vllm:request_success_total")),
        num_steps=_sum(samples.of("vllm:iteration_tokens_total_count")),
        ttft_s=_total(samples, "vllm:time_to_first_token_seconds"),
        tpot_s=_total(
            samples,
            "vllm:inter_token_latency_seconds",
            "vllm:time_per_output_token_seconds",
            "vllm:request_time_per_output_token_seconds",
        ),
    )


def _sum(samples: tuple[MetricSample, ...]) -> int | None:
    return round(sum(sample.value for sample in samples)) if samples else None


def _mean(samples: tuple[MetricSample, ...]) -> float | None:
    """Return the mean, because the engines of one model have equally many blocks."""
    return min(max(sum(sample.value for sample in samples) / len(samples), 0.0), 1.0) if samples else None


def _total(samples: Samples, *names: str) -> Total | None:
    for name in names:
        sums, counts = samples.of(f"{name}_sum"), samples.of(f"{name}_count")
        if sums and counts:
            return Total(sum=sum(sample.value for sample in sums), count=sum(sample.value for sample in counts))
    return None


def _whole(text: str) -> int:
    """Return the blocks of an info label, which says ``None`` until the engine has measured its memory."""
    return int(text) if text.isdecimal() and len(text) < 19 else 0
