"""Curves of traffic for rehearsals: rates over days, composed of a day's shape, noise, bursts and drifts, or read.

`composed_curve` has the shape of interactive services: least at four in the morning, a morning and an afternoon peak,
quieter weekends. On it lie a random level of each day, correlated noise of a few minutes, the unevenness inside the
hours of a trace (`unevenness`), and bursts. Its randomness is of rates; arrivals are Poisson around them.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hetis.formats.errors import DocumentError, Problem, single_problem
from hetis.planner.loop.drift import DAY_S
from hetis.solver.errors import InvalidProblemError
from hetis.solver.workload import FloatArray, Workload

STEP_S = 60.0
HOURS = (  # requests of each hour of a weekday over those of the busiest, from midnight on
    *(0.42, 0.36, 0.32, 0.30, 0.30, 0.33, 0.40, 0.52, 0.68, 0.85, 0.97, 1.00),
    *(0.93, 0.90, 0.97, 1.00, 0.98, 0.92, 0.83, 0.77, 0.73, 0.68, 0.60, 0.50),
)
WEEKEND = 0.62  # of a weekday's rates
DAY_LEVEL, NOISE, NOISE_MEMORY = 0.06, 0.04, 0.9  # relative deviations of days and of minutes; their correlation
NIGHT_S = 6 * 3600.0
MOST_DAYS = 120  # of a curve that is read: as many as history and days of a composed one together
UNEVEN_S = 300.0  # bins in which the unevenness of a trace is taken over; finer ones are mostly chance


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrafficCurve:
    """Requests/s in steps of `STEP_S`, and the requests that come from each time on, the first from 0 s.

    Before ``start_s`` lies history: what comes then is measured, and nothing is decided.
    """

    name: str
    rates: FloatArray
    mixes: tuple[tuple[float, Workload], ...]
    start_s: float = 0.0

    def __post_init__(self) -> None:
        if not len(self.rates) or not np.isfinite(self.rates).all() or (self.rates < 0).any() or not self.rates.any():
            raise InvalidProblemError(f"curve {self.name} needs rates that are finite, >= 0, and not all 0")
        if not 0 <= self.start_s < self.end_s:
            raise InvalidProblemError(f"curve {self.name} has {self.end_s:g} s, of which {self.start_s:g} are history")

    @property
    def end_s(self) -> float:
        return len(self.rates) * STEP_S

    def rate_at(self, now_s: float) -> float:
        return float(self.rates[min(int(now_s / STEP_S), len(self.rates) - 1)])

    def rates_within(self, start_s: float, end_s: float) -> FloatArray:
        """Return the rates of a time, at least one."""
        first = min(int(start_s / STEP_S), len(self.rates) - 1)
        return self.rates[first : max(first + 1, int(np.ceil(end_s / STEP_S)))]

    def mix_at(self, now_s: float) -> int:
        """Return the number of the requests that come."""
        return max(number for number, (from_s, _) in enumerate(self.mixes) if from_s <= now_s)

    def peak_rps(self) -> float:
        """Return the highest rate after the history."""
        return float(self.rates_within(self.start_s, self.end_s).max())

    def with_burst(self, at_s: float, seconds: float, factor: float) -> TrafficCurve:
        """Return the curve with its rates multiplied for a time, or until the end."""
        rates = self.rates.copy()
        rates[int(at_s / STEP_S) : int(np.ceil(min(self.end_s, at_s + seconds) / STEP_S))] *= factor
        return replace(self, rates=rates)

    def with_lengths(self, at_s: float, prompts: float, outputs: float) -> TrafficCurve:
        """Return the curve with requests that are longer by these factors from a time on."""
        last = self.mixes[-1][1]
        longer = tuple(
            replace(
                one,
                prompt_tokens=max(1.0, one.prompt_tokens * prompts),
                output_tokens=max(1.0, one.output_tokens * outputs),
            )
            for one in last.bins
        )
        return replace(self, mixes=(*self.mixes, (at_s, replace(last, bins=longer))))


def composed_curve(
    workload: Workload, *, days: int, peak_rps: float, history_days: int = 7, seed: int = 0,
    uneven: FloatArray | None = None, name: str = "composed",
) -> TrafficCurve:  # fmt: skip
    """Return the curve of a service whose busiest hour of an average weekday has ``peak_rps``; days begin on a Monday.

    ``uneven`` is `unevenness` of a trace, which is repeated from a random place in every hour.
    """
    rng = np.random.default_rng(seed)
    total = (history_days + days) * round(DAY_S / STEP_S)
    hours = np.arange(total) * STEP_S / 3600
    shape = np.interp(hours % 24, np.arange(25), [*HOURS, HOURS[0]])
    day = (hours // 24).astype(int)
    level = np.where(day % 7 >= 5, WEEKEND, 1.0) * np.exp(rng.normal(0, DAY_LEVEL, day[-1] + 1))[day]
    night = round(NIGHT_S / STEP_S)  # in which a day's level turns into the next
    shape = shape * np.convolve(
        np.pad(level, night // 2, mode="edge"), np.full(night + 1, 1 / (night + 1)), mode="valid"
    )
    noise = np.zeros(total // 5 + 1)
    for i, shock in enumerate(rng.normal(0, NOISE * np.sqrt(1 - NOISE_MEMORY**2), len(noise))):
        noise[i] = NOISE_MEMORY * noise[i - 1] + shock
    rates = peak_rps * shape * np.exp(np.repeat(noise, 5)[:total])
    if uneven is not None:
        per_hour = round(3600 / STEP_S)
        for first in range(0, total, per_hour):
            turned = np.roll(uneven, int(rng.integers(len(uneven))))
            rates[first : first + per_hour] *= np.repeat(turned, per_hour // len(turned) + 1)[:per_hour]
    return TrafficCurve(name=name, rates=rates, mixes=((0.0, workload),), start_s=history_days * DAY_S)


def unevenness(arrival_s: Sequence[float] | FloatArray) -> FloatArray:
    """Return the rates of a trace in bins of `UNEVEN_S` over their mean, an hour of them at most."""
    times = np.asarray(arrival_s, dtype=float)
    bins = min(round(3600 / UNEVEN_S), int((times[-1] - times[0]) / UNEVEN_S))
    if bins < 1:
        raise InvalidProblemError(f"a trace of {times[-1] - times[0]:.0f} s shows nothing of an hour's unevenness")
    counts: FloatArray = np.bincount(((times - times[0]) / UNEVEN_S).astype(int), minlength=bins)[:bins].astype(float)
    uneven: FloatArray = counts / counts.mean()
    return uneven


def read_curve(path: str, workload: Workload, *, history_s: float) -> TrafficCurve:
    """Read a CSV with the columns ``at_s`` and ``requests_per_s``: a rate holds from its time until the next one.

    The last rate holds for as long as the one before it. Times may begin anywhere, such as at those of a clock.

    Raises:
        DocumentError: contains every line that is wrong.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = {"at_s", "requests_per_s"} - {*(rows.fieldnames or ())}
            if missing:
                raise single_problem(path, f"has no column {' and '.join(sorted(missing))}")
            times, rates, problems = list[float](), list[float](), list[Problem]()
            for line, row in enumerate(rows, 2):
                try:
                    at_s, rate = float(row["at_s"] or ""), float(row["requests_per_s"] or "")
                except (ValueError, TypeError):
                    problems.append(Problem(file=path, line=line, message="needs two numbers, at_s and requests_per_s"))
                    continue
                if not 0 <= rate < 1e9 or not (times[-1] if times else -math.inf) < at_s < math.inf:
                    message = f"{at_s:.10g} s at {rate:g} requests/s: times must rise, rates be >= 0"
                    problems.append(Problem(file=path, line=line, message=message))
                    continue
                times.append(at_s)
                rates.append(rate)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise single_problem(path, f"cannot be read: {error}") from None
    if len(times) < 2:
        problems.append(Problem(file=path, message="needs two times at least"))
    if problems:
        raise DocumentError(problems)
    if not STEP_S <= (end_s := 2 * times[-1] - times[-2] - times[0]) <= MOST_DAYS * DAY_S:
        raise single_problem(path, f"has {end_s:.4g} s of traffic, must be a minute to {MOST_DAYS} days")
    at = np.searchsorted(np.array(times) - times[0], np.arange(0, end_s, STEP_S), side="right") - 1
    return TrafficCurve(name=path, rates=np.array(rates)[at], mixes=((0.0, workload),), start_s=history_s)
