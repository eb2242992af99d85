"""What must keep the limits of a plan: p95 TTFT and mean TPOT, other statistics of them, or a share of requests.

The search plans by p95 TTFT and mean TPOT whatever is requested, since the cost model knows no others. The simulator
does, and holds the plan to them (`hetis.planner.use_cases.verify`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from hetis.solver.errors import InvalidProblemError

if TYPE_CHECKING:
    from collections.abc import Callable

    from hetis.simulator.metrics import Summary
    from hetis.simulator.steadiness import Estimate
    from hetis.simulator.values import FloatArray, Run
    from hetis.solver.plan import Objective, Plan

SERVICE_LEVEL = "service_level"  # entry of `Plan.inputs`; absent: the default level
TAIL = 0.9  # share of a limit on a tail statistic from which a longer run decides
SHARE = 0.6  # such a share of the allowed misses; an exponential tail is then at 90% of its limit
FEWEST_MISSES = 50  # misses for which a run should have room
NEVER_S = 1e15  # stands for the latency of a request that never finished
RULE_OF_THREE = 3.0  # if none of n requests missed, up to 3 / n of all may, with 95% certainty


class Latency(StrEnum):
    """A latency that may have a limit."""

    TTFT = "TTFT"
    TPOT = "TPOT"


class Statistic(StrEnum):
    """A statistic of a latency over requests; the ``mean`` of TPOT is over tokens."""

    MEAN = "mean"
    P50 = "p50"
    P90 = "p90"
    P95 = "p95"
    P99 = "p99"

    def __call__(self, values: FloatArray) -> float:
        """Return the statistic over the latencies of single requests, in seconds."""
        import numpy as np

        return float(values.mean() if self is Statistic.MEAN else np.percentile(values, int(self[1:])))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """What must keep the limits on TTFT and TPOT: a statistic of each or, with ``attainment``, a share of the requests.

    With ``attainment``, each of these requests must keep both limits (the goodput of DistServe and of vLLM's
    benchmark).
    """

    ttft: Statistic = Statistic.P95
    tpot: Statistic = Statistic.MEAN
    attainment: float | None = None

    def __str__(self) -> str:
        if self.attainment is not None:
            return f"{100 * self.attainment:g}% of the requests within all limits"
        return f"{self.ttft} of TTFT and {self.tpot} of TPOT within their limits"

    def data(self) -> dict[str, Any]:
        """Return the level as an entry of `Plan.inputs`."""
        return asdict(self)

    def statistic(self, latency: Latency) -> Statistic:
        return self.ttft if latency is Latency.TTFT else self.tpot

    def requests(self, most: int) -> int:
        """Return how many requests a run needs to measure the share, at most ``most``; 0: any number will do."""
        if self.attainment is None:
            return 0
        return most if self.attainment == 1.0 else min(most, math.ceil(FEWEST_MISSES / (1.0 - self.attainment)))


DEFAULT = ServiceLevel()


def asked_level(
    *, ttft: Statistic | None, tpot: Statistic | None, attainment: float | None, objective: Objective, verify: bool
) -> ServiceLevel:
    """Return the requested service level; arguments that are None request nothing.

    Raises:
        InvalidProblemError: the level contradicts itself or has no limit to keep, or nothing is simulated.
    """
    statistics = {
        latency: one for latency, one in ((Latency.TTFT, ttft), (Latency.TPOT, tpot)) if one is not None
    }  # fmt: skip
    limits = limits_of(objective)
    if attainment is not None and not 0.0 < attainment <= 1.0:
        raise InvalidProblemError(f"attainment is {attainment:g}, must be above 0 and at most 1 (100%)")
    if attainment is not None and statistics:
        raise InvalidProblemError(
            "--attainment counts the requests within all limits, so no statistic is taken: "
            f"leave out {' and '.join(map(_option, statistics))}"
        )
    for latency in statistics:
        if latency not in limits:
            raise InvalidProblemError(f"{_option(latency)} is given, but {latency} has no limit (--{latency.lower()})")
    if attainment is not None and not limits:
        raise InvalidProblemError("--attainment is given, but neither TTFT nor TPOT has a limit (--ttft, --tpot)")
    if (statistics or attainment is not None) and not verify:
        given = [*map(_option, statistics), *(["--attainment"] if attainment is not None else [])]
        raise InvalidProblemError(
            f"{' and '.join(given)} can only be checked in the simulation, which --no-verify skips"
        )
    return ServiceLevel(ttft=ttft or DEFAULT.ttft, tpot=tpot or DEFAULT.tpot, attainment=attainment)


def _option(latency: Latency) -> str:
    return f"--{latency.lower()}-statistic"


def service_level_of(plan: Plan) -> ServiceLevel:
    """Return the level to which a plan is held; the default if its entry is missing or unreadable."""
    return service_level_from_data(plan.inputs.get(SERVICE_LEVEL))


def service_level_from_data(found: object) -> ServiceLevel:
    """Return the level from which `ServiceLevel.data` made an entry; the default if the entry is unreadable."""
    names = {field.name for field in fields(ServiceLevel)}
    if not isinstance(found, Mapping) or set(found) != names:
        return DEFAULT
    try:
        share = None if found["attainment"] is None else float(found["attainment"])
        level = ServiceLevel(ttft=Statistic(found["ttft"]), tpot=Statistic(found["tpot"]), attainment=share)
    except (OverflowError, TypeError, ValueError):
        return DEFAULT
    return level if share is None or 0.0 < share <= 1.0 else DEFAULT


def limits_of(objective: Objective) -> dict[Latency, float]:
    """Return the limits of an objective that has them, in seconds."""
    limits = {Latency.TTFT: objective.ttft_limit_s, Latency.TPOT: objective.tpot_limit_s}
    return {latency: limit for latency, limit in limits.items() if limit is not None}


class Limited(NamedTuple):
    """A limited quantity with the ends of its interval, in seconds or as a share of requests."""

    low: float
    value: float
    high: float
    limit: float
    close: float  # share of the limit from which a longer run decides


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A run compared with the limits: the quantities that the level limits, and details for reports."""

    limited: tuple[Limited, ...]
    seconds: Mapping[Latency, float]  # values of the requested statistics that are not the usual ones
    missed: Mapping[Latency, float]  # share of the requests over each limit; empty without an attainment


def held(level: ServiceLevel, summary: Summary, run: Run | None, limits: Objective) -> Held:
    """Return a run compared with the limits; ``run`` is needed for all levels but the default."""
    usual = {Latency.TTFT: summary.ttft_p95_s, Latency.TPOT: summary.mean_tpot_s}
    bounds = limits_of(limits)
    if run is None or level == DEFAULT:
        found = [_limited(usual[latency], limit, DEFAULT.statistic(latency)) for latency, limit in bounds.items()]
        return Held(limited=tuple(found), seconds={}, missed={})
    values = _by_request(run, summary.warm_up_s)
    if level.attainment is not None:
        return _attained(level.attainment, values, bounds)
    estimates = {
        latency: usual[latency]
        if level.statistic(latency) is DEFAULT.statistic(latency)
        else _within_run(values[latency], level.statistic(latency))
        for latency in Latency
    }
    return Held(
        limited=tuple(
            _limited(estimates[latency], limit, level.statistic(latency)) for latency, limit in bounds.items()
        ),
        seconds={latency: one.value for latency, one in estimates.items() if one is not usual[latency]},
        missed={},
    )


def share_within(share: float, asked: float) -> str:
    """Return a share of requests as text, rounded down.

    It has enough digits not to be mistaken for the ``asked`` share.
    """
    decimals = 4 if asked == 1.0 else max(1, math.ceil(-math.log10(1.0 - asked)))
    return f"{math.floor(share * 10 ** (decimals + 2)) / 10**decimals:.{decimals}f}%"


def _limited(estimate: Estimate, limit: float, statistic: Statistic) -> Limited:
    half = estimate.half_width if estimate.half_width >= 0 else 0.0  # an unknown interval excuses no miss
    close = 1.0 if statistic is Statistic.MEAN else TAIL
    return Limited(estimate.value - half, estimate.value, estimate.value + half, limit, close)


def _by_request(run: Run, warm_up_s: float) -> dict[Latency, FloatArray]:
    """Return the latencies of every request that arrived after the warm-up; infinite if it never finished.

    TPOT is NaN for a single token, which follows no other; it is within any limit.
    """
    import numpy as np

    inside = run.arrival_s >= warm_up_s
    ttft = (run.first_token_s - run.arrival_s)[inside]
    further = run.output_tokens[inside] - 1
    tpot = (run.finished_s - run.first_token_s)[inside] / np.where(further > 0, further, np.nan)
    done = np.isfinite(run.finished_s[inside])
    return {Latency.TTFT: np.where(done, ttft, np.inf), Latency.TPOT: np.where(done, tpot, np.inf)}


def _attained(attainment: float, values: Mapping[Latency, FloatArray], bounds: Mapping[Latency, float]) -> Held:
    import numpy as np

    over = {latency: values[latency] > limit for latency, limit in bounds.items()}
    any_over = np.any(list(over.values()), axis=0).astype(np.float64)
    estimate = _within_run(any_over, Statistic.MEAN)
    # One miss refutes 100%, and a run without any is as sure of it as its length allows: a longer one decides nothing.
    by_chance = max(RULE_OF_THREE / max(1, len(any_over)), estimate.half_width)  # which may be NaN
    half = by_chance if attainment < 1.0 else 0.0
    missing = Limited(estimate.value - half, estimate.value, estimate.value + half, 1.0 - attainment, SHARE)
    shares = {name: float(one.mean()) if len(one) else math.nan for name, one in over.items()}
    return Held(limited=(missing,), seconds={}, missed=shares)


def _within_run(values: FloatArray, statistic: Callable[[FloatArray], float]) -> Estimate:
    """Return a statistic with its interval. Requests that never finished are the slowest in percentiles, and left out
    of means.
    """
    import numpy as np

    from hetis.simulator.steadiness import Estimate, within_run

    known = values[~np.isnan(values)]
    finished = known[np.isfinite(known)]
    if statistic is Statistic.MEAN or len(finished) == len(known):
        return within_run(finished, statistic)
    found = within_run(np.minimum(known, NEVER_S), statistic)  # infinity cannot be interpolated
    longest_s = finished.max(initial=0.0)
    return found if found.value <= longest_s else Estimate(value=math.inf)
