"""Summary of runs of one load with different seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from hetis.simulator.confidence import Estimate, over_runs
from hetis.simulator.metrics import DeviceUse, Distribution, Limits, Metrics, RunCounts
from hetis.simulator.steadiness import MAX_GROWTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Joint results of the runs: means over the runs of the `Metrics` of each, and sums of their counts.

    Intervals are over the runs if there are several, otherwise from the sections of the single run.
    """

    num_runs: int
    steady: bool | None  # whether all of them are steady; False: one is not; None: one is too short to tell
    growth: Estimate
    warm_up_s: float
    window_s: float
    arrival_rps: float
    throughput_rps: Estimate
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft_p95_s: Estimate
    mean_tpot_s: Estimate
    ttft_s: Distribution
    tpot_s: Distribution
    end_to_end_s: Distribution
    normalised_s: Distribution
    queueing_s: Distribution
    attainment: float
    counts: RunCounts
    devices: tuple[DeviceUse, ...]

    def within(self, limits: Limits) -> bool:
        """Return whether the load is carried, if that is known, and both latencies are within their limits."""
        carried = self.growth.value <= MAX_GROWTH if self.steady is None else self.steady
        return carried and limits.met_by(ttft_s=self.ttft_p95_s.value, tpot_s=self.mean_tpot_s.value)

    def precision(self) -> float:
        """Return the widest of the three intervals over its value; infinite if one is not known."""
        return max(estimate.relative for estimate in (self.throughput_rps, self.ttft_p95_s, self.mean_tpot_s))


def summarise(runs: Sequence[Metrics]) -> Summary:
    """Return the summary of one run or more."""

    def mean(value: Callable[[Metrics], float]) -> float:
        return over_runs([value(run) for run in runs]).value

    def estimate(of: Callable[[Metrics], Estimate]) -> Estimate:
        return of(runs[0]) if len(runs) == 1 else over_runs([of(run).value for run in runs])

    def distribution(of: Callable[[Metrics], Distribution]) -> Distribution:
        names = [field.name for field in fields(Distribution)]
        return Distribution(**{name: over_runs([getattr(of(run), name) for run in runs]).value for name in names})

    return Summary(
        num_runs=len(runs),
        steady=_all_steady([run.steady for run in runs]),
        growth=estimate(lambda run: run.growth),
        warm_up_s=mean(lambda run: run.window_start_s),
        window_s=mean(lambda run: run.window_end_s - run.window_start_s),
        arrival_rps=mean(lambda run: run.arrival_rps),
        throughput_rps=estimate(lambda run: run.throughput_rps),
        prompt_tokens_per_s=mean(lambda run: run.prompt_tokens_per_s),
        output_tokens_per_s=mean(lambda run: run.output_tokens_per_s),
        ttft_p95_s=estimate(lambda run: run.ttft_p95_s),
        mean_tpot_s=estimate(lambda run: run.mean_tpot_s),
        ttft_s=distribution(lambda run: run.ttft_s),
        tpot_s=distribution(lambda run: run.tpot_s),
        end_to_end_s=distribution(lambda run: run.end_to_end_s),
        normalised_s=distribution(lambda run: run.normalised_s),
        queueing_s=distribution(lambda run: run.queueing_s),
        attainment=mean(lambda run: run.attainment),
        counts=_sums([run.counts for run in runs]),
        devices=_devices(runs),
    )


def _all_steady(runs: Sequence[bool | None]) -> bool | None:
    if False in runs:
        return False
    return None if None in runs else True


def _sums(counts: Sequence[RunCounts]) -> RunCounts:
    return RunCounts(**{field.name: sum(getattr(one, field.name) for one in counts) for field in fields(RunCounts)})


def _devices(runs: Sequence[Metrics]) -> tuple[DeviceUse, ...]:
    return tuple(
        DeviceUse(
            device=uses[0].device,
            kv_mean=over_runs([use.kv_mean for use in uses]).value,
            kv_max=max((use.kv_max for use in uses if math.isfinite(use.kv_max)), default=math.nan),
            busy_mean=over_runs([use.busy_mean for use in uses]).value,
        )
        for uses in zip(*(run.devices for run in runs), strict=True)
    )
