"""What has to keep the limits of a plan: p95 TTFT and mean TPOT, other statistics of them, or a share of requests.

The search plans by p95 TTFT and mean TPOT, whatever is asked for: the cost model knows no others. The simulator does,
and holds the plan to them (`hetis.planner.use_cases.verify`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from hetis.solver.errors import InvalidProblemError

if TYPE_CHECKING:
    from hetis.simulator.metrics import Distribution, Summary
    from hetis.simulator.steadiness import Estimate
    from hetis.solver.plan import Objective, Plan

SERVICE_LEVEL = "service_level"  # entry of `Plan.inputs`; absent: the default one
CLOSE = 0.9  # of a limit on a tail: from here on, that of a longer run decides


class Statistic(StrEnum):
    """A statistic of a latency over requests; ``mean`` of TPOT is over tokens."""

    MEAN = "mean"
    P50 = "p50"
    P90 = "p90"
    P95 = "p95"
    P99 = "p99"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevel:
    """What keeps the limits on TTFT and TPOT: a statistic of each, or with ``attainment`` that share of the requests,
    each of which has to keep both."""

    ttft: Statistic = Statistic.P95
    tpot: Statistic = Statistic.MEAN
    attainment: float | None = None

    def __post_init__(self) -> None:
        if self.attainment is not None and not 0.0 < self.attainment <= 1.0:
            raise InvalidProblemError(f"attainment is {self.attainment:g}, must be above 0 and at most 1")

    def data(self) -> dict[str, Any]:
        """Return the entry of `Plan.inputs`."""
        return asdict(self)

    def ttft_s(self, summary: Summary) -> Measured:
        """Return the limited TTFT; its interval is that of p95, in proportion."""
        return _measured(self.ttft, Statistic.P95, summary.ttft_p95_s, summary.ttft_s)

    def tpot_s(self, summary: Summary) -> Measured:
        """Return the limited TPOT; its interval is that of the mean, in proportion."""
        return _measured(self.tpot, Statistic.MEAN, summary.mean_tpot_s, summary.tpot_s)

    def limited(self, summary: Summary, limits: Objective) -> Iterator[Limited]:
        """Yield what was simulated beside each limit; shares of requests, where these are asked for."""
        ttft, tpot = self.ttft_s(summary), self.tpot_s(summary)
        if self.attainment is not None:
            missing = 1.0 - summary.attainment
            half = missing * max(one.half_width / one.value if one.value else 0.0 for one in (ttft, tpot))
            yield Limited(missing - half, missing, missing + half, 1.0 - self.attainment, CLOSE)
            return
        for (value, half), limit, close in (
            (ttft, limits.ttft_limit_s, CLOSE),
            (tpot, limits.tpot_limit_s, self._close),
        ):
            if limit is not None:
                yield Limited(value - half, value, value + half, limit, close)

    @property
    def _close(self) -> float:
        return 1.0 if self.tpot is Statistic.MEAN else CLOSE


DEFAULT = ServiceLevel()


class Measured(NamedTuple):
    """Seconds, and the half width of their interval; 0 if that is not known: such an interval excuses nothing."""

    value: float
    half_width: float


class Limited(NamedTuple):
    """What has a limit, with the ends of its interval; in seconds, or as a share of requests."""

    low: float
    value: float
    high: float
    limit: float
    close: float  # the share of the limit from which on a longer run decides


def service_level_of(plan: Plan) -> ServiceLevel:
    """Return what a plan is held to; the default if it says nothing readable."""
    found = plan.inputs.get(SERVICE_LEVEL)
    names = {field.name for field in fields(ServiceLevel)}
    if not isinstance(found, Mapping) or set(found) != names:
        return DEFAULT
    share = found["attainment"]
    try:
        return ServiceLevel(
            ttft=Statistic(found["ttft"]),
            tpot=Statistic(found["tpot"]),
            attainment=None if share is None else float(share),
        )
    except (TypeError, ValueError, InvalidProblemError):
        return DEFAULT


def _measured(asked: Statistic, usual: Statistic, estimate: Estimate, distribution: Distribution) -> Measured:
    half_width = estimate.half_width if estimate.half_width >= 0 else 0.0
    if asked is usual:
        return Measured(estimate.value, half_width)
    value: float = getattr(distribution, asked.value)
    return Measured(value, value * half_width / estimate.value if estimate.value else 0.0)
