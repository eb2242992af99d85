"""Judges whether an engine is short of KV memory, by KV that it cannot evict, waiting requests and preemptions.

Plain use misleads, because an engine with a prefix cache is always full. Use is therefore judged without evictable
blocks, together with two signs that only a real shortage gives.
"""

from __future__ import annotations

from dataclasses import dataclass

from hetis.runtime.agent.pressure.reading import EngineReading


@dataclass(frozen=True, slots=True, kw_only=True)
class PressureLimits:
    """Limits above which an engine is under pressure.

    Attributes:
        use_ratio: share of KV held by requests.
        preemptions_per_s: requests preempted per second.
    """

    use_ratio: float = 0.9
    preemptions_per_s: float = 0.05


DEFAULT_LIMITS = PressureLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """A judgement. There is pressure if ``reasons``, which are sentences, is not empty.

    Attributes:
        use_ratio: share of KV held by requests. None: unknown.
        waiting_for_kv: requests that wait for blocks, as the engine reports. If it does not report them, all waiting
            requests count while use is above its limit.
        preemptions_per_s: since the previous reading; 0 at the first.
        reasons: every sign of a shortage, with the value and its limit.
    """

    use_ratio: float | None
    waiting_for_kv: int
    preemptions_per_s: float
    reasons: tuple[str, ...]


def judge(
    reading: EngineReading, earlier: EngineReading | None, elapsed_s: float, limits: PressureLimits = DEFAULT_LIMITS
) -> Pressure:
    """Judge a reading on its own and against the one ``elapsed_s`` seconds earlier, if there is one."""
    use = reading.kv_use_ratio
    full = use is not None and use > limits.use_ratio
    waiting = reading.num_waiting_for_kv
    if waiting is None:
        waiting = (reading.num_waiting or 0) if full else 0
    rate = _preempted_since(reading, earlier) / elapsed_s if earlier is not None and elapsed_s > 0 else 0.0
    reasons = []
    if full and use is not None:
        reasons.append(f"requests hold {use:.0%} of the KV blocks, above {limits.use_ratio:.0%}")
    if waiting:
        reasons.append(f"{waiting} requests wait for KV blocks")
    if rate > limits.preemptions_per_s:
        reasons.append(f"{rate:.2f} requests/s are preempted, above {limits.preemptions_per_s:.2f}")
    return Pressure(use_ratio=use, waiting_for_kv=waiting, preemptions_per_s=rate, reasons=tuple(reasons))


def _preempted_since(reading: EngineReading, earlier: EngineReading | None) -> int:
    if reading.num_preempted is None:
        return reading.num_preempted_now or 0
    before = (earlier.num_preempted or 0) if earlier is not None else 0
    # A smaller number means that the engine restarted and counts from 0 again.
    return reading.num_preempted - before if reading.num_preempted >= before else reading.num_preempted
