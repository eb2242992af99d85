"""`DriftTest`: whether traffic has left what was expected of it, with a stated rate of false alarms.

Sketches come in one by one. Arrivals in a window of w seconds are Poisson with some rate in the expected band
[low, high]; each class of lengths has some share of the requests in its own band. For every alternative (a rate that
is rho times above the band, a share whose odds are) the likelihood ratio of the window against the *edge* of the band,

    rate   log L = (n log rho - (rho - 1) high w) / phi
    share  log L = (m log(q / high) + (n - m) log((1 - q) / (1 - high))) / phi       of n requests m are in the class

has a mean of at most 1 wherever in the band the truth is: the mean grows with the rate, or the share, and is 1 at the
edge. So the Shiryaev-Roberts statistic of a window, R = (1 + R of the one before) L, and any mixture of them over
alternatives, has after N windows a mean of at most N, and by Markov's inequality at the first alarm

    P(an alarm within N windows) <= N / A        for alarms at R >= A.

With A = (tests * windows per day) / (false alarms per day), a day without drift has a false alarm with at most the
stated probability; bands may change from window to window. ``phi`` is the dispersion of counts, their variance over
their mean: the bound is exact where counts are phi times Poisson, and phi is measured (`dispersion`). The statistic
keeps no memory longer than it is worth: it starts again, one window later, at each window. Sources: Lorden (1971) for
CUSUM, of which R is an upper bound; Shin, Ramdas and Rinaldo, "E-detectors" (2024), for bands and mixtures.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hetis.solver.traffic import TOKENS, TrafficSketch
from hetis.solver.workload import FloatArray, Workload

RATIOS = (1.25, 1.5, 2.0, 4.0)  # rates, and odds of shares, for which the test is made, beyond a band's edge
SHARES = (0.5, 0.15)  # of the requests that are longer than the edges at which lengths are divided
DAY_S = 86400.0
MEDIAN_SQUARE = 0.4549  # of a standard normal
LATE, LATE_S, LEAST_LATE, LATE_SHARE = "ttft_s", 45.0, 20, 0.5  # see `late`


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareBand:
    """The expected share of the requests with more than ``edge`` tokens: of prompts, or of outputs."""

    lengths: str  # "prompt_tokens" or "output_tokens", as a `TrafficSketch` calls them
    edge: float
    low: float
    high: float

    def inside(self, sketch: TrafficSketch) -> tuple[float, float]:
        """Return how many of a time's requests have more tokens, and how many ended."""
        counts = getattr(sketch, self.lengths).counts
        return math.fsum(counts[bisect_left(TOKENS.edges, self.edge) + 1 :]), math.fsum(counts)

    def share_of(self, sketch: TrafficSketch) -> float:
        inside, ended = self.inside(sketch)
        return inside / ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is expected of traffic: bands of its rate in requests/s, and of its mix.

    ``dispersion`` is the variance of counts over their mean.
    """

    low_rps: float
    high_rps: float
    shares: tuple[ShareBand, ...] = ()
    dispersion: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What has left its band, where it is now, and since when."""

    what: str  # "rate", the lengths of a `ShareBand`, or "ttft_s" (`late`)
    rises: bool
    value: float  # requests/s, or the share, since then
    band: tuple[float, float]
    since_s: float
    edge: float = 0.0  # tokens, or seconds, above which requests count in the share

    @property
    def is_of_mix(self) -> bool:
        return self.what in ("prompt_tokens", "output_tokens")

    def __str__(self) -> str:
        low, high = self.band
        if self.what == LATE:
            return f"{self.value:.0%} of the first tokens of the last minute came after {self.edge:g} s"
        if not self.is_of_mix:
            return f"{self.value:.4g} requests/s arrive, {low:.4g} to {high:.4g} were expected"
        what = self.what.removesuffix("_tokens")
        return (
            f"{self.value:.0%} of {what}s are longer than {self.edge:g} tokens, {low:.0%} to {high:.0%} were expected"
        )


def expected_shares(workload: Workload, tolerance: float) -> tuple[ShareBand, ...]:
    """Return the bands of a workload's mix: ``tolerance`` on both sides of its shares above a few lengths: the two
    around each of `SHARES`. Requests of one length have all, or none, above each.
    """
    weights = np.array([one.weight for one in workload.bins])
    weights = weights / weights.sum()
    found = dict[tuple[str, float], ShareBand]()
    for lengths in ("prompt_tokens", "output_tokens"):
        tokens = np.array([getattr(one, lengths) for one in workload.bins])
        above = [float(weights[tokens > edge].sum()) for edge in TOKENS.edges]
        for wanted in SHARES:
            beyond = next(k for k, share in enumerate(above) if share <= wanted)
            for k in (max(0, beyond - 1), beyond):
                low, high = max(0.0, above[k] - tolerance), min(1.0, above[k] + tolerance)
                found[lengths, TOKENS.edges[k]] = ShareBand(lengths=lengths, edge=TOKENS.edges[k], low=low, high=high)
    return tuple(found.values())


def late(latest: Sequence[TrafficSketch], now_s: float, limit_s: float | None) -> Drift | None:
    """Return that a limit of TTFT is broken, if half of the first tokens of a minute are later than it, and of the last
    window, too. Unlike a drift that is no inference from chance: it is what the plan has to prevent, seen too late.
    """
    together = sum(latest[1:], latest[0]) if latest else TrafficSketch()
    is_minute = together.seconds >= LATE_S and together.ttft_s.count >= LEAST_LATE
    if limit_s is None or not is_minute or not latest[-1].ttft_s.count:
        return None
    if max(one.ttft_s.share_within(limit_s) for one in (together, latest[-1])) > LATE_SHARE:
        return None
    share = 1 - together.ttft_s.share_within(limit_s)
    return Drift(
        what=LATE, rises=True, value=share, band=(0.0, LATE_SHARE), since_s=now_s - together.seconds, edge=limit_s
    )


def dispersion(counts: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the variance of counts in windows of some seconds over their mean, at least 1, by the differences of
    successive rates, which no trend affects.
    """
    return max(1.0, float(np.mean(_squares(counts, seconds))))


def usual_dispersion(counts: Sequence[float], seconds: Sequence[float]) -> float:
    """Return it as most of the differences have it, which some jumps do not affect either."""
    return max(1.0, float(np.quantile(_squares(counts, seconds), 0.5, method="lower")) / MEDIAN_SQUARE)


def _squares(counts: Sequence[float], seconds: Sequence[float]) -> FloatArray:
    """Return the squared differences of successive rates over what they are on average by chance."""
    n, t = np.asarray(counts, dtype=float), np.asarray(seconds, dtype=float)
    if len(n) < 3 or n.sum() <= 0:
        return np.zeros(1)
    by_chance = float(n.sum() / t.sum()) * (1 / t[1:] + 1 / t[:-1])
    found: FloatArray = np.diff(n / t) ** 2 / by_chance
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Since:
    """What was counted since the best start of a statistic: the change point, if there is a change."""

    since_s: float = 0.0
    seconds: float = 0.0
    requests: float = 0.0
    inside: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftTest:
    """The state of the test. `after` returns the next one; after an alarm begin with a new test.

    Attributes:
        false_alarms_per_day: probability at most of an alarm in a day without drift.
        window_s: seconds of a sketch; shorter ones only make the rate of false alarms lower.
        statistics: log R by test and alternative.
        drift: the alarm, if there is one.
    """

    false_alarms_per_day: float
    window_s: float
    statistics: dict[tuple[str, float, bool], FloatArray] = field(default_factory=dict)
    since: dict[tuple[str, float, bool], _Since] = field(default_factory=dict)
    drift: Drift | None = None

    def after(self, now_s: float, sketch: TrafficSketch, expected: Expected) -> DriftTest:
        """Return the test after the traffic of one more window, which ends now."""
        cases = list(_cases(sketch, expected))
        limit = math.log(len(cases) * DAY_S / self.window_s / self.false_alarms_per_day * len(RATIOS))
        statistics, since, drift = (
            dict[tuple[str, float, bool], FloatArray](),
            dict[tuple[str, float, bool], _Since](),
            None,
        )
        highest = limit
        for case in cases:
            before = self.statistics.get(case.key, np.full(len(RATIOS), -math.inf))
            statistics[case.key] = after = np.logaddexp(0.0, before) + case.log_ratios / expected.dispersion
            begun = self.since.get(case.key, _Since())
            if before.max() <= 0.0:  # what came before speaks against a change
                begun = _Since(since_s=now_s - sketch.seconds)
            since[case.key] = begun = replace(
                begun, seconds=begun.seconds + case.seconds, requests=begun.requests + case.requests,
                inside=begun.inside + case.inside,
            )  # fmt: skip
            if (reached := float(np.logaddexp.reduce(after))) >= highest:
                highest, drift = reached, case.drift(begun)
        return replace(self, statistics=statistics, since=since, drift=drift)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One test in one window: of a rate (``inside`` of no requests) or of a share, on one side of its band."""

    key: tuple[str, float, bool]  # what, edge, and whether it rises
    band: tuple[float, float]
    log_ratios: FloatArray  # by alternative
    seconds: float
    requests: float
    inside: float

    def drift(self, begun: _Since) -> Drift:
        what, edge, rises = self.key
        value = begun.requests / begun.seconds if what == "rate" else begun.inside / begun.requests
        return Drift(what=what, rises=rises, value=value, band=self.band, since_s=begun.since_s, edge=edge)


def _cases(sketch: TrafficSketch, expected: Expected) -> Iterator[_Case]:
    ratios = np.array(RATIOS)
    n, seconds = sketch.arrivals, sketch.seconds
    band = expected.low_rps, expected.high_rps
    for rises, edge_rps, rho in ((True, band[1], ratios), (False, band[0], 1 / ratios)):
        log_ratios = n * np.log(rho) - (rho - 1) * edge_rps * seconds
        key = "rate", 0.0, rises
        yield _Case(key=key, band=band, log_ratios=log_ratios, seconds=seconds, requests=n, inside=0.0)
    for share in expected.shares:
        inside, ended = share.inside(sketch)
        for rises, edge_share, rho in ((True, share.high, ratios), (False, share.low, 1 / ratios)):
            if not 0 < edge_share < 1:  # nothing is beyond
                continue
            odds = rho * edge_share / (1 - edge_share)
            q = odds / (1 + odds)
            log_ratios = inside * np.log(q / edge_share) + (ended - inside) * np.log((1 - q) / (1 - edge_share))
            yield _Case(
                key=(share.lengths, share.edge, rises), band=(share.low, share.high), log_ratios=log_ratios,
                seconds=seconds, requests=ended, inside=inside,
            )  # fmt: skip
