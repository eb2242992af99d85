"""One engine's figures for one model in hetis' terms: counts since the engine started, blocks in its own unit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ScrapedEngine(StrEnum):
    VLLM = "vllm"
    SGLANG = "sglang"


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """Sum and count of a histogram since the engine started."""

    sum: float
    count: float

    def mean_since(self, earlier: Total | None) -> float:
        """Return the mean of the samples since ``earlier``, or 0 if there are none. A restarted engine begins at 0
        again.
        """
        if earlier is None or self.count < earlier.count or self.sum < earlier.sum:
            earlier = Total(sum=0.0, count=0.0)
        count = self.count - earlier.count
        return (self.sum - earlier.sum) / count if count > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReading:
    """One scrape of one model. None means that the engine does not report the value.

    Attributes:
        kind: which engine.
        model: name that the model is served under.
        num_running, num_waiting: requests now.
        num_waiting_for_kv: waiting requests that wait for KV blocks.
        total_blocks: KV blocks in total, in the engine's unit (SGLang: tokens).
        used_blocks: blocks that are not evictable, that is, held by requests.
        evictable_blocks: blocks that hold only cached prefixes.
        kv_use_ratio: share of KV held by requests, from 0 to 1; may be reported even if block counts are not.
        num_preempted, num_finished, num_steps: since the engine started.
        num_preempted_now: preempted in the last round, from engines that have no counter.
        ttft_s, tpot_s: seconds to the first token and per output token, since the engine started.
    """

    kind: ScrapedEngine
    model: str
    num_running: int | None = None
    num_waiting: int | None = None
    num_waiting_for_kv: int | None = None
    total_blocks: int | None = None
    used_blocks: int | None = None
    evictable_blocks: int | None = None
    kv_use_ratio: float | None = None
    num_preempted: int | None = None
    num_preempted_now: int | None = None
    num_finished: int | None = None
    num_steps: int | None = None
    ttft_s: Total | None = None
    tpot_s: Total | None = None
