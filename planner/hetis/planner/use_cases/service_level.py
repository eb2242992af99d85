"""What must keep the limits of a plan: p95 TTFT and mean TPOT, other statistics of them, or a share of requests.

The search plans by p95 TTFT and mean TPOT whatever is requested, since the cost model knows no others. The simulator
does, and judges the plan by them (`hetis.planner.use_cases.simulation.judging`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from hetis.solver.errors import InvalidProblemError

if TYPE_CHECKING:
    from hetis.simulator.values import FloatArray
    from hetis.solver.plan import Objective

FEWEST_MISSES = 50  # misses for which a run should have room


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

    def statistic(self, latency: Latency) -> Statistic:
        return self.ttft if latency is Latency.TTFT else self.tpot

    def requests(self, most: int) -> int:
        """Return how many requests a run needs to measure the share, at most ``most``; 0: any number will do."""
        if self.attainment is None:
            return 0
        return most if self.attainment == 1.0 else min(most, math.ceil(FEWEST_MISSES / (1.0 - self.attainment)))


DEFAULT = ServiceLevel()


def requested_level(
    *, ttft: Statistic | None, tpot: Statistic | None, attainment: float | None, objective: Objective, verify: bool
) -> ServiceLevel:
    """Return the requested service level; arguments that are None request nothing.

    Raises:
        InvalidProblemError: the level contradicts itself or has no limit to keep, or nothing is simulated.
    """
    statistics = [latency for latency, one in ((Latency.TTFT, ttft), (Latency.TPOT, tpot)) if one is not None]
    limits = limits_of(objective)
    given = [*map(_option, statistics), *(["--attainment"] if attainment is not None else [])]
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
    if given and not verify:
        raise InvalidProblemError(
            f"{' and '.join(given)} can only be checked in the simulation, which --no-verify skips"
        )
    return ServiceLevel(ttft=ttft or DEFAULT.ttft, tpot=tpot or DEFAULT.tpot, attainment=attainment)


def _option(latency: Latency) -> str:
    return f"--{latency.lower()}-statistic"


def limits_of(objective: Objective) -> dict[Latency, float]:
    """Return the limits of an objective that has them, in seconds."""
    limits = {Latency.TTFT: objective.ttft_limit_s, Latency.TPOT: objective.tpot_limit_s}
    return {latency: limit for latency, limit in limits.items() if limit is not None}


def share_within(share: float, requested: float) -> str:
    """Return a share of requests as text, rounded down.

    It has enough digits not to be mistaken for the ``requested`` share.
    """
    decimals = 4 if requested == 1.0 else max(1, math.ceil(-math.log10(1.0 - requested)))
    return f"{math.floor(share * 10 ** (decimals + 2)) / 10**decimals:.{decimals}f}%"
