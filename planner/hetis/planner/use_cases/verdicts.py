"""Simulated loads held to a service level, and the sweep of rates by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from hetis.planner.use_cases.service_level import (
    DEFAULT,
    Latency,
    Limited,
    ServiceLevel,
    Statistic,
    asked_level,
    held,
    limits_of,
    service_level_of,
)
from hetis.simulator.metrics import Metrics, Summary
from hetis.simulator.steadiness import Estimate
from hetis.simulator.values import RequestLog, Run
from hetis.solver.plan import Objective, Plan

ROUNDING = 1e-12  # far less than one request in all; 1.0 - 0.9 is less than 0.1
_READ = ("arrival_s", "first_token_s", "finished_s", "output_tokens")  # the fields of a run that `held` reads


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
    asked = asked_level(ttft=ttft, tpot=tpot, attainment=attainment, objective=limits, verify=True)
    level, limited = service_level_of(plan), limits_of(limits)
    if attainment is not None:
        level = asked
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
    found = held(level, replace(summary, warm_up_s=0.0), run, limits)  # warm-ups differ, and are left out already
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
