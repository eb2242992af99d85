"""The queues of a plan: its seats and prefill lanes, derived again, and the p95 TTFT that follows (`queueing.py`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hetis.solver.check.rederive import RELATIVE, Derived, Rederivation
from hetis.solver.check.replica_shapes import Fleet, ReplicaShape, replica_shape
from hetis.solver.check.violation import Broken, Rule, Violation, at
from hetis.solver.plan import Plan, ReplicaPlan, Role, parts_of_classes
from hetis.solver.problem import PlacementProblem
from hetis.solver.queueing import EqualPrefills, EqualReplicas, FloatArray, Queueing, RequestQueue, SharedQueue

FILLS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of a replica's seats at which its rate is derived
TOLERANCE = 0.05  # ratio by which two derivations of a wait may differ
RATE_TOLERANCE = 0.01  # and of a replica's rate with some of its seats taken: close to saturation, waits differ by more
CHUNKS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # shares of a chunk at which its time is derived


def request_queue(plan: Plan, problem: PlacementProblem, counted: str = "") -> RequestQueue | None:
    """Return the queue of a plan of sound structure; None if it serves nothing.

    Of pools of classes, waits of the requests of the class that is ``counted`` count, or of all of them.
    """
    (found,) = _request_queues(plan, problem, [counted]) or (None,)
    return found


def _request_queues(plan: Plan, problem: PlacementProblem, counted: Iterable[str]) -> list[RequestQueue]:
    """Return the same queues for each that is ``counted``; none if the plan serves nothing."""
    pools = {
        names: tuple(_Building(_pool_of(plan, names), problem.of_classes(names)).queues())
        for names in dict.fromkeys(one.classes for one in plan.replicas)
    }
    shares = plan.class_shares()
    parts = parts_of_classes(shares, plan.rates_by_classes())
    return [RequestQueue.of_pools(pools, shares, parts, each) for each in counted if any(pools.values())]


def _pool_of(plan: Plan, classes: tuple[str, ...]) -> Plan:
    """Return the replicas for some classes of requests as a plan without classes."""
    own = [number for number, one in enumerate(plan.replicas) if one.classes == classes]
    routes = (
        replace(route, prefill=own.index(route.prefill), decode=own.index(route.decode))
        for route in plan.kv_routes
        if route.prefill in own
    )
    return replace(plan, replicas=tuple(plan.replicas[number] for number in own), kv_routes=tuple(routes), classes=())


def queueing(plan: Plan, problem: PlacementProblem) -> Queueing | None:
    """Return the waits at the rate that a plan promises; None if it serves nothing."""
    queue, demand_rps = request_queue(plan, problem), plan.objective.demand_rps
    rate_rps = plan.planned_rate() if plan.objective.maximises or demand_rps is None else demand_rps
    return None if queue is None or not rate_rps else queue.at(rate_rps)


def check_waits(plan: Plan, problem: PlacementProblem) -> list[Violation]:
    """Check p95 TTFT of all requests, waits included, of a plan that claims it; it is derived for the planned rate.

    Search and checker know the rates of a replica at other numbers of requests, so the two differ a little.
    """
    claimed_s, limits = plan.result.queued_ttft_s, problem.limits_of_classes()
    if claimed_s is None or not plan.result.utilisation:
        return []
    broken, limit_s = list[Broken](), limits.pop("", None)
    rate_rps = (1.0 - RATE_TOLERANCE) * plan.result.utilisation * plan.served_rate()
    derived = [queue.ttft_p95_s(rate_rps) for queue in _request_queues(plan, problem, ["", *limits])]
    if not derived:
        return []
    derived_s, *of_classes = derived
    for (name, own_s), of_class_s in zip(limits.items(), of_classes, strict=True):
        if own_s is not None and of_class_s > own_s * (1 + TOLERANCE):
            message = f"TTFT of class {name} with all waits is {of_class_s:.4g} s, its limit is {own_s:.4g} s"
            broken.append((Rule.TTFT_LIMIT, message))
    if not derived_s <= claimed_s * (1 + TOLERANCE):
        broken.append((Rule.TTFT, f"claims {claimed_s:.4g} s with all waits, the queue model gives {derived_s:.4g} s"))
    if limit_s is not None and claimed_s > limit_s * (1 + RELATIVE):
        broken.append((Rule.TTFT_LIMIT, f"TTFT with all waits is {claimed_s:.4g} s, the limit is {limit_s:.4g} s"))
    return at("queue", broken)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Replicas of equal shape and rate: the first of them as its engine runs it, and the numbers of all."""

    first: ReplicaPlan
    shape: ReplicaShape  # with as many requests as its engine may run at once
    derived: Derived  # with the planned requests
    claimed: float  # share of its derived rate that the plan promises: the search may have charged slower links
    numbers: Sequence[int]


class _Building:
    """Builds the queues of a plan from derivations of its replicas."""

    def __init__(self, plan: Plan, problem: PlacementProblem) -> None:
        self._problem = problem
        self._fleet, self._derivation = Fleet.of(problem.cluster), Rederivation(problem)
        workload = problem.workload.clipped_to(problem.model.max_position)
        self._moments = workload.moments()
        weights = np.array([one.weight for one in workload.bins])
        self._weights = weights / weights.sum()
        prompts = np.array([float(one.prompt_tokens) for one in workload.bins])
        self._computed = prompts - np.minimum(workload.prefix_hit_rate * prompts, prompts - 1.0)
        self._iterations = np.array([one.output_tokens for one in workload.bins]) / problem.model.emitted_tokens
        self._sent_rps = [one.rate if one.role is Role.UNIFIED else 0.0 for one in plan.replicas]
        routes = [route for route in plan.kv_routes if route.rate]  # a plan that fails its check may have others
        for route in routes:
            self._sent_rps[route.prefill] += route.rate
        self._arriving = [0.0] * len(plan.replicas)  # prompts that others compute for each replica at once
        for route in routes:
            sender = plan.replicas[route.prefill]
            under_way = sender.in_flight * max(1.0, sender.chunk_tokens / self._moments.mean_computed)
            self._arriving[route.decode] += under_way * route.rate / self._sent_rps[route.prefill]
        self._groups = tuple(self._grouped(plan))

    def _grouped(self, plan: Plan) -> Iterator[_Group]:
        found = dict[tuple[object, ...], list[int]]()
        for number, one in enumerate(plan.replicas):
            shape = replica_shape(one, self._problem, self._fleet)
            found.setdefault((shape, f"{one.rate:.4g}", one.seats), []).append(number)
        for numbers in found.values():
            one = plan.replicas[numbers[0]]
            shape = replica_shape(one, self._problem, self._fleet)
            derived = self._derivation.of(shape)
            claimed = min(1.0, one.rate * derived.t_s)
            if one.micro_batch:
                shape = replace(shape, micro_batch=max(one.micro_batch, one.seats // one.in_flight))
            yield _Group(first=one, shape=shape, derived=derived, claimed=claimed, numbers=numbers)

    def queues(self) -> Iterator[SharedQueue]:
        """Yield the queue of the unified replicas and that of the others, if the plan has such."""
        for prefill, decode in ((Role.UNIFIED, Role.UNIFIED), (Role.PREFILL, Role.DECODE)):
            prefills = [self._prefills(group) for group in self._groups if group.first.role is prefill]
            prefills = [one for one in prefills if one.rate_rps]
            groups = [group for group in self._groups if group.first.role is decode and group.first.rate]
            if prefills and groups:
                under_way_s = np.average(
                    [one.crowded_s for one in prefills], weights=[one.rate_rps for one in prefills], axis=0
                )
                seats = [self._seats(group, under_way_s) for group in groups]
                yield SharedQueue(
                    seats, prefills, self._weights, self._moments.computed_cv2, self._problem.workload.burstiness**2
                )

    def _prefills(self, group: _Group) -> EqualPrefills:
        one, shape, derived, size = group.first, group.shape, group.derived, group.first.chunk_tokens
        round_trip_s = max(derived.chunk_s, derived.round_trip_per_t * derived.t_s)  # with a full chunk
        slot_s = derived.slot_s(derived.t_s)
        sizes = sorted({max(1, round(share * size)) for share in CHUNKS})
        planned = replace(shape, micro_batch=one.micro_batch)
        seconds = [self._derivation.chunk_s(replace(planned, chunk_tokens=tokens)) for tokens in sizes]
        full, last = np.divmod(self._computed, size)
        return EqualPrefills(
            lanes=len(group.numbers) * one.attention_dp,
            occupied_s=self._computed / size * slot_s,
            held=max(1.0, one.micro_batch, size / self._moments.mean_computed) * one.in_flight / one.attention_dp,
            rate_rps=sum(self._sent_rps[number] for number in group.numbers),
            # A last chunk that is not full is as far behind the one before it as if it were: that one is in its way.
            alone_s=np.where(last > 0, full, full - 1) * derived.busiest_chunk_s
            + np.where(last > 0, np.interp(last, sizes, seconds), derived.chunk_s)
            + derived.landing_s,
            # Chunks that others fill, too, begin anywhere in a prompt: as many of them as it takes, and one more.
            crowded_s=self._computed / size * slot_s + round_trip_s + derived.landing_s,
        )

    def _seats(self, group: _Group, under_way_s: FloatArray) -> EqualReplicas:
        """Return the seats of replicas whose prompts are computed for ``under_way_s`` if others compute them."""
        one, shape, derived, claimed = group.first, group.shape, group.derived, group.claimed
        sizes = sorted({1, *(max(1, round(fill * shape.micro_batch)) for fill in FILLS)})
        in_flight = np.array([float(size * one.in_flight) for size in sizes])
        rates = np.array([claimed * self._derivation.rate(replace(shape, micro_batch=size)) for size in sizes])
        iteration_s = derived.round_trip_per_t * derived.t_s
        if one.role is Role.UNIFIED:
            holding_s = (self._iterations + self._computed / one.chunk_tokens) * iteration_s
            chunks = max(1.0, self._moments.mean_computed / one.chunk_tokens)
            iterations = one.in_flight / derived.round_trip_per_t  # of a request, in the saturated replica
            beside, seats = math.ceil(chunks / iterations) * one.in_flight, shape.micro_batch * one.in_flight
            beside = min(beside, self._prompts_with_room(group))
            most = self._problem.family.engine_settings.max_num_seqs
            if most is not None:  # engines count a request from its first chunk on
                beside = max(0, min(beside, most * one.attention_dp // one.in_flight * one.in_flight - seats))
        else:
            holding_s = self._iterations * iteration_s + under_way_s
            arriving = sum(self._arriving[number] for number in group.numbers) / len(group.numbers)
            beside, seats = 0, (shape.micro_batch + max(1, math.ceil(arriving / one.in_flight))) * one.in_flight
            in_flight = in_flight + rates * float(self._weights @ under_way_s)
            if in_flight[-1] < seats:  # the others wait to decode
                in_flight, rates = np.append(in_flight, seats), np.append(rates, rates[-1])
        return EqualReplicas(
            count=len(group.numbers),
            seats=seats,
            beside=beside,
            in_flight=in_flight,
            rates=rates,
            holding_cv2=self._cv2(holding_s),
        )

    def _prompts_with_room(self, group: _Group) -> int:
        """Return how many whole prompts a replica has room for beside the KV of all its seats."""
        copies, full = group.first.attention_dp, self._derivation.of(group.shape)
        left = full.kv_tokens / copies - full.kv_held + full.kv_prefilling
        prompt = self._problem.model.cached_tokens(self._moments.mean_prompt)
        return copies * max(0, math.floor(left / prompt + 1e-6))

    def _cv2(self, values: FloatArray) -> float:
        mean = self._weights @ values
        return float(self._weights @ (values - mean) ** 2 / mean**2)
