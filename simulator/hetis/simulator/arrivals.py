"""Traffic: lengths and arrival times of requests, replayed from a trace or drawn, and reproducible by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from hetis.formats.traces import Trace
from hetis.simulator.values import FloatArray, IntArray, Request
from hetis.solver.errors import InvalidProblemError
from hetis.solver.workload import Workload

MAX_CV = 100.0
LEAST_RPS, MOST_RPS = 1e-6, 1e9  # arrival rates at which seconds of latency and of arrivals are told apart
EVEN = 1e-3  # gaps with a smaller coefficient of variation are drawn evenly spaced


class Arrivals(StrEnum):
    """Processes by which requests arrive."""

    DRAWN = "drawn"  # gaps of a gamma distribution: Poisson if their coefficient of variation is 1
    RECORDED = "recorded"  # as in the trace, stretched to the rate if one is given
    SATURATED = "saturated"  # a request is always waiting


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Load:
    """The traffic of a fleet."""

    # A trace, whose requests are taken in order and repeated from the start, or a distribution to draw from.
    lengths: Trace | Workload
    max_position: int  # the model's context; longer requests are clipped as in `Workload.clipped_to`
    arrivals: Arrivals = Arrivals.DRAWN
    rate_rps: float | None = None  # mean arrivals per second; None only for saturated arrivals, or the recorded rate
    gap_cv: float = 1.0  # coefficient of variation of drawn gaps: 0 evenly spaced, 1 Poisson, above 1 in bursts

    def __post_init__(self) -> None:
        if self.rate_rps is not None and not LEAST_RPS <= self.rate_rps <= MOST_RPS:
            raise InvalidProblemError(
                f"arrival rate is {self.rate_rps:g} requests/s, must be {LEAST_RPS:g} to {MOST_RPS:g}"
            )
        if not 0 <= self.gap_cv <= MAX_CV:
            raise InvalidProblemError(f"gap_cv is {self.gap_cv}, must be 0 to {MAX_CV:g}")
        if self.arrivals is Arrivals.DRAWN and self.rate_rps is None:
            raise InvalidProblemError("arrivals that are drawn need a rate")
        if self.arrivals is Arrivals.RECORDED and not isinstance(self.lengths, Trace):
            raise InvalidProblemError(f"{self.lengths.name} is a distribution of lengths: it has no recorded arrivals")
        if self.arrivals is Arrivals.RECORDED and self.lengths.rate_rps is None:
            raise InvalidProblemError(
                f"all requests of {self.lengths.name} arrive at once: no rate can be made of that"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DrawnTraffic:
    """Future requests; all arrays are [requests]. ``num_clipped`` requests were shortened to fit the model's context.

    ``prefix_tokens`` of each prompt are already in the prefix cache.
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    prefix_tokens: IntArray
    num_clipped: int


def draw_traffic(load: Load, num_requests: int, *, seed: int) -> DrawnTraffic:
    """Return the first ``num_requests`` requests of a load.

    The same seed gives the same lengths and gaps at every rate (gaps are drawn with mean one and scaled), and a longer
    sequence begins with the shorter one, so that comparisons at two rates or lengths differ in nothing else. With a
    trace, seed 0 starts at its first request and every other seed at a random one.
    """
    of_lengths, of_rounding, of_gaps = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    if isinstance(load.lengths, Trace):
        rows = len(load.lengths.arrival_s)
        start = 0 if seed == 0 else int(of_lengths.integers(rows))
        chosen = (start + np.arange(num_requests)) % rows
        prompts, outputs = (x[chosen] for x in (load.lengths.prompt_tokens, load.lengths.output_tokens))
        shares = 0.0 if load.lengths.prefix_share is None else load.lengths.prefix_share[chosen]
    else:
        chosen = _drawn_bins(load.lengths, num_requests, of_lengths)
        prompts = np.array([b.prompt_tokens for b in load.lengths.bins])[chosen]
        outputs = np.array([b.output_tokens for b in load.lengths.bins])[chosen]
        shares = load.lengths.prefix_hit_rate
    kept_outputs = np.minimum(outputs, load.max_position - 1)
    kept_prompts = np.minimum(prompts, load.max_position - kept_outputs)
    # Bins hold means, which need not be whole: rounding up or down at random keeps them. Whole lengths stay the same.
    up = of_rounding.random((num_requests, 2))
    whole_outputs = np.floor(kept_outputs + up[:, 0]).astype(np.int64)
    whole_prompts = np.minimum(np.floor(kept_prompts + up[:, 1]).astype(np.int64), load.max_position - whole_outputs)
    return DrawnTraffic(
        arrival_s=_arrival_s(load, chosen, of_gaps),
        prompt_tokens=whole_prompts,
        output_tokens=whole_outputs,
        prefix_tokens=np.minimum(np.rint(shares * whole_prompts).astype(np.int64), whole_prompts - 1),
        num_clipped=int(((kept_prompts != prompts) | (kept_outputs != outputs)).sum()),
    )


KeepGoing = Callable[[int], bool]
"""Called with the number of requests handed out so far; returning False ends the traffic there."""


def _forever(_: int) -> bool:
    return True


def requests_of(traffic: DrawnTraffic, *, keep_going: KeepGoing = _forever) -> Iterator[Request]:
    """Yield the requests with their arrival times, one by one."""
    columns = traffic.arrival_s, traffic.prompt_tokens, traffic.output_tokens, traffic.prefix_tokens
    for number, (arrival_s, prompt, output, prefix) in enumerate(zip(*(x.tolist() for x in columns), strict=True)):
        if not keep_going(number):
            return
        yield Request(
            id=number, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, prefix_tokens=prefix
        )  # fmt: skip


class Saturation:
    """The requests of a traffic, each available at any time (`hetis.simulator.values.SaturatingSource`)."""

    def __init__(self, traffic: DrawnTraffic, *, keep_going: KeepGoing = _forever) -> None:
        columns = traffic.prompt_tokens, traffic.output_tokens, traffic.prefix_tokens
        self._lengths = zip(*(x.tolist() for x in columns), strict=True)
        self._keep_going = keep_going
        self._given = 0

    def next_request(self, now_s: float) -> Request | None:
        """Return the next request, arriving now; None once all have been handed out."""
        lengths = next(self._lengths, None) if self._keep_going(self._given) else None
        if lengths is None:
            return None
        self._given += 1
        prompt, output, prefix = lengths
        return Request(
            id=self._given - 1, arrival_s=now_s, prompt_tokens=prompt, output_tokens=output, prefix_tokens=prefix
        )  # fmt: skip


def _drawn_bins(workload: Workload, count: int, rng: np.random.Generator) -> IntArray:
    cumulative = np.cumsum([b.weight for b in workload.bins])
    chosen = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
    inside: IntArray = np.minimum(chosen, len(workload.bins) - 1)  # rounding may bring the product up to the total
    return inside


def _arrival_s(load: Load, chosen: IntArray, rng: np.random.Generator) -> FloatArray:
    count = len(chosen)
    if load.arrivals is Arrivals.SATURATED:
        return np.zeros(count)
    if load.arrivals is Arrivals.RECORDED:
        assert isinstance(load.lengths, Trace)
        recorded_rps = load.lengths.rate_rps
        assert recorded_rps is not None
        # After the end of the trace, its first request follows its last after a mean gap.
        gaps = np.diff(load.lengths.arrival_s, append=load.lengths.arrival_s[-1] + 1 / recorded_rps)
        unit_gaps = gaps[chosen[:-1]] * recorded_rps
        times = np.concatenate([[0.0], np.cumsum(unit_gaps)])
        return times / (load.rate_rps or recorded_rps)
    assert load.rate_rps is not None
    if load.gap_cv < EVEN:
        return np.arange(1, count + 1) / load.rate_rps
    shape = load.gap_cv**-2
    return np.cumsum(rng.standard_gamma(shape, count) / shape) / load.rate_rps
