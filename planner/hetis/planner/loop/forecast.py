"""Forecasts of the peak demand of the next horizon, with an interval from the errors of past forecasts.

Rates are kept in bins of some minutes. For the bins of the next horizon, seven rules predict

    recent   the mean rate of the last bins; of minutes, since the last change (`History.level_rps`)
    season   the rate of the same time yesterday, a week ago, or on average of the last seven days, each of them
             times (recent / its rate before that time) ^ kappa,  kappa = 1 or 0

and the prediction of the horizon is their peak. At every second bin of the last two weeks each rule gets the same
question again; e = log(peak that came / peak predicted) are its errors. The upper end of its interval is the prediction
times exp(the quantile of e at ``coverage``), by the (n + 1)-st rank, so that what comes is at most that with this
probability as far as the next error is like the past ones (split conformal prediction: Vovk 2005). The rule whose ends
were the best ones for that coverage is taken (`_score`). Too few errors for the rank, they are taken as normal with a
prior (`PRIOR`), which decides while nothing is known. The lower end is that of the lowest rate, likewise.

What is forecast is a rate, what was measured are counts. Of a steady rate, the largest of the counts of a horizon's a
bins, n each, and their mean over the b bins of the level make errors of mean square (M + 1/b) / n by chance alone; M is
that of the largest of a standard normals. Quantiles are multiplied by sqrt(1 - that, and two standard deviations of
such a mean, / the mean square of e), so that at low rates chance does not pass for demand (plans have room for it).

The level of minutes is the mean of the last five, or since the rate has changed within them: the cut that explains
the counts best, if the likelihood ratio of two rates to one is above `CHANGED`. Of n requests those after a cut are
binomial if nothing changed, for which log L >= x has at most the probability 2 exp(-x) (Chernoff); 15 cuts in every
10 s make a false one in ten days. So it is as steady as a mean of minutes, and follows a jump at once.

Seasonal naive forecasts are what every other method is measured by (Hyndman and Athanasopoulos 2021, 5.2); what counts
here is that the interval is honest, whatever rule makes it. No library is used: those that fit more refined methods
take seconds where this takes a millisecond, and their intervals are of one bin rather than of a peak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hetis.planner.loop.drift import DAY_S, dispersion, usual_dispersion
from hetis.solver.errors import InvalidProblemError
from hetis.solver.traffic import TrafficSketch
from hetis.solver.workload import FloatArray

BIN_S, MINUTE_S = 300.0, 60.0
LEVEL_BINS, LEVEL_MINUTES = 2, 5  # the last ones at most, whose mean is the recent level
CHANGED = math.log(2 * 3 * LEVEL_MINUTES * DAY_S / 10 / 0.1)  # of a likelihood ratio: the rate has changed
SMOOTHED = 3  # bins over which seasons are averaged
KEPT_S = 15 * DAY_S  # history that is used: two weeks, and a day before
MINUTES_KEPT_S = 6 * 3600.0
LEAST_MINUTES = 5  # that must be known for a forecast by minutes
PRIOR = 10, 0.15  # weight in past errors, and relative error, that are assumed while nothing is known
ASKED_EVERY = 2  # bins; neighbouring ones have nearly the same errors
LEAST_ERRORS = 24  # from which on a season is used: four hours of them
LEAST_RPS = 1e-3
SEASONS = {"yesterday": (1,), "last week": (7,), "the last seven days": tuple(range(1, 8))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The traffic of ``traffic.seconds`` from ``start_s`` on."""

    start_s: float
    traffic: TrafficSketch


class Level(NamedTuple):
    """A rate now, and the relative standard deviation that counting its requests has."""

    rate_rps: float
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class History:
    """Arrival rates of equal bins, the last of which ends at ``end_s``, and the whole traffic of the last minutes.

    Attributes:
        rates: requests/s by bin, at most `KEPT_S` of them; NaN where nothing was observed.
        minutes: requests/s of the last minutes, at most `MINUTES_KEPT_S` of them; NaN likewise.
        recent: consecutive windows of the last hour or so, the earliest first.
    """

    end_s: float
    rates: FloatArray
    minutes: FloatArray = field(default_factory=lambda: np.zeros(0))
    recent: tuple[Window, ...] = ()
    bin_s: float = BIN_S

    @classmethod
    def of_windows(cls, windows: Sequence[Window], now_s: float, *, recent_s: float = 3600.0) -> History:
        """Return the history of windows such as minutes of the last hours, and hours of the last weeks."""
        first = min((one.start_s for one in windows), default=now_s)
        size = min(round(KEPT_S / BIN_S), math.ceil((now_s - first) / BIN_S))
        start_s = now_s - size * BIN_S
        short = [one for one in windows if 0 < one.traffic.seconds < BIN_S and one.start_s >= start_s]
        bins = np.array([min(size - 1, int((one.start_s - start_s) / BIN_S)) for one in short], dtype=int)
        seconds = np.bincount(bins, [one.traffic.seconds for one in short], minlength=size)
        arrivals = np.bincount(bins, [one.traffic.arrivals for one in short], minlength=size)
        fine = np.where(seconds > BIN_S / 2, arrivals / np.maximum(seconds, 1.0), np.nan)
        long = sorted((one for one in windows if one.traffic.seconds >= BIN_S), key=lambda one: one.start_s)
        spans = np.array([(one.start_s - start_s, one.traffic.seconds) for one in long]).reshape(-1, 2) / BIN_S
        rates = with_hours(fine, spans, np.array([one.traffic.rate_per_s for one in long]))
        recent = [one for one in windows if one.start_s >= now_s - recent_s and one.traffic.seconds < BIN_S]
        latest = [one for one in short if one.start_s >= now_s - MINUTES_KEPT_S]
        last = max((one.start_s for one in latest), default=now_s)
        minutes = np.full(round(min(MINUTES_KEPT_S, last - first + MINUTE_S) / MINUTE_S) if latest else 0, np.nan)
        for one in latest:
            if (back := round((last - one.start_s) / MINUTE_S)) < len(minutes):
                minutes[len(minutes) - 1 - back] = one.traffic.rate_per_s
        recent.sort(key=lambda one: one.start_s)
        return cls(end_s=now_s, rates=rates, minutes=minutes, recent=tuple(recent))

    def level(self) -> Level:
        """Return the mean rate of the last minutes, or since it has changed within them; 0 if nothing is known."""
        windows = self._counted()
        counts, times_s = (np.array(each[::-1]) for each in windows)
        minutes = _without_holes(self.minutes)[::-1][round(times_s.sum() / MINUTE_S) :] * MINUTE_S  # before the windows
        counts, times_s = np.append(counts, minutes), np.append(times_s, np.full(len(minutes), MINUTE_S))
        latest = times_s.cumsum() <= (LEVEL_MINUTES + 0.01) * MINUTE_S
        counts, times_s = counts[latest], times_s[latest]
        changed = CHANGED * usual_dispersion(*windows)
        while len(counts) > 1:
            n, seconds = counts.cumsum(), times_s.cumsum()
            ratios = _log_ratios(n[:-1], seconds[:-1], n[-1], seconds[-1])
            if ratios[cut := int(ratios.argmax())] < changed:
                break
            counts, times_s = counts[: cut + 1], times_s[: cut + 1]
        n_all = float(counts.sum())
        return Level(n_all / max(1.0, float(times_s.sum())), 1 / math.sqrt(max(1.0, n_all)))

    @property
    def known_bins(self) -> int:
        return int(np.count_nonzero(~np.isnan(self.rates)))

    def by_minutes(self) -> History | None:
        """Return the last hours in minutes; None if too few are known."""
        if np.count_nonzero(~np.isnan(self.minutes)) < LEAST_MINUTES:
            return None
        return History(end_s=self.end_s, rates=self.minutes, bin_s=MINUTE_S)

    def traffic_since(self, start_s: float) -> TrafficSketch:
        """Return the whole traffic since a time, as far as it is kept."""
        parts = [one.traffic for one in self.recent if one.start_s >= start_s - 1e-6]
        return sum(parts[1:], parts[0]) if parts else TrafficSketch()

    def dispersion(self) -> float:
        """Return the variance of the arrivals in a recent window over their mean; 1 is Poisson."""
        return dispersion(*self._counted())

    def _counted(self) -> tuple[list[float], list[float]]:
        """Return the arrivals and the seconds of the recent windows."""
        whole = [one.traffic for one in self.recent if one.traffic.seconds > 0]
        return [one.arrivals for one in whole], [one.seconds for one in whole]


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The rates of a horizon: the peak that is expected, and an interval that contains all with probability `coverage`.

    Attributes:
        errors: past errors that the interval is made of; 0: only the prior.
    """

    expected_rps: float
    low_rps: float
    high_rps: float
    coverage: float
    rule: str
    errors: int

    def __str__(self) -> str:
        source = f"the errors of {self.errors} forecasts" if self.errors else "an assumed error: there is no history"
        return f"up to {self.high_rps:.4g} requests/s are expected ({self.coverage:.3g}, by {self.rule} and {source})"


def forecast(history: History, horizon_s: float, coverage: float, level_rps: float | None = None) -> Forecast:
    """Return the forecast of the time from the end of a history on.

    Args:
        history: what was measured.
        horizon_s: how far to look ahead.
        coverage: probability that no bin of the horizon has a rate above the interval, and likewise below.
        level_rps: the rate now, if it is known to have left what the last bins say.

    Raises:
        InvalidProblemError: nothing was measured, or the coverage is not a probability.
    """
    if not 0.5 <= coverage < 1:
        raise InvalidProblemError(f"coverage is {coverage:g}, must be at least 0.5 and below 1")
    rates = _without_holes(history.rates)
    if not len(rates):
        if level_rps is None:
            raise InvalidProblemError("there is no traffic to forecast from")
        rates = np.array([level_rps])
    ahead = max(1, math.ceil(horizon_s / history.bin_s))
    peaks, lows = _came(rates, ahead)
    candidates = list[tuple[_Rule, FloatArray, FloatArray]]()
    for rule in _rules(rates, history.bin_s, ahead, is_level_known=level_rps is not None):
        bins, past = rule.past()
        up: FloatArray = np.log(peaks[bins] / past.max(axis=1))
        down: FloatArray = np.log(lows[bins] / past.min(axis=1))
        if not candidates or len(up) >= LEAST_ERRORS:
            candidates.append((rule, up, down))
    common = min(len(up) for _, up, _ in candidates)
    rule, up, down = min(candidates, key=lambda one: _score(one[1], common, coverage))
    now = rule.at(len(rates), level_rps)
    beyond_chance = partial(_beyond_chance, rates=rates, bin_s=history.bin_s, ahead=ahead)
    return Forecast(
        expected_rps=float(now.max()),
        low_rps=float(now.min()) * math.exp(-_quantile(-down, coverage) * beyond_chance(down)),
        high_rps=float(now.max()) * math.exp(_quantile(up, coverage) * beyond_chance(up)),
        coverage=coverage, rule=rule.name,
        errors=len(up),
    )  # fmt: skip


def demand(history: History, horizon_s: float, coverage: float, level_rps: float | None = None) -> Forecast:
    """Return the forecast of a horizon: by minutes, if it is within a bin and enough of them are known.

    Raises InvalidProblemError if nothing was measured.
    """
    by_minutes = history.by_minutes() if horizon_s <= history.bin_s else None
    if by_minutes is None:
        return forecast(history, horizon_s, coverage, level_rps)
    return forecast(by_minutes, horizon_s, coverage, history.level().rate_rps if level_rps is None else level_rps)


def _beyond_chance(errors: FloatArray, rates: FloatArray, bin_s: float, ahead: int) -> float:
    """Return the part of errors that is not that of counting; 1 while too few are known."""
    if len(errors) < LEAST_ERRORS or not (square := float(errors @ errors) / len(errors)):
        return 1.0
    by_chance = (_square_of_largest(ahead) + 1 / _level_bins(bin_s)) / (float(rates.mean()) * bin_s)
    return math.sqrt(max(0.0, 1 - by_chance * (1 + 2 * math.sqrt(2 / len(errors))) / square))


@cache
def _square_of_largest(count: int) -> float:
    """Return the mean square of the largest of so many standard normals."""
    at = NormalDist()
    values = [at.inv_cdf(((k + 0.5) / 2000) ** (1 / count)) for k in range(2000)]
    return math.fsum(value * value for value in values) / len(values)


def _score(errors: FloatArray, common: int, coverage: float) -> float:
    """Return the mean loss of the interval's end at the last ``common`` errors: the quantile score, proper at this
    coverage (Gneiting and Raftery 2007).
    """
    over = errors[len(errors) - common :] - _quantile(errors, coverage)
    return float(np.where(over > 0, coverage * over, (coverage - 1) * over).sum())


Bins = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rule:
    """A rule: ``level`` is the recent level up to each bin, ``season`` the smoothed rates, ``days`` where it looks."""

    name: str
    level: FloatArray
    season: FloatArray
    bins_a_day: int
    ahead: int
    least: int  # bins of the level
    days: tuple[int, ...] = ()
    kappa: float = 0.0

    def at(self, bin_: int, level: float | None = None) -> FloatArray:
        """Return the predictions for the bins from ``bin_`` on."""
        found: FloatArray = self._predict(np.array([bin_]), None if level is None else np.array([level]))[0]
        return found

    def past(self) -> tuple[Bins, FloatArray]:
        """Return the bins at which it could have predicted, and those predictions [bins, ahead]."""
        first = max((*self.days, 0)) * self.bins_a_day + self.least
        bins = np.arange(len(self.level) - self.ahead, first - 1, -ASKED_EVERY, dtype=np.int64)[::-1]
        return bins, self._predict(bins, None)

    def _predict(self, bins: Bins, level: FloatArray | None) -> FloatArray:
        now = self.level[bins - 1] if level is None else level
        if not self.days:
            return np.repeat(now[:, None], self.ahead, axis=1)
        found: FloatArray = np.zeros((len(bins), self.ahead))
        for day in self.days:
            then = bins - day * self.bins_a_day
            ratio = (now / self.season[then - 1]) ** self.kappa
            found += self.season[then[:, None] + np.arange(self.ahead)] * ratio[:, None] / len(self.days)
        return found


def _rules(rates: FloatArray, bin_s: float, ahead: int, *, is_level_known: bool) -> list[_Rule]:
    bins_a_day = round(DAY_S / bin_s)
    smooth = _mean_of_last(np.pad(rates, (0, SMOOTHED // 2), mode="edge"), SMOOTHED)[SMOOTHED // 2 :]
    recent = _Rule(
        name="the recent rate",
        level=_levels(rates, bin_s),
        season=smooth,
        bins_a_day=bins_a_day,
        ahead=ahead,
        least=_level_bins(bin_s),
    )
    found = [recent]
    for (name, days), kappa in product(SEASONS.items(), (1.0, 0.0)):
        if len(rates) > days[-1] * bins_a_day + 2 * ahead and (kappa or not is_level_known):
            how = " at the level of now" if kappa else ""
            found.append(replace(recent, name=f"{name}{how}", days=days, kappa=kappa))
    return found


def _level_bins(bin_s: float) -> int:
    return LEVEL_BINS if bin_s > MINUTE_S else LEVEL_MINUTES


def _levels(rates: FloatArray, bin_s: float) -> FloatArray:
    """Return the level up to each bin: of minutes, since the change within them that explains them best, if any."""
    bins = _level_bins(bin_s)
    found = _mean_of_last(rates, bins)
    if bin_s > MINUTE_S:
        return found
    best, whole = np.full(len(rates), CHANGED), found
    for cut in range(1, bins):
        since = _mean_of_last(rates, cut)
        ratios = _log_ratios(since * cut * bin_s, cut * bin_s, whole * bins * bin_s, bins * bin_s)
        found, best = np.where(ratios > best, since, found), np.maximum(ratios, best)
    return found


def _log_ratios(counts: FloatArray, seconds: FloatArray | float, all_counts: Any, all_seconds: float) -> FloatArray:
    """Return the log of the likelihood ratio of a rate in some seconds and another before to one in all of them."""
    before, rate = np.maximum(0.0, all_counts - counts), np.maximum(all_counts / all_seconds, LEAST_RPS)

    def part(n: FloatArray, time_s: FloatArray | float) -> FloatArray:
        found: FloatArray = n * np.log(np.maximum(n / time_s, LEAST_RPS) / rate)
        return found

    return part(counts, seconds) + part(before, all_seconds - seconds)


def _mean_of_last(rates: FloatArray, count: int) -> FloatArray:
    """Return the mean of each bin and those before it, ``count`` together."""
    padded = np.pad(rates, (count - 1, 0), mode="edge")
    found: FloatArray = np.convolve(padded, np.full(count, 1 / count), mode="valid")
    return found


def _came(rates: FloatArray, ahead: int) -> tuple[FloatArray, FloatArray]:
    """Return the highest and the lowest rate of every ``ahead`` bins from each bin on."""
    if len(rates) < ahead:
        return np.zeros(0), np.zeros(0)
    windows = np.lib.stride_tricks.sliding_window_view(rates, ahead)
    return windows.max(axis=1), windows.min(axis=1)


def _quantile(errors: FloatArray, coverage: float) -> float:
    """Return what the next error is at most, with probability ``coverage``, as far as it is like these."""
    n = len(errors)
    if n >= 2 * LEAST_ERRORS and (rank := math.ceil((n + 1) * coverage)) <= n:
        return float(np.sort(errors)[rank - 1])
    weight, spread = PRIOR
    usual = np.clip(errors, -2 * spread, 2 * spread)  # a service's start is none of its usual changes
    variance = (weight * spread**2 + float(usual @ usual)) / (weight + n)
    return NormalDist().inv_cdf(coverage) * math.sqrt(variance)


def with_hours(fine: FloatArray, spans: FloatArray, hourly: FloatArray) -> FloatArray:
    """Return the rates of bins, those that are not known (NaN) by the hours, or other long windows, that contain them.

    Rates are interpolated between the middles of hours, and have the unevenness of the bins that are known: without it
    past forecasts would seem to have missed by less than those of a bin do.

    Args:
        fine: rates by bin.
        spans: start and length of each long window, in bins, by start.
        hourly: their rates.
    """
    unknown = np.isnan(fine)
    if not len(hourly) or not unknown.any():
        return fine
    bins = np.arange(len(fine))
    by_hours = np.interp(bins + 0.5, spans.sum(axis=1) - spans[:, 1] / 2, hourly)
    inside = np.zeros(len(fine), dtype=bool)
    for start, length in spans:
        inside[max(0, round(start)) : max(0, round(start + length))] = True
    known = fine[~unknown]
    uneven = np.ones(1)
    if len(known) >= 12 and known.mean() > 0:
        trend = np.convolve(np.pad(known, (6, 5), mode="edge"), np.full(12, 1 / 12), mode="valid")
        uneven = known / np.maximum(trend, LEAST_RPS)
    found: FloatArray = np.where(unknown & inside, by_hours * np.resize(uneven, len(fine)), fine)
    return found


def _without_holes(rates: FloatArray) -> FloatArray:
    """Return rates with the last known one in place of those that were not observed, and none before the first."""
    known = np.flatnonzero(~np.isnan(rates))
    if not len(known):
        return np.zeros(0)
    places = np.maximum.accumulate(np.where(np.isnan(rates), 0, np.arange(len(rates))))[known[0] :]
    found: FloatArray = np.maximum(rates[places], LEAST_RPS)
    return found
