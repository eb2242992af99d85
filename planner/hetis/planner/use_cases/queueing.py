"""How long requests wait for a seat or for a prefill lane, by a queue model, which takes milliseconds to compute.

The search plans with a wait for the prefill lanes of one replica, and with none for its seats. Here all replicas of a
plan share one queue, because a router sends a request to one that is free, and a request waits for whichever is longer.

The *seats* are the servers of a queue whose rate depends on the number of requests in flight: a replica with n of them
serves what the cost model gives it with batches of n / M (a flow-equivalent server: Chandy, Herzog and Woo 1975). Under
Poisson arrivals the number in flight is a birth-and-death process. Its tail, in which requests wait, decays more slowly
the more the time in a seat varies (Allen and Cunneen's factor). The *lanes* are the micro-batches, each of which
computes one prompt at a time, with the same factor and Sakasegawa's probability of waiting.

See "Waiting for a seat" in docs/cost-model.md; `benchmarks.queueing` measures the errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hetis.planner.use_cases.grouping import group_replicas
from hetis.planner.use_cases.simulate import default_rate, with_all_seats
from hetis.planner.use_cases.verification import in_seconds
from hetis.solver.check.fleet import Fleet, replica_shape
from hetis.solver.check.rederive import Rederivation
from hetis.solver.model import ModelSpec
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import Workload

FloatArray = npt.NDArray[np.float64]

FILLS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of a replica's seats at which its rate is derived
# Requests leave their seats faster than by the cost model, by this factor: that for which the median error is 0, over
# plans that `benchmarks.queueing --calibrate` draws. Close to saturation the wait is very sensitive to it.
FASTER = 1.013
MOST_STATES = 20_000  # numbers of requests in flight that are told apart
P95_TAIL = 20.0  # 1 / (1 - 0.95)
TOLERANCE = 1e-3  # of the highest rate within a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Queueing:
    """The waits of requests at a rate, in seconds: inf where they queue up without end."""

    seats: int  # requests that the plan's engines run at once
    rate_rps: float  # rate of the arrivals
    must_wait: float  # probability that an arriving request finds no free seat
    seat_p95_s: float  # p95 wait for a seat
    lane_p95_s: float  # p95 wait for a prefill lane
    ttft_p95_s: float  # p95 TTFT: the longer wait, and the p95 prompt's own iterations


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualReplicas:
    """Replicas of one shape, as servers of the queue."""

    count: int
    seats: int  # of each
    beside: int  # prompts that each computes beside the decoding requests, before they take a seat
    in_flight: FloatArray  # numbers of requests that one has in flight, up to its seats
    rates: FloatArray  # requests/s that leave one with so many in flight
    holding_cv2: float  # squared coefficient of variation of the iterations for which a request holds its seat
    lanes: int  # micro-batches of each
    prompt_s: float  # seconds for which a mean prompt occupies a lane
    prefill_s: float  # seconds of the p95 prompt


class RequestQueue:
    """The queue for replicas that all prefill and decode.

    Attributes:
        seats: requests that their engines run at once.
    """

    def __init__(self, replicas: Sequence[EqualReplicas], computed_cv2: float, faster: float = FASTER) -> None:
        """``computed_cv2`` is the squared coefficient of variation of the computed tokens of a prompt."""
        self._replicas, self._computed_cv2, self._faster = replicas, computed_cv2, faster
        self.seats = sum(one.count * one.seats for one in replicas)
        most = self.seats + sum(one.count * one.beside for one in replicas)
        self._step = -(-most // MOST_STATES)
        states = np.arange(self._step, most + self._step, self._step)
        self._rates = self._served(np.minimum(1.0, states / self.seats))
        saturated = [one.count * one.rates[-1] for one in replicas]
        self._holding_cv2 = float(np.average([one.holding_cv2 for one in replicas], weights=saturated))
        self._lanes = sum(one.count * one.lanes for one in replicas)
        # Prompts/s that all lanes compute; of prompts that take no time, any number.
        self._prompts_rps = sum(one.count * one.lanes / one.prompt_s if one.prompt_s else math.inf for one in replicas)
        self._prefill_s = max(one.prefill_s for one in replicas)

    def _served(self, fills: FloatArray) -> FloatArray:
        """Return the requests/s that leave if these shares of all seats are taken."""
        total = np.zeros(len(fills))
        for one in self._replicas:
            in_flight = fills * one.seats
            # With fewer in flight than the first number, a request holds its seat for the same time as with that one.
            total += one.count * in_flight / np.interp(in_flight, one.in_flight, one.in_flight / one.rates)
        return self._faster * total

    def at(self, rate_rps: float) -> Queueing:
        """Return the waits under Poisson arrivals at this rate."""
        must_wait, seat_s = self._for_seats(rate_rps)
        lane_s = self._for_lanes(rate_rps)
        return Queueing(
            seats=self.seats,
            rate_rps=rate_rps,
            must_wait=must_wait,
            seat_p95_s=seat_s,
            lane_p95_s=lane_s,
            ttft_p95_s=self._prefill_s + max(seat_s, lane_s),
        )

    def _for_seats(self, rate_rps: float) -> tuple[float, float]:
        """Return the probability that no seat is free, and the p95 wait for one."""
        most_rps = float(self._rates[-1])
        if rate_rps >= most_rps:
            return 1.0, math.inf
        weights = np.concatenate(([0.0], self._step * np.cumsum(np.log(rate_rps / self._rates))))
        shares = np.exp(weights - weights.max())
        # In all further states the rate is the highest, so that their shares are a geometric series.
        full = float(shares[-1]) / (1.0 - rate_rps / most_rps)
        must_wait = full / (self._step * float(shares[:-1].sum()) + full)
        mean_s = (1.0 + self._holding_cv2) / 2.0 / (most_rps - rate_rps)  # of those who wait
        return must_wait, mean_s * math.log(max(1.0, P95_TAIL * must_wait))

    def _for_lanes(self, rate_rps: float) -> float:
        """Return the p95 wait for a lane."""
        utilisation = rate_rps / self._prompts_rps
        if utilisation >= 1.0:
            return math.inf
        must_wait = utilisation ** (math.sqrt(2.0 * (self._lanes + 1)) - 1.0)
        mean_s = (1.0 + self._computed_cv2) / 2.0 / (self._prompts_rps - rate_rps)
        return mean_s * math.log(max(1.0, P95_TAIL * must_wait))

    def highest_rate(self, most_rps: float, ttft_s: float) -> float:
        """Return the highest rate up to ``most_rps`` with p95 TTFT within ``ttft_s``; 0 if there is none."""
        low, high = 0.0, most_rps
        if self.at(high).ttft_p95_s <= ttft_s:
            return high
        while self._prefill_s <= ttft_s and high - low > TOLERANCE * high:
            middle = (low + high) / 2.0
            low, high = (middle, high) if self.at(middle).ttft_p95_s <= ttft_s else (low, middle)
        return low


def request_queue(plan: Plan, problem: PlacementProblem, *, faster: float = FASTER) -> RequestQueue | None:
    """Return the queue of a plan; None if it is empty, or prefills and decodes in separate replicas.

    With those, a prompt waits for a seat of a decode replica, but also for the prefill replica that is to send it.
    """
    if not plan.replicas or any(one.role is not Role.UNIFIED for one in plan.replicas):
        return None
    workload = problem.workload.clipped_to(problem.model.max_position)
    replicas = tuple(_equal_replicas(with_all_seats(plan, problem), problem, workload))
    return RequestQueue(replicas, workload.moments().computed_cv2, faster)


def queueing(plan: Plan, problem: PlacementProblem) -> Queueing | None:
    """Return the waits at the rate that a plan promises; None as for `request_queue`."""
    queue = request_queue(plan, problem)
    return None if queue is None else queue.at(default_rate(plan, problem))


def _equal_replicas(plan: Plan, problem: PlacementProblem, workload: Workload) -> Iterator[EqualReplicas]:
    fleet, derivation, moments = Fleet.of(problem.cluster), Rederivation(problem), workload.moments()
    for group in group_replicas(plan.replicas):
        one = plan.replicas[group.numbers[0]]
        shape, b = replica_shape(one, problem, fleet), one.micro_batch
        derived = derivation.of(shape)
        sizes = sorted({1, *(max(1, round(fill * b)) for fill in FILLS)})
        claimed = min(1.0, one.rate * derived.t_s)  # the search may have charged slower links
        round_trip_s = max(derived.chunk_s, derived.round_trip_per_t * derived.t_s)  # with a chunk
        chunks = moments.mean_computed / one.chunk_tokens
        iterations = one.in_flight / derived.round_trip_per_t  # of a request, in the saturated replica
        yield EqualReplicas(
            count=len(group.numbers),
            seats=one.planned_seats,
            beside=math.ceil(max(1.0, chunks) / iterations) * one.in_flight,
            in_flight=np.array([float(size * one.in_flight) for size in sizes]),
            rates=np.array([claimed * derivation.of(replace(shape, micro_batch=size)).rate for size in sizes]),
            holding_cv2=_holding_cv2(one, problem.model, workload),
            lanes=one.in_flight,
            prompt_s=chunks * round_trip_s,
            prefill_s=math.ceil(moments.p95_computed / one.chunk_tokens) * round_trip_s,
        )


def _holding_cv2(one: ReplicaPlan, model: ModelSpec, workload: Workload) -> float:
    """Return the squared coefficient of variation of the iterations for which a request holds its seat."""
    computed = (1.0 - workload.prefix_hit_rate) / one.chunk_tokens
    held = [each.output_tokens / model.emitted_tokens + computed * each.prompt_tokens for each in workload.bins]
    shares = [each.weight for each in workload.bins]
    mean = np.average(held, weights=shares)
    return float(np.average((np.array(held) - mean) ** 2, weights=shares) / mean**2)


def with_queueing(plan: Plan, problem: PlacementProblem) -> Plan:
    """Return a plan that was not simulated with a note if its requests wait too long by the queue model.

    The plan's own p95 TTFT keeps its limit, so nothing is said where its requests need not wait.
    """
    limit_s = plan.objective.ttft_limit_s
    if limit_s is None or (queue := request_queue(plan, problem)) is None:
        return plan
    rate_rps = default_rate(plan, problem)
    found = queue.at(rate_rps)
    wait_s = max(found.seat_p95_s, found.lane_p95_s)
    if found.ttft_p95_s <= limit_s or not wait_s:
        return plan
    kept_rps = queue.highest_rate(rate_rps, limit_s)
    kept = f"; up to {kept_rps:.4g} requests/s keep it" if kept_rps else ""
    what = "a seat" if found.seat_p95_s >= found.lane_p95_s else "other prompts"
    queue_up = f"wait up to {in_seconds(wait_s)} (p95) for {what}" if math.isfinite(wait_s) else "queue up without end"
    note = (
        f"not simulated: by a queue model of {queue.seats:,} seats, requests {queue_up} at {rate_rps:.4g} requests/s, "
        f"so that p95 TTFT is over its limit of {in_seconds(limit_s)}{kept}"
    )
    return replace(plan, notes=(*plan.notes, note))
