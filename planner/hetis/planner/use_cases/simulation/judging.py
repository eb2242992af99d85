"""Simulated loads judged by a service level, and the sweep of rates by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from hetis.planner.use_cases.record.parts import Requested
from hetis.planner.use_cases.service_level import (
    DEFAULT,
    Latency,
    ServiceLevel,
    Statistic,
    limits_of,
    requested_level,
)
from hetis.simulator.metrics import Metrics, Summary
from hetis.simulator.steadiness import Estimate, within_run
from hetis.simulator.values import FloatArray, RequestLog, Run
from hetis.solver.plan import Objective, Plan

TAIL = 0.9  # share of a limit on a tail statistic from which a longer run decides
SHARE = 0.6  # such a share of the allowed misses; an exponential tail is then at 90% of its limit
NEVER_S = 1e15  # stands for the latency of a request that never finished
RULE_OF_THREE = 3.0  # if none of n requests missed, up to 3 / n of all may, with 95% certainty
ROUNDING = 1e-12  # far less than one request in all; 1.0 - 0.9 is less than 0.1
_READ = ("arrival_s", "first_token_s", "finished_s", "output_tokens")  # the fields of a run that `measured` reads


class Limited(NamedTuple):
    """A limited quantity with the ends of its interval, in seconds or as a share of requests."""

    low: float
    value: float
    high: float
    limit: float
    close: float  # share of the limit from which a longer run decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A run compared with the limits: the quantities that the level limits, and details for reports."""

    limited: tuple[Limited, ...]
    seconds: Mapping[Latency, float]  # values of the requested statistics that are not the usual ones
    missed: Mapping[Latency, float]  # share of the requests over each limit; empty without an attainment


def measured(level: ServiceLevel, summary: Summary, run: Run | None, limits: Objective) -> Measured:
    """Return a run compared with the limits; ``run`` is needed for all levels but the default."""
    usual = {Latency.TTFT: summary.ttft_p95_s, Latency.TPOT: summary.mean_tpot_s}
    bounds = limits_of(limits)
    if run is None or level == DEFAULT:
        found = [_limited(usual[latency], limit, DEFAULT.statistic(latency)) for latency, limit in bounds.items()]
        return Measured(limited=tuple(found), seconds={}, missed={})
    values = _by_request(run, summary.warm_up_s)
    if level.attainment is not None:
        return _attained(level.attainment, values, bounds)
    estimates = {
        latency: usual[latency]
        if level.statistic(latency) is DEFAULT.statistic(latency)
        else _within_run(values[latency], level.statistic(latency))
        for latency in Latency
    }
    return Measured(
        limited=tuple(
            _limited(estimates[latency], limit, level.statistic(latency)) for latency, limit in bounds.items()
        ),
        seconds={latency: one.value for latency, one in estimates.items() if one is not usual[latency]},
        missed={},
    )


def _limited(estimate: Estimate, limit: float, statistic: Statistic) -> Limited:
    half = estimate.half_width if estimate.half_width >= 0 else 0.0  # an unknown interval excuses no miss
    close = 1.0 if statistic is Statistic.MEAN else TAIL
    return Limited(estimate.value - half, estimate.value, estimate.value + half, limit, close)


def _by_request(run: Run, warm_up_s: float) -> dict[Latency, FloatArray]:
    """Return the latencies of every request that arrived after the warm-up; infinite if it never finished.

    TPOT is NaN for a single token, which follows no other; it is within any limit.
    """
    inside = run.arrival_s >= warm_up_s
    ttft = (run.first_token_s - run.arrival_s)[inside]
    further = run.output_tokens[inside] - 1
    tpot = (run.finished_s - run.first_token_s)[inside] / np.where(further > 0, further, np.nan)
    done = np.isfinite(run.finished_s[inside])
    return {Latency.TTFT: np.where(done, ttft, np.inf), Latency.TPOT: np.where(done, tpot, np.inf)}


def _attained(attainment: float, values: Mapping[Latency, FloatArray], bounds: Mapping[Latency, float]) -> Measured:
    over = {latency: values[latency] > limit for latency, limit in bounds.items()}
    any_over = np.any(list(over.values()), axis=0).astype(np.float64)
    estimate = _within_run(any_over, Statistic.MEAN)
    # One miss refutes 100%, and a run without any is as sure of it as its length allows: a longer one decides nothing.
    by_chance = max(RULE_OF_THREE / max(1, len(any_over)), estimate.half_width)  # which may be NaN
    half = by_chance if attainment < 1.0 else 0.0
    missing = Limited(estimate.value - half, estimate.value, estimate.value + half, 1.0 - attainment, SHARE)
    shares = {name: float(one.mean()) if len(one) else math.nan for name, one in over.items()}
    return Measured(limited=(missing,), seconds={}, missed=shares)


def _within_run(values: FloatArray, statistic: Callable[[FloatArray], float]) -> Estimate:
    """Return a statistic with its interval. Requests that never finished are the slowest in percentiles, and left out
    of means.
    """
    known = values[~np.isnan(values)]
    finished = known[np.isfinite(known)]
    if statistic is Statistic.MEAN or len(finished) == len(known):
        return within_run(finished, statistic)
    found = within_run(np.minimum(known, NEVER_S), statistic)  # infinity cannot be interpolated
    longest_s = finished.max(initial=0.0)
    return found if found.value <= longest_s else Estimate(value=math.inf)


# --- verdicts on a load, over all its runs


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitVerdict:
    """A limit and its simulated counterpart: seconds of a latency, or a share of the requests."""

    latency: Latency | None  # None: ``limit`` is the share of the requests that must be within all limits, at least
    statistic: Statistic | None  # None: a share has none
    limit: float
    estimate: Estimate
    kept: bool | None  # None: no request was measured
    # Whether the whole interval is on one side of the limit and, if it is kept, the run was long enough to tell
    sure: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelVerdict:
    """A load compared with its service level."""

    limits: tuple[LimitVerdict, ...]
    missed: Mapping[Latency, float]  # share of the requests over each limit; empty unless the level is a share
    steady: bool | None  # as in `Summary`
    carried: bool | None  # as in `Summary`

    @property
    def kept(self) -> bool | None:
        """Return whether the load was carried within all limits; None: too little was measured to tell."""
        parts = (self.carried, *(one.kept for one in self.limits))
        return False if False in parts else None if None in parts else True

    @property
    def sure(self) -> bool:
        """Return whether the run was long enough to tell, and every interval that decides is on one side of a limit."""
        if self.kept:
            return self.steady is True and all(one.sure for one in self.limits)
        return self.steady is False or any(one.kept is False and one.sure for one in self.limits)

    def of(self, latency: Latency | None) -> LimitVerdict | None:
        """Return the verdict on the limit of a latency, or on that of the share of requests; None: there is none."""
        return next((one for one in self.limits if one.latency is latency), None)


def level_to_hold(
    plan: Plan, limits: Objective, *, ttft: Statistic | None, tpot: Statistic | None, attainment: float | None
) -> ServiceLevel:
    """Return the plan's own level with what is requested in its place: a statistic replaces a share, and vice versa.

    The statistic of a latency without a limit is the default one, since nothing depends on it.

    Raises:
        InvalidProblemError: the request contradicts itself or has no limit to keep.
    """
    requested = requested_level(ttft=ttft, tpot=tpot, attainment=attainment, objective=limits, verify=True)
    level, limited = Requested.of(plan).service_level, limits_of(limits)
    if attainment is not None:
        level = requested
    elif ttft is not None or tpot is not None:
        level = ServiceLevel(ttft=ttft or level.ttft, tpot=tpot or level.tpot)
    if level.attainment is not None:
        return level if limited else DEFAULT
    return ServiceLevel(
        ttft=level.ttft if Latency.TTFT in limited else DEFAULT.ttft,
        tpot=level.tpot if Latency.TPOT in limited else DEFAULT.tpot,
    )


class SimulatedLatency(NamedTuple):
    """A latency in the statistic that must keep its limit, or else the usual one."""

    latency: Latency
    statistic: Statistic
    estimate: Estimate

    @property
    def name(self) -> str:
        return f"{self.latency} {self.statistic}"


def simulated_latencies(summary: Summary, verdict: LevelVerdict | None) -> list[SimulatedLatency]:
    """Return TTFT and TPOT as they are compared with limits."""
    usual = {Latency.TTFT: summary.ttft_p95_s, Latency.TPOT: summary.mean_tpot_s}
    limited = {} if verdict is None else {one.latency: one for one in verdict.limits}
    return [
        SimulatedLatency(latency, DEFAULT.statistic(latency), estimate)
        if (one := limited.get(latency)) is None or one.statistic is None
        else SimulatedLatency(latency, one.statistic, one.estimate)
        for latency, estimate in usual.items()
    ]


def latencies_of(run: Run, metrics: Metrics) -> Run:
    """Return what a verdict needs of a run: the times of the requests after its warm-up. Everything else is empty."""
    inside = run.arrival_s >= metrics.window_start_s
    return replace(RequestLog().run(0.0, None), **{name: getattr(run, name)[inside] for name in _READ})


def verdict_of(level: ServiceLevel, limits: Objective, summary: Summary, latencies: Sequence[Run]) -> LevelVerdict:
    """Return whether a load keeps its service level, over the requests of all its runs.

    The usual statistics are those of the summary, whose intervals are over the runs if there are several.

    Args:
        latencies: of each run, by `latencies_of`; the default level needs none.
    """
    run = None
    if latencies:
        joined: dict[str, Any] = {name: np.concatenate([getattr(one, name) for one in latencies]) for name in _READ}
        run = replace(latencies[0], **joined)
    found = measured(level, replace(summary, warm_up_s=0.0), run, limits)  # warm-ups differ, and are left out already
    if level.attainment is not None:
        (missing,) = found.limited
        share = Estimate(value=1.0 - missing.value, half_width=min(1.0, missing.high - missing.value))
        verdicts = [_limit_verdict(None, None, level.attainment, share, summary.steady)]
    else:
        verdicts = [
            _limit_verdict(
                latency, level.statistic(latency), one.limit, _estimate(level, latency, one, summary), summary.steady
            )
            for latency, one in zip(limits_of(limits), found.limited, strict=True)
        ]
    return LevelVerdict(limits=tuple(verdicts), missed=found.missed, steady=summary.steady, carried=summary.carried)


def _estimate(level: ServiceLevel, latency: Latency, found: Limited, summary: Summary) -> Estimate:
    if level.statistic(latency) is DEFAULT.statistic(latency):
        return summary.ttft_p95_s if latency is Latency.TTFT else summary.mean_tpot_s
    # An unknown interval has no width there.
    return Estimate(value=found.value, half_width=found.high - found.value or math.nan)


def _limit_verdict(
    latency: Latency | None, statistic: Statistic | None, limit: float, estimate: Estimate, steady: bool | None
) -> LimitVerdict:
    reached, most = _at_most(latency, limit, estimate)
    kept = None if math.isnan(reached.value) else reached.value <= most
    sure = steady is not None and reached.is_below(most) if kept else reached.is_above(most)
    return LimitVerdict(latency=latency, statistic=statistic, limit=limit, estimate=estimate, kept=kept, sure=sure)


def _at_most(latency: Latency | None, limit: float, estimate: Estimate) -> tuple[Estimate, float]:
    """Return an estimate and the most that it may be. A share of requests becomes the share of the others."""
    if latency is not None:
        return estimate, limit
    return replace(estimate, value=1.0 - estimate.value), _most_missing(limit)


def _most_missing(share: float) -> float:
    return 1.0 - share + ROUNDING


# --- a sweep by any service level


def as_swept(summary: Summary, verdict: LevelVerdict) -> Summary:
    """Return a summary for `hetis.simulator.running.sweep` with the level's estimates as p95 TTFT and mean TPOT.

    A sweep compares these two with limits and knows no others; with those of `swept_limits` it searches by the level.
    """
    names = {Latency.TTFT: "ttft_p95_s", Latency.TPOT: "mean_tpot_s", None: "ttft_p95_s"}
    estimates: dict[str, Any] = {
        names[one.latency]: _at_most(one.latency, one.limit, one.estimate)[0] for one in verdict.limits
    }
    return replace(summary, **estimates)


def swept_limits(level: ServiceLevel, limits: Objective) -> Objective:
    """Return the limits for the estimates of `as_swept`."""
    if level.attainment is None:
        return limits
    return replace(limits, ttft_limit_s=_most_missing(level.attainment), tpot_limit_s=None)
