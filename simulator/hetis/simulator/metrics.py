"""Metrics of a run's requests and devices, after its warm-up, and their summary over several runs of one load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from hetis.simulator.steadiness import (
    MAX_GROWTH,
    Estimate,
    filled_s,
    growth,
    is_carried,
    over_runs,
    warm_up,
    within_run,
)
from hetis.simulator.values import BoolArray, FloatArray, IntArray, Run
from hetis.solver.plan import Objective, Plan, Role

PERCENTS = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean, percentiles and maximum of seconds over requests; NaN if there are none."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """One GPU over the window: the share of its KV blocks in use, and of the time it was busy; NaN without samples."""

    device: str
    kv_mean: float
    kv_max: float
    busy_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCounts:
    """Requests and events of a whole run, warm-up included."""

    arrived: int
    finished: int
    unfinished: int  # excluding rejected ones
    rejected: int
    measured: int  # requests that arrived in the window and finished
    iterations: int
    preemptions: int
    migrations: int
    migrated_bytes: float
    kv_transfers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Metrics of a run from ``window_start_s`` (the end of its warm-up) to ``window_end_s`` (the last arrival)."""

    # Whether the load was carried: requests did not pile up in the window, and at most 5% of those that arrived in it
    # never finished, whether rejected or not. If requests pile up, latencies grow with the length of the run and say
    # nothing about the load. None: the run is too short to tell.
    steady: bool | None
    growth: Estimate  # seconds by which TTFT grows per second of arrivals in the window (`steadiness.growth`)
    window_start_s: float
    window_end_s: float
    end_s: float
    # arrival_rps, throughput_rps: requests that arrived or finished in the window, per second of the window.
    arrival_rps: float
    throughput_rps: Estimate
    # prompt_tokens_per_s, output_tokens_per_s: token rates of the requests that finished in the window.
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    # From arrival to the first output token. This and all following metrics cover requests that arrived in the window.
    ttft_s: Distribution
    ttft_p95_s: Estimate
    # From the first to the last output token, divided by the tokens after the first; requests with two tokens or more.
    tpot_s: Distribution
    mean_tpot_s: Estimate  # mean seconds per output token over *tokens*, as a plan defines TPOT
    end_to_end_s: Distribution  # from arrival to the last token; ``normalised_s`` is the same per output token
    normalised_s: Distribution
    queueing_s: Distribution  # from arrival until the first chunk of the prompt was scheduled
    attainment: float  # share of requests that met both limits, each by itself; NaN without limits
    counts: RunCounts
    devices: tuple[DeviceUse, ...]  # per GPU; empty without samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predictions of a plan: its saturated rate, its replicas' worst p95 TTFT, and their mean TPOT weighted by rate."""

    rate_rps: float
    ttft_s: float
    tpot_s: float


def prediction_of(plan: Plan) -> Prediction:
    """Return the plan's own predictions for the whole fleet."""
    decoding = [replica for replica in plan.replicas if replica.role is not Role.PREFILL]
    weight = sum(replica.rate for replica in decoding)
    return Prediction(
        rate_rps=plan.served_rate(),
        ttft_s=max((r.ttft_s for r in plan.replicas if r.role is not Role.DECODE), default=math.nan),
        tpot_s=sum(r.rate * r.tpot_s for r in decoding) / weight if weight else math.nan,
    )


def measure(run: Run, limits: Objective, *, saturated: bool) -> Metrics:
    """Return the metrics of a run.

    The end of the warm-up is determined from the end-to-end latencies in order of arrival, and is not before the fleet
    is full. The latencies of a saturated fleet are meaningless, so there it is determined from the gaps between
    completions (`warm_up`, `filled_s`).
    """
    last_arrival_s = float(run.arrival_s[-1]) if run.num_requests else 0.0
    start_s = _window_start_s(run, last_arrival_s, saturated=saturated)
    inside = (run.arrival_s >= start_s) & (run.arrival_s <= last_arrival_s)
    # A window may begin with an arrival or a completion, which is not counted: n gaps have n + 1 ends.
    finishes = (run.finished_s > start_s) & (run.finished_s <= last_arrival_s)
    finishing = np.sort(run.finished_s[finishes])
    span_s = last_arrival_s - start_s
    arrived, measured = int(inside.sum()), inside & np.isfinite(run.finished_s)

    ttft = (run.first_token_s - run.arrival_s)[measured]
    decode = (run.finished_s - run.first_token_s)[measured]
    later_tokens = (run.output_tokens - 1)[measured]
    several = later_tokens > 0
    end_to_end = (run.finished_s - run.arrival_s)[measured]
    tpot = decode[several] / later_tokens[several]
    num_finished = int(np.isfinite(run.finished_s).sum())
    found = growth(run.arrival_s[measured], ttft)
    return Metrics(
        steady=_steady(run, inside, found, start_s, saturated=saturated),
        growth=found,
        window_start_s=start_s,
        window_end_s=last_arrival_s,
        end_s=run.end_s,
        arrival_rps=_per_second(int((inside & (run.arrival_s > start_s)).sum()), span_s),
        throughput_rps=_throughput(finishing, span_s),
        prompt_tokens_per_s=_per_second(float(run.prompt_tokens[finishes].sum()), span_s),
        output_tokens_per_s=_per_second(float(run.output_tokens[finishes].sum()), span_s),
        ttft_s=_distribution(ttft),
        ttft_p95_s=within_run(ttft, partial(np.percentile, q=95)),
        tpot_s=_distribution(tpot),
        mean_tpot_s=_mean_tpot_s(decode[several], later_tokens[several], measured=int(measured.sum())),
        end_to_end_s=_distribution(end_to_end),
        normalised_s=_distribution(end_to_end / run.output_tokens[measured]),
        queueing_s=_distribution((run.admitted_s - run.arrival_s)[measured]),
        attainment=_attainment(limits, ttft, decode / np.maximum(later_tokens, 1), arrived),
        counts=RunCounts(
            arrived=run.num_requests,
            finished=num_finished,
            unfinished=run.num_requests - num_finished - run.rejected,
            rejected=run.rejected,
            measured=int(measured.sum()),
            iterations=run.iterations,
            preemptions=run.num_preemptions,
            migrations=run.migrations,
            migrated_bytes=run.migrated_bytes,
            kv_transfers=run.kv_transfers,
        ),
        devices=_devices(run, start_s, last_arrival_s),
    )


def _window_start_s(run: Run, end_s: float, *, saturated: bool) -> float:
    finished = np.isfinite(run.finished_s)
    if saturated:
        times = np.sort(run.finished_s[finished & (run.finished_s <= end_s)])
        return float(times[warm_up(np.diff(times))]) if len(times) else end_s
    arrival_s, latencies = run.arrival_s[finished], (run.finished_s - run.arrival_s)[finished]
    if not len(latencies):
        return end_s
    half_s = float(arrival_s[len(arrival_s) // 2])
    return max(float(arrival_s[warm_up(latencies)]), min(filled_s(arrival_s, latencies), half_s))


def _steady(run: Run, inside: BoolArray, found: Estimate, start_s: float, *, saturated: bool) -> bool | None:
    """Return whether the window's requests are served without ever longer waits; None: the run is too short."""
    arrived, finished = int(inside.sum()), np.isfinite(run.finished_s)
    # A request that no replica can ever hold is not served either: a load with more than a few of them is not carried.
    if int((inside & ~finished).sum()) > MAX_GROWTH * arrived:
        return False
    if not finished.any():
        return None
    if saturated:
        left = int((run.finished_s < run.arrival_s[-1]).sum())
        remained = run.num_requests - run.rejected - left
        return True if left >= remained else None  # all requests that the fleet holds at once were replaced
    carried = is_carried(found, arrived=arrived)
    is_full = filled_s(run.arrival_s[finished], (run.finished_s - run.arrival_s)[finished]) <= start_s
    return carried if carried is False or is_full else None


def _throughput(finishing: FloatArray, span_s: float) -> Estimate:
    """Return completions per second of the window, with an error estimated from the gaps between them.

    The error is unknown if a section of the run takes no time, because all its requests finish at once.
    """
    value = _per_second(len(finishing), span_s)
    spread = within_run(np.diff(finishing), lambda part: 1 / float(part.mean()) if part.any() else math.inf)
    return Estimate(value=value, half_width=spread.half_width if math.isfinite(spread.half_width) else math.nan)


def _mean_tpot_s(decode: FloatArray, later_tokens: IntArray, *, measured: int) -> Estimate:
    """Return the mean TPOT over tokens; 0 if no request has a second token."""
    if measured and not len(decode):
        return Estimate(value=0.0, half_width=0.0)
    rows = np.stack([decode, later_tokens.astype(np.float64)], axis=1)
    return within_run(rows, lambda part: float(part[:, 0].sum() / part[:, 1].sum()))


def _per_second(amount: float, span_s: float) -> float:
    return amount / span_s if span_s > 0 else math.nan


def _distribution(values: FloatArray) -> Distribution:
    if not len(values):
        return Distribution(mean=math.nan, p50=math.nan, p90=math.nan, p95=math.nan, p99=math.nan, max=math.nan)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(values, PERCENTS))
    return Distribution(mean=float(values.mean()), p50=p50, p90=p90, p95=p95, p99=p99, max=float(values.max()))


def _attainment(limits: Objective, ttft: FloatArray, tpot: FloatArray, arrived: int) -> float:
    """Return the share of requests within the limits; requests of the window that never finished met none."""
    if (limits.ttft_limit_s is None and limits.tpot_limit_s is None) or not arrived:
        return math.nan
    kept = np.ones(len(ttft), bool)
    for values, limit in ((ttft, limits.ttft_limit_s), (tpot, limits.tpot_limit_s)):
        if limit is not None:
            kept &= values <= limit
    return float(kept.sum()) / arrived


def _devices(run: Run, start_s: float, end_s: float) -> tuple[DeviceUse, ...]:
    if run.series is None:
        return ()
    inside = (run.series.times_s > start_s) & (run.series.times_s <= end_s)
    names, columns = run.series.devices, [[math.nan] * len(run.series.devices)] * 3
    if inside.any():
        kv, busy = run.series.kv_used_fraction[inside], run.series.busy_fraction[inside]
        columns = [kv.mean(axis=0).tolist(), kv.max(axis=0).tolist(), busy.mean(axis=0).tolist()]
    return tuple(
        DeviceUse(device=name, kv_mean=kv_mean, kv_max=kv_max, busy_mean=busy_mean)
        for name, kv_mean, kv_max, busy_mean in zip(names, *columns, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Joint results of several runs: means of their `Metrics`, and sums of their counts.

    Intervals are over the runs if there are several, otherwise from sections of the single run.
    """

    num_runs: int
    steady: bool | None  # True: all runs are steady; False: one is not; None: one is too short to tell
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

    @property
    def carried(self) -> bool | None:
        """Return whether the load was carried, as far as can be told if ``steady`` is None; None: it cannot be told."""
        if self.steady is not None or math.isnan(self.growth.value):
            return self.steady
        if self.growth.value > MAX_GROWTH:
            return False
        return True if self.throughput_rps.value > 0 else None  # otherwise nothing finished, and the wait says nothing

    def within(self, limits: Objective) -> bool:
        """Return whether the load is known to be carried, and both latencies are known to be within their limits."""
        pairs = ((self.ttft_p95_s, limits.ttft_limit_s), (self.mean_tpot_s, limits.tpot_limit_s))
        return self.carried is True and all(limit is None or estimate.value <= limit for estimate, limit in pairs)


def summarise(runs: Sequence[Metrics]) -> Summary:
    """Return the summary of one or more runs."""
    steady, counts = [run.steady for run in runs], [run.counts for run in runs]
    total = {field.name: sum(getattr(one, field.name) for one in counts) for field in fields(RunCounts)}
    own = ("num_runs", "steady", "warm_up_s", "window_s", "counts", "devices")
    alike = {field.name for field in fields(Summary)}.difference(own)
    return Summary(
        num_runs=len(runs),
        steady=False if False in steady else None if None in steady else True,
        warm_up_s=_mean([run.window_start_s for run in runs]),
        window_s=_mean([run.window_end_s - run.window_start_s for run in runs]),
        counts=RunCounts(**total),
        devices=tuple(map(_device_of_runs, zip(*(run.devices for run in runs), strict=True))),
        **{name: _of_runs([getattr(run, name) for run in runs]) for name in alike},
    )


def _mean(values: Sequence[float]) -> float:
    return over_runs(values).value


def _of_runs(values: Sequence[Any]) -> Any:
    """Return the mean of a figure over runs; for a single run, its own estimate."""
    if isinstance(values[0], Distribution):
        names = [field.name for field in fields(Distribution)]
        return Distribution(**{name: _mean([getattr(one, name) for one in values]) for name in names})
    if isinstance(values[0], Estimate):
        return values[0] if len(values) == 1 else over_runs([one.value for one in values])
    return _mean(values)


def _device_of_runs(uses: Sequence[DeviceUse]) -> DeviceUse:
    return DeviceUse(
        device=uses[0].device,
        kv_mean=_mean([use.kv_mean for use in uses]),
        kv_max=max((use.kv_max for use in uses if math.isfinite(use.kv_max)), default=math.nan),
        busy_mean=_mean([use.busy_mean for use in uses]),
    )
