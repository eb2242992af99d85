"""How long requests wait for a seat, by a queue model: what the cost model's TTFT leaves out, without a simulation.

The seats of a plan's replicas are the servers of one queue, because a router sends a request to a replica that has one
free. The more requests are in flight, the longer each holds its seat: a replica with n of them serves what the cost
model gives it with batches of n / M, so that it is a server whose rate depends on n (a flow-equivalent server, as in
Chandy, Herzog and Woo 1975). For Poisson arrivals the numbers in flight are a birth-and-death process. Its tail, which
holds the requests that wait, decays as exponentials do, more slowly the more the time in a seat varies (Allen and
Cunneen's factor). See "Waiting for a seat" in docs/cost-model.md; `benchmarks.seat_wait` measures the errors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hetis.planner.use_cases.grouping import group_replicas
from hetis.planner.use_cases.service_level import DEFAULT, service_level_of
from hetis.planner.use_cases.simulate import default_rate, with_all_seats
from hetis.planner.use_cases.verification import in_seconds
from hetis.solver.check.fleet import Fleet, replica_shape
from hetis.solver.check.rederive import Rederivation
from hetis.solver.plan import Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem

FloatArray = npt.NDArray[np.float64]

FILLS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of a replica's seats at which its rate is derived
# A saturated replica serves more in the simulator than the cost model says, by this factor in the median of the plans
# that `benchmarks.seat_wait --calibrate` draws. Close to saturation the wait is very sensitive to it.
FASTER = 1.04
MOST_STATES = 20_000  # numbers of requests in flight that are told apart
P95_TAIL = 20.0  # 1 / (1 - 0.95)
TOLERANCE = 1e-3  # of the highest rate within a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatWait:
    """The wait for one of the seats of a plan."""

    seats: int  # requests that its engines run at once
    rate_rps: float  # rate of the arrivals
    must_wait: float  # probability that an arriving request finds no free seat
    p95_s: float  # inf from the saturated rate on


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """Equal replicas: their number, the requests that each has in flight and, for each number, the rate; requests/s."""

    count: int
    seats: int
    waiting: int  # prompts that are computed beside decoding requests, before they take one of their seats
    in_flight: FloatArray
    rates: FloatArray
    holding_cv2: float  # squared coefficient of variation of the iterations of a request


class SeatQueue:
    """The queue of a plan whose replicas all prefill and decode.

    Attributes:
        seats: requests that its engines run at once.
    """

    def __init__(self, plan: Plan, problem: PlacementProblem) -> None:
        plan = with_all_seats(plan, problem)
        self._kinds = tuple(_kinds(plan, problem))
        self.seats = sum(kind.count * kind.seats for kind in self._kinds)
        waiting = sum(kind.count * kind.waiting for kind in self._kinds)
        self._step = -(-(self.seats + waiting) // MOST_STATES)
        states = np.arange(self._step, self.seats + waiting + self._step, self._step)
        self._rates = self._served(np.minimum(1.0, states / self.seats))
        saturated = [kind.count * float(kind.rates[-1]) for kind in self._kinds]
        self._holding_cv2 = sum(
            rate * kind.holding_cv2 for rate, kind in zip(saturated, self._kinds, strict=True)
        ) / sum(saturated)

    def _served(self, fills: FloatArray) -> FloatArray:
        """Return the requests/s that leave if these shares of all seats are taken."""
        total = np.zeros(len(fills))
        for kind in self._kinds:
            in_flight = fills * kind.seats
            # Each request holds its seat for the same time if fewer than the fewest derived are in flight.
            total += kind.count * in_flight / np.interp(in_flight, kind.in_flight, kind.in_flight / kind.rates)
        return FASTER * total

    def at(self, rate_rps: float) -> SeatWait:
        """Return the wait under Poisson arrivals at this rate."""
        most_rps = float(self._rates[-1])
        if rate_rps >= most_rps:
            return SeatWait(seats=self.seats, rate_rps=rate_rps, must_wait=1.0, p95_s=math.inf)
        weights = np.concatenate(([0.0], self._step * np.cumsum(np.log(rate_rps / self._rates))))
        shares = np.exp(weights - weights.max())
        # In all further states the rate is the highest, so that their shares are a geometric series.
        full = float(shares[-1]) / (1.0 - rate_rps / most_rps)
        must_wait = full / (self._step * float(shares[:-1].sum()) + full)
        mean_s = (1.0 + self._holding_cv2) / 2.0 / (most_rps - rate_rps)  # of those who wait
        p95_s = mean_s * math.log(max(1.0, P95_TAIL * must_wait))
        return SeatWait(seats=self.seats, rate_rps=rate_rps, must_wait=must_wait, p95_s=p95_s)

    def highest_rate(self, most_rps: float, wait_s: float) -> float:
        """Return the highest rate up to ``most_rps`` whose p95 wait is within ``wait_s``; 0 if it is negative."""
        if wait_s < 0.0:
            return 0.0
        low, high = 0.0, most_rps
        if self.at(high).p95_s <= wait_s:
            return high
        while high - low > TOLERANCE * high:
            middle = (low + high) / 2.0
            low, high = (middle, high) if self.at(middle).p95_s <= wait_s else (low, middle)
        return low


def seat_queue(plan: Plan, problem: PlacementProblem) -> SeatQueue | None:
    """Return the queue for the seats of a plan; None if it is empty, or prefills and decodes in separate replicas.

    With those, a prompt waits for a seat of a decode replica, but also for the prefill replica that is to send it.
    """
    if not plan.replicas or any(one.role is not Role.UNIFIED for one in plan.replicas):
        return None
    return SeatQueue(plan, problem)


def seat_wait(plan: Plan, problem: PlacementProblem) -> SeatWait | None:
    """Return the wait at the rate that a plan promises; None as for `seat_queue`."""
    queue = seat_queue(plan, problem)
    return None if queue is None else queue.at(default_rate(plan, problem))


def _kinds(plan: Plan, problem: PlacementProblem) -> Iterator[_Kind]:
    fleet, derivation = Fleet.of(problem.cluster), Rederivation(problem)
    for group in group_replicas(plan.replicas):
        one = plan.replicas[group.numbers[0]]
        shape, b = replica_shape(one, problem, fleet), one.micro_batch
        sizes = sorted({1, *(max(1, round(fill * b)) for fill in FILLS)})
        claimed = min(1.0, one.rate * derivation.of(shape).t_s)  # the search may have charged slower links
        yield _Kind(
            count=len(group.numbers),
            seats=one.planned_seats,
            waiting=_prompts_beside(one, problem) * one.in_flight,
            in_flight=np.array([float(size * one.in_flight) for size in sizes]),
            rates=np.array([claimed * derivation.of(replace(shape, micro_batch=size)).rate for size in sizes]),
            holding_cv2=_holding_cv2(one, problem),
        )


def _prompts_beside(one: ReplicaPlan, problem: PlacementProblem) -> int:
    """Return how many prompts a micro-batch has under way on average, rounded up, while its seats decode."""
    moments = problem.workload.clipped_to(problem.model.max_position).moments()
    chunks, iterations = moments.mean_computed / one.chunk_tokens, moments.mean_output / one.micro_batch
    return math.ceil(max(1.0, chunks) / max(iterations, chunks))


def _holding_cv2(one: ReplicaPlan, problem: PlacementProblem) -> float:
    """Return the squared coefficient of variation of the iterations for which a request holds its seat."""
    workload = problem.workload.clipped_to(problem.model.max_position)
    computed = 1.0 - workload.prefix_hit_rate
    held = np.array(
        [
            one_bin.output_tokens / problem.model.emitted_tokens + computed * one_bin.prompt_tokens / one.chunk_tokens
            for one_bin in workload.bins
        ]
    )
    shares = np.array([one_bin.weight for one_bin in workload.bins])
    mean = float(np.average(held, weights=shares))
    return float(np.average((held - mean) ** 2, weights=shares)) / mean**2


def with_seat_wait(plan: Plan, problem: PlacementProblem) -> Plan:
    """Return a plan that was not simulated with a note if its requests wait too long for seats by the queue model."""
    limit_s, level = plan.objective.ttft_limit_s, service_level_of(plan)
    if limit_s is None or level != DEFAULT or (queue := seat_queue(plan, problem)) is None:
        return plan
    rate_rps, ttft_s = default_rate(plan, problem), max(one.ttft_s for one in plan.replicas)
    wait_s = queue.at(rate_rps).p95_s
    if ttft_s + wait_s <= limit_s:
        return plan
    kept_rps = queue.highest_rate(rate_rps, limit_s - ttft_s)
    kept = f"; up to {kept_rps:.4g} requests/s keep it" if kept_rps else ""
    note = (
        f"not simulated: by a queue model, requests at {rate_rps:.4g}/s wait about {in_seconds(wait_s)} (p95) for one "
        f"of {queue.seats:,} seats, so that p95 TTFT is over its limit of {in_seconds(limit_s)}{kept}"
    )
    return replace(plan, notes=(*plan.notes, note))
