"""How long requests wait for a seat or for a prefill lane, by a queue model, which takes milliseconds to compute.

All replicas of a plan share one queue, because a router sends a request to one that is free. Replicas that prefill and
decode, and pairs of prefill and decode replicas, have a queue of their own each, among which requests are divided by
planned rates. So has every pool for some classes of requests, of which it gets the part that its router gives it.

The *seats* are the servers of a queue whose rate depends on the number of requests in flight: a replica with n of them
serves what the cost model gives it with batches of n / M (a flow-equivalent server: Chandy, Herzog and Woo 1975). Under
Poisson arrivals the number in flight is a birth-and-death process. Its tail, in which requests wait, decays more slowly
the more the time in a seat varies (Allen and Cunneen's factor). A seat of a decode replica is taken when the prompt
begins in a prefill replica.

The *lanes* are the replicas, each of which computes prompts one by one, since chunks follow each other through its
pipeline. A router knows how many requests a replica has, and not how much of a prompt is left. So lanes receive prompts
in turn, each is a queue GI/G/1 of its own (with the correction of Kraemer and Langenbach-Belz), and who finds his lane
taken waits for the rest of the prompt that is computed there. Only queues that are longer than chance explains, the
root of the requests that a replica holds, does a router balance: beyond that, lanes wait as one queue with many servers
(Sakasegawa's probability). For one lane and Poisson arrivals the mean wait is exactly that of Pollaczek and Khinchine.
A request waits for seat and lane at once, as if they were independent.

Search and checker derive seats and lanes each for itself. See "Waiting for a seat" in docs/cost-model.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Classes = tuple[str, ...]

MOST_STATES = 20_000  # numbers of requests in flight that are told apart
LATE = 0.05  # share of the requests that wait for longer than the p95
PRECISION = 1e-7  # of a p95, relatively
PARTS = 16  # into which what is left of a prompt is divided
TOLERANCE = 1e-3  # of the highest rate within a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Queueing:
    """The waits of requests at a rate, in seconds: inf where they queue up without end."""

    seats: int  # requests that the plan's engines run at once
    rate_rps: float  # rate of the arrivals
    must_wait: float  # probability that an arriving request finds no free seat
    seat_p95_s: float  # p95 wait for a seat
    lane_p95_s: float  # p95 wait for a prefill lane
    ttft_p95_s: float  # p95 TTFT: both waits, and the prompt's own iterations


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualReplicas:
    """Replicas of one shape, whose seats are servers of the queue."""

    count: int
    seats: int  # of each; those of a decode replica include the prompts that are computed for it
    beside: int  # prompts that each computes beside the decoding requests, before they take a seat
    in_flight: FloatArray  # numbers of requests that one has in flight, up to its seats
    rates: FloatArray  # requests/s that leave one with so many in flight
    holding_cv2: float  # squared coefficient of variation of the time for which a request holds its seat


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualPrefills:
    """Replicas of one shape that compute prompts, one after the other; each is a lane of the queue."""

    lanes: int  # of all of them
    occupied_s: FloatArray  # seconds for which each prompt of the workload occupies a lane
    held: float  # requests that each holds at once
    rate_rps: float  # requests/s that they serve, in proportion to which prompts come to them
    alone_s: FloatArray  # seconds of every prompt of the workload, alone in its chunks
    crowded_s: FloatArray  # seconds of every prompt in chunks that other prompts fill


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """An exponential wait of those who have to wait."""

    probability: float  # of having to wait
    mean_s: float  # of those who wait; inf if they wait without end

    def is_longer(self, than_s: float) -> float:
        """Return the probability that the wait is longer."""
        return float(self.are_longer(np.array(than_s)))

    def are_longer(self, than_s: FloatArray) -> FloatArray:
        """Return the probabilities that the wait is longer than each of these times."""
        if not self.probability or not self.mean_s:
            return np.zeros_like(than_s)
        decay = np.ones_like(than_s) if math.isinf(self.mean_s) else np.exp(-than_s / self.mean_s)
        return self.probability * decay


NEVER = Wait(probability=0.0, mean_s=0.0)


class SharedQueue:
    """The queue of replicas among which a router chooses one that is free.

    Attributes:
        seats: requests that their engines run at once.
        rate_rps: requests/s that they serve, in proportion to which requests come to this queue.
    """

    def __init__(
        self, replicas: Sequence[EqualReplicas], prefills: Sequence[EqualPrefills], weights: FloatArray,
        computed_cv2: float, arrival_cv2: float = 1.0,
    ) -> None:  # fmt: skip
        """Build the queue.

        Args:
            replicas: the seats.
            prefills: the lanes; often of the same replicas.
            weights: share of the requests that have each prompt of the workload.
            computed_cv2: squared coefficient of variation of the computed tokens of a prompt.
            arrival_cv2: that of the gaps between arrivals; above 1 they come in bursts.
        """
        self._replicas, self._computed_cv2, self._arrival_cv2 = replicas, computed_cv2, arrival_cv2
        self.seats = sum(one.count * one.seats for one in replicas)
        most = self.seats + sum(one.count * one.beside for one in replicas)
        self._step = -(-most // MOST_STATES)
        states = np.arange(self._step, most + self._step, self._step)
        self._rates = self._served(np.minimum(1.0, states / self.seats))
        # With so many in flight, some have a seat of a decode replica and wait there, until fewer decode.
        self._are_waiting = np.isclose(self._rates, self._rates[-1]) & (states < self.seats)
        saturated = [one.count * one.rates[-1] for one in replicas]
        self._holding_cv2 = float(np.average([one.holding_cv2 for one in replicas], weights=saturated))
        self._lanes = sum(one.lanes for one in prefills)
        means_s = [float(weights @ one.occupied_s) for one in prefills]
        # Prompts/s that all lanes compute; of prompts that take no time, any number.
        self._prompts_rps = sum(
            one.lanes / mean if mean else math.inf for one, mean in zip(prefills, means_s, strict=True)
        )
        self.rate_rps = sum(one.rate_rps for one in prefills)
        self._held = float(np.average([one.held for one in prefills], weights=[one.lanes for one in prefills]))
        self._rests = [_rest_of(weights, one.occupied_s) for one in prefills]  # of each, found by as many prompts
        self._alone_s = np.concatenate([one.alone_s for one in prefills])
        self._crowded_s = np.concatenate([one.crowded_s for one in prefills])
        self._weights = np.concatenate([one.rate_rps / self.rate_rps * weights for one in prefills])

    def _served(self, fills: FloatArray) -> FloatArray:
        """Return the requests/s that leave if these shares of all seats are taken."""
        total = np.zeros(len(fills))
        for one in self._replicas:
            in_flight = fills * one.seats
            # With fewer in flight than the first number, a request holds its seat for the same time as with that one.
            total += one.count * in_flight / np.interp(in_flight, one.in_flight, one.in_flight / one.rates)
        return total

    def for_seats(self, rate_rps: float) -> Wait:
        """Return the wait for a seat at a rate of arrivals."""
        most_rps = float(self._rates[-1])
        if rate_rps >= most_rps:
            return Wait(probability=1.0, mean_s=math.inf)
        varies = (self._arrival_cv2 + self._holding_cv2) / 2.0
        bursts = (self._arrival_cv2 + 1.0) / 2.0  # by which they widen the number in flight where nobody waits
        steps = np.log(rate_rps / self._rates) / np.where(self._are_waiting, varies, bursts)
        weights = np.concatenate(([0.0], self._step * np.cumsum(steps)))
        shares = np.exp(weights - weights.max())
        # In all further states the rate is the highest, so that their shares are a geometric series.
        full = float(shares[-1]) / (1.0 - rate_rps / most_rps)
        must_wait = full / (self._step * float(shares[:-1].sum()) + full)
        return Wait(probability=must_wait, mean_s=varies / (most_rps - rate_rps))

    def for_lanes(self, rate_rps: float) -> tuple[float, Wait]:
        """Return the probability of finding a prompt in one's lane, and then the wait for those that wait there."""
        if math.isinf(self._prompts_rps):
            return 0.0, NEVER
        if rate_rps >= self._prompts_rps:
            return 1.0, Wait(probability=1.0, mean_s=math.inf)
        taken, prompt_s = rate_rps / self._prompts_rps, self._lanes / self._prompts_rps
        cv2 = self._arrival_cv2 / self._lanes  # of the gaps between prompts of one lane, which come in turn
        blind_s = taken / (1.0 - taken) * (cv2 + self._computed_cv2) / 2.0 * prompt_s
        blind_s *= _correction(taken, cv2, self._computed_cv2)
        pooled_s = taken ** (math.sqrt(2.0 * (self._lanes + 1)) - 1.0) * (self._arrival_cv2 + self._computed_cv2) / 2.0
        pooled_s = pooled_s / (self._prompts_rps - rate_rps) + math.sqrt(self._held) * prompt_s
        wait_s, rest_s = min(blind_s, pooled_s), prompt_s * (1.0 + self._computed_cv2) / 2.0
        behind_s = max(0.0, wait_s - taken * rest_s) / taken**2
        return min(taken, wait_s / rest_s), Wait(probability=taken, mean_s=behind_s)

    def late_in_lane(self, rate_rps: float) -> Callable[[float], float]:
        """Return a function of a time: the probability that the wait for a lane is longer."""
        return self._late(rate_rps, NEVER, np.zeros_like(self._alone_s))

    def late_first_tokens(self, rate_rps: float) -> Callable[[float], float]:
        """Return a function of a time: the probability that TTFT is longer, at a rate of arrivals."""
        crowded = min(1.0, rate_rps / self._prompts_rps)
        prompts_s = crowded * self._crowded_s + (1.0 - crowded) * self._alone_s
        return self._late(rate_rps, self.for_seats(rate_rps), prompts_s)

    def _late(self, rate_rps: float, seat: Wait, prompts_s: FloatArray) -> Callable[[float], float]:
        taken, lane = self.for_lanes(rate_rps)

        behind = [_behind_parts(lane, rest_s, shares) for rest_s, shares in self._rests]

        def late(than_s: float) -> float:
            left_s = than_s - prompts_s
            by_seat = np.where(left_s < 0.0, 1.0, seat.are_longer(np.maximum(0.0, left_s)))
            each = zip(behind, np.split(left_s, len(behind)), strict=True)
            by_lane = taken * np.concatenate([are_longer(than) for are_longer, than in each])
            return float(self._weights @ (by_seat + by_lane - by_seat * by_lane))

        return late


def _correction(taken: float, arrival_cv2: float, service_cv2: float) -> float:
    """Return the factor on a wait in GI/G/1 of Kraemer and Langenbach-Belz (1976)."""
    varies = arrival_cv2 + service_cv2
    if arrival_cv2 > 1.0:
        return math.exp(-(1.0 - taken) * (arrival_cv2 - 1.0) / (varies + 3.0 * service_cv2))
    if not varies:
        return 0.0 if taken < 1.0 else 1.0
    return math.exp(-2.0 * (1.0 - taken) / (3.0 * taken) * (1.0 - arrival_cv2) ** 2 / varies)


def _rest_of(weights: FloatArray, seconds: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return what is left of the prompt that an arriving one finds in its lane, in `PARTS` seconds with their shares.

    ``P(rest > x) = E max(0, S - x) / E S`` of the times S of prompts, which have these weights.
    """
    longest_s, mean_s = float(seconds.max(initial=0.0)), float(weights @ seconds)
    if not mean_s:
        return np.zeros(PARTS), np.full(PARTS, 1.0 / PARTS)
    edges_s = np.linspace(0.0, longest_s, PARTS + 1)
    longer_s = np.maximum(0.0, seconds - edges_s[:, None])  # than each edge, of every prompt
    tail, areas_s = longer_s @ weights / mean_s, -np.diff(longer_s**2 @ weights) / 2.0 / mean_s  # and its integrals
    shares = -np.diff(tail)
    inside_s = (areas_s - tail[1:] * np.diff(edges_s)) / np.maximum(shares, 1e-300)  # mean distance from the lower edge
    return np.clip(edges_s[:-1] + inside_s, edges_s[:-1], edges_s[1:]), shares  # rounding leaves no part


def _behind_parts(wait: Wait, rest_s: FloatArray, shares: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """Return a function of times: the probabilities that one of some rests (ascending), and a wait after it, is longer.

    ``S_j = shares_j + S_(j-1) exp(-(rest_j - rest_(j-1)) / mean)`` sums up the rests that have ended after the j-th, so
    that each time takes one exponential, not one for each rest.
    """
    ended, decays = np.zeros(len(rest_s) + 1), np.zeros(len(rest_s) + 1)
    if wait.probability and wait.mean_s:
        decays[2:] = np.exp(-np.diff(rest_s) / wait.mean_s)
        for j, share in enumerate(shares, start=1):
            ended[j] = wait.probability * share + decays[j] * ended[j - 1]
    going_on = np.append(np.cumsum(shares[::-1])[::-1], 0.0)
    since_s = np.concatenate(([0.0], rest_s))

    def are_longer(than_s: FloatArray) -> FloatArray:
        j = np.searchsorted(rest_s, than_s, side="right")
        if not wait.mean_s or math.isinf(wait.mean_s):
            return np.asarray(going_on[j] + ended[j])
        return np.asarray(going_on[j] + ended[j] * np.exp(-np.maximum(0.0, than_s - since_s[j]) / wait.mean_s))

    return are_longer


class Arrivals(NamedTuple):
    """The requests that come to a queue: their share of all, and that of those whose waits count."""

    of_all: float
    counted: float
    queue: SharedQueue


class RequestQueue:
    """The queues of a plan: one of its unified replicas, one of its prefill and decode replicas, or both, of each pool.

    Attributes:
        arrivals: what comes to each queue.
        seats: requests that the plan's engines run at once.
    """

    def __init__(self, *queues: SharedQueue, arrivals: Iterable[Arrivals] = ()) -> None:
        """Build the queues of a plan without classes, or those of pools with what comes to each."""
        self.arrivals = (*in_turn(queues, 1.0, 1.0), *arrivals)
        self.seats = sum(one.queue.seats for one in self.arrivals)

    @classmethod
    def of_pools(
        cls, pools: Mapping[Classes, Sequence[SharedQueue]], shares: Mapping[str, float],
        parts: Mapping[str, Mapping[Classes, float]], counted: str = "",
    ) -> RequestQueue:  # fmt: skip
        """Return the queues of pools for classes of requests.

        Args:
            pools: the queues of each, by the classes that it serves.
            shares: those of the classes in all requests; none: there are no classes, and one pool.
            parts: of each class's requests, the share that each pool gets.
            counted: the class whose waits count; empty: all count.
        """
        found = list[Arrivals]()
        for names, queues in pools.items():
            come = {name: share * parts[name].get(names, 0.0) for name, share in shares.items()}
            of_all = sum(come.values()) if shares else 1.0
            found += in_turn(queues, of_all, come[counted] / shares[counted] if counted else of_all)
        return cls(arrivals=found)

    def at(self, rate_rps: float) -> Queueing:
        """Return the waits under Poisson arrivals at this rate."""
        seats = [(one.counted, one.queue.for_seats(one.of_all * rate_rps)) for one in self.arrivals]
        lanes = [(one.counted, one.queue.late_in_lane(one.of_all * rate_rps)) for one in self.arrivals]
        return Queueing(
            seats=self.seats,
            rate_rps=rate_rps,
            must_wait=sum(share * wait.probability for share, wait in seats),
            seat_p95_s=_p95(lambda than_s: sum(share * wait.is_longer(than_s) for share, wait in seats)),
            lane_p95_s=_p95(lambda than_s: sum(share * late(than_s) for share, late in lanes)),
            ttft_p95_s=self.ttft_p95_s(rate_rps),
        )

    def ttft_p95_s(self, rate_rps: float) -> float:
        """Return p95 TTFT under Poisson arrivals at this rate."""
        return _p95(self._late(rate_rps))

    def _late(self, rate_rps: float) -> Callable[[float], float]:
        queues = [one for one in self.arrivals if one.counted]
        parts = [(one.counted, one.queue.late_first_tokens(one.of_all * rate_rps)) for one in queues]
        return lambda than_s: sum(share * late(than_s) for share, late in parts)

    def keeps(self, rate_rps: float, ttft_s: float) -> bool:
        """Return whether p95 TTFT is within a limit."""
        return self._late(rate_rps)(ttft_s) <= LATE

    def highest_rate(self, most_rps: float, ttft_s: float) -> float:
        """Return the highest rate up to ``most_rps`` with p95 TTFT within ``ttft_s``; 0 if there is none."""
        low, high = 0.0, most_rps
        if self.keeps(high, ttft_s):
            return high
        while high - low > TOLERANCE * high and high > TOLERANCE * most_rps:
            middle = (low + high) / 2.0
            low, high = (middle, high) if self.keeps(middle, ttft_s) else (low, middle)
        return low


def in_turn(queues: Sequence[SharedQueue], of_all: float, counted: float) -> Iterator[Arrivals]:
    """Yield the queues of a pool, among which its requests are divided by planned rates."""
    total_rps = sum(one.rate_rps for one in queues)
    for one in queues:
        share = one.rate_rps / total_rps
        yield Arrivals(share * of_all, share * counted, one)


def _p95(share_longer: Callable[[float], float]) -> float:
    """Return the shortest time than which at most `LATE` of the requests take longer."""
    if share_longer(0.0) <= LATE:
        return 0.0
    if share_longer(math.inf) > LATE:
        return math.inf
    low, high = 0.0, 1.0
    above, below = share_longer(low) - LATE, share_longer(high) - LATE
    while below > 0.0:
        low, high, above, below = high, 2.0 * high, below, share_longer(2.0 * high) - LATE
    number = 0
    while high - low > PRECISION * high:
        # Between the ends in proportion to the excesses, both sides of that within the precision; else in the middle.
        middle, number = (low + high) / 2.0, number + 1
        if number % 3:
            middle = low + (high - low) * above / (above - below)
            middle = min(max(middle + (PRECISION if number % 3 == 1 else -PRECISION) * high / 2, low), high)
        excess = share_longer(middle) - LATE
        if excess > 0.0:
            low, above = middle, excess
        else:
            high, below = middle, excess
    return high
