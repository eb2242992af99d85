"""The metrics of vLLM and SGLang as readings in hetis' terms: counts since the engine started, blocks in its own unit.

The newest name of each quantity comes first. vLLM, from version 0.6 to 0.32: ``kv_cache_usage_perc`` is a share from
0 to 1 despite its name, and counts blocks that requests hold. Unused cached prefixes are free blocks to vLLM, so it
reports no evictable blocks. SGLang (``--enable-metrics``), from version 0.4 to today: its unit of KV is the token.
``token_usage`` is that of the fullest pool and leaves evictable prefixes out. ``kv_used_tokens`` includes them in
some versions, so used is computed as total less available less evictable.

HetisError (hetis.solver.errors)
+-- UnreadableMetricsError   the text is not Prometheus exposition format
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from hetis.solver.errors import HetisError

VLLM, SGLANG = "vllm:", "sglang:"  # prefixes of their metrics
_CAPACITY = "capacity"
FULL_RATIO = 0.9  # share of KV held by requests above which those that wait do so for KV
_SAME_REQUESTS = frozenset({"tp_rank", "pp_rank", "moe_ep_rank", "pid"})  # SGLang's ranks that report the same requests


class UnreadableMetricsError(HetisError):
    """The answer is not in the Prometheus exposition format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """Sum and count of a histogram since the engine started."""

    sum: float
    count: float

    def mean_since(self, earlier: Total | None) -> float:
        """Return the mean of the samples since ``earlier``, or 0 without any. A restarted engine begins at 0 again."""
        if earlier is None or self.count < earlier.count or self.sum < earlier.sum:
            earlier = Total(sum=0.0, count=0.0)
        count = self.count - earlier.count
        return (self.sum - earlier.sum) / count if count > 0 else 0.0


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
    # ttft_s, tpot_s: seconds to the first token and per output token, since the engine started
    ttft_s: Total | None = None
    tpot_s: Total | None = None

    @property
    def waiting_for_kv(self) -> int:
        """The requests that wait for blocks. If the engine does not say, all waiting requests count while requests hold
        almost all KV: an engine with a prefix cache is always full, so evictable blocks do not count as held.
        """
        if self.num_waiting_for_kv is not None:
            return self.num_waiting_for_kv
        return (self.num_waiting or 0) if (self.kv_use_ratio or 0.0) > FULL_RATIO else 0


def read_metrics(text: str) -> list[EngineReading]:
    """Return one reading per model that either engine serves; its data-parallel ranks are combined. Raises
    UnreadableMetricsError if the text is malformed somewhere, so nothing in it can be trusted.
    """
    samples = list(_finite_samples(text))
    ours, theirs = ([one for one in samples if one.name.startswith(prefix)] for prefix in (VLLM, SGLANG))
    # In some versions vLLM's configuration has no model name, and there is only one model.
    nameless = _Samples(one for one in ours if not one.model)
    readings = [_read_vllm(model, _Samples(_of(model, ours)), nameless) for model in _models(ours)]
    same = _SAME_REQUESTS
    return readings + [_read_sglang(model, _Samples(_of(model, theirs), same=same)) for model in _models(theirs)]


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
        ttft_s=samples.total("vllm:time_to_first_token_seconds"),
        tpot_s=samples.total(
            "vllm:inter_token_latency_seconds",
            "vllm:time_per_output_token_seconds",
            "vllm:request_time_per_output_token_seconds",
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
        ttft_s=samples.total("sglang:time_to_first_token_seconds"),
        tpot_s=samples.total("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
    )


@dataclass(frozen=True, slots=True)
class _Sample:
    """One line: counters end in ``_total``, means come as _sum and _count. Its value is finite."""

    name: str
    labels: Mapping[str, str]
    value: float

    @property
    def model(self) -> str:
        return self.labels.get("model_name", "")


class _Samples:
    """The samples of one model. Ranks that differ only in labels of ``same`` report the same requests."""

    def __init__(self, samples: Iterator[_Sample], *, same: Collection[str] = ()) -> None:
        self._same, self._by_name = same, dict[str, list[_Sample]]()
        for sample in samples:
            self._by_name.setdefault(sample.name, []).append(sample)

    def of(self, *names: str) -> list[_Sample]:
        """Return the samples of the first of these names that has any, or nothing. Newer names come first."""
        return next((self._by_name[name] for name in names if name in self._by_name), [])

    def count(self, *names: str) -> int | None:
        """Return the sum over data-parallel ranks of the first name that has any samples."""
        found = self.of(*names)
        return round(self._summed(found)) if found else None

    def total(self, *names: str) -> Total | None:
        """Return the sum and count of the first histogram that has both."""
        for name in names:
            sums, counts = self.of(f"{name}_sum"), self.of(f"{name}_count")
            if sums and counts:
                return Total(sum=self._summed(sums), count=self._summed(counts))
        return None

    def _summed(self, samples: list[_Sample]) -> float:
        per_rank: dict[frozenset[tuple[str, str]], float] = {}
        for sample in samples:
            own = frozenset((name, text) for name, text in sample.labels.items() if name not in self._same)
            per_rank[own] = max(per_rank.get(own, sample.value), sample.value)
        return sum(per_rank.values())


def _models(samples: list[_Sample]) -> list[str]:
    return sorted({sample.model for sample in samples} - {""})


def _of(model: str, samples: list[_Sample]) -> Iterator[_Sample]:
    return (sample for sample in samples if sample.model == model)


def _share(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _whole(text: str) -> int:
    """Return the blocks of an info label, which says ``None`` until the engine has measured its memory."""
    return int(text) if text.isdecimal() and len(text) < 19 else 0


def _finite_samples(text: str) -> Iterator[_Sample]:
    from prometheus_client.parser import text_string_to_metric_families

    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if math.isfinite(sample.value):
                    yield _Sample(sample.name, sample.labels, float(sample.value))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:  # raised by the parser on bad text
        raise UnreadableMetricsError(f"not Prometheus text: {error}"[:300]) from None
