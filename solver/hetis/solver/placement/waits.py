"""The queues of chosen replicas, from the search's own tables: the rate at which requests wait no longer than allowed.

The mathematics is that of `hetis.solver.queueing`. A last chunk that a prompt does not fill takes the time between
those of the family's next smaller and next larger chunks, at least that of its smallest.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

from hetis.solver import mixes
from hetis.solver.mixes import Mix
from hetis.solver.placement.outcome import Outcome
from hetis.solver.placement.replicas.tables import CostTables, FloatArray, Tables
from hetis.solver.placement.replicas.template import Template, interval_of, landing_s, prompt_times, room_layers
from hetis.solver.plan import Lanes, Role, lanes_of_pools, parts_of_classes, served_with_classes
from hetis.solver.queueing import EqualPrefills, EqualReplicas, RequestQueue, SharedQueue

FILLS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of a micro-batch at about which a replica's rate is taken
MORE_SEATS = (1.0, 1.5, 2.0, 4.0)  # times the planned seats, which are tried in turn if requests wait for them
WORTH_SEATS = 1.005  # ratio by which they must raise the utilisation
MARGIN = 0.99  # share of a limit on TTFT that is used up
BATCHES = (1.0, 0.75, 0.6, 0.45, 0.3)  # shares of a micro-batch that are tried instead of it
PRECISE = 1e-4  # of a utilisation

T = TypeVar("T")

Counted = tuple[Template, int]


class _Pool(NamedTuple):
    """Chosen replicas for the requests of some classes, or for all."""

    classes: tuple[str, ...]
    own: CostTables  # those of its requests, whose scopes have other numbers than in templates
    chosen: Sequence[Counted]
    routed_rps: float  # between its prefill and decode replicas

    @property
    def rate_rps(self) -> float:
        unified = sum(t.rate * n for t, n in self.chosen if self.own.mixes[t.mix].role is Role.UNIFIED)
        return float(unified + self.routed_rps)


def _pools(costs: CostTables, outcome: Outcome) -> list[_Pool]:
    """Return the pools of chosen replicas, by classes."""
    if not costs.ranges:
        return [_Pool((), costs, outcome.chosen, float(outcome.flows.sum()))]
    flows, found = outcome.flows.sum(axis=1).reshape(len(costs.ranges), -1).sum(axis=1), list[_Pool]()
    for number, names in enumerate(costs.problem.ranges()):
        chosen = [(t, n) for t, n in outcome.chosen if costs.scopes[t.scope].number == number]
        found.append(_Pool(names, costs.ranges[number], chosen, float(flows[number])))
    return [pool for pool in found if pool.chosen]


def saturated_rate(costs: CostTables, outcome: Outcome) -> float:
    """Return the requests/s that chosen replicas serve when all seats are taken."""
    rates = {pool.classes: pool.rate_rps for pool in _pools(costs, outcome)}
    return served_with_classes(costs.problem.workload.shares, rates)


def lanes_of(costs: CostTables, outcome: Outcome) -> Lanes:
    """Return the chosen replicas of each role that compute prompts, at least one."""
    count, of_pools = Counter[Role](), Counter[tuple[tuple[str, ...], Role]]()
    for pool in _pools(costs, outcome):
        for template, number in pool.chosen:
            role = costs.mixes[template.mix].role
            count[role] += number
            of_pools[pool.classes, role] += number
    load, pools = costs.problem.assumptions.lanes.prefill_load, lanes_of_pools(of_pools) if costs.ranges else ()
    return Lanes(max(1, count[Role.UNIFIED]), max(1, count[Role.PREFILL]), load, pools)


def most_lanes(costs: CostTables) -> Lanes:
    """Return a bound on the replicas of a plan, each of which has room for all weights."""
    rooms = np.zeros(len(costs.classes))
    for part in costs.scopes if costs.ranks else ():
        t: Tables = part.tables
        whole = t.rank_tp * t.layer_bytes * t.num_layers  # of all layers, on any number of GPUs
        np.maximum.at(rooms, t.rank_class, np.minimum(1.0, t.rank_tp * t.room_bytes / whole) / t.rank_tp)
    most = max(1, int(sum(one.available * room for one, room in zip(costs.classes, rooms, strict=True)) + 1e-9))
    return Lanes(most, most)


class Kept(NamedTuple):
    """What chosen replicas keep: a utilisation, and the requests of a micro-batch that engines may run for it."""

    utilisation: float
    seats: Mapping[Template, int]  # those of replicas that may run more than decode in the saturated plan
    ttft_s: float | None = None  # p95 of all requests, waits included; None: there is no limit


def kept_by(costs: CostTables, outcome: Outcome, most: float, *, above: float = 0.0) -> Kept:
    """Return the highest utilisation up to ``most`` at which p95 TTFT keeps its limit: of replicas, and of the queues.

    All utilisations keep it if there is no limit. Pools have queues of their own. Of these, p95 TTFT of all requests
    together keeps the limit or, if any class has limits of its own, that of each class.

    Where requests wait for seats, engines run more of them at once, as many as KV has room for: below the saturated
    rate fewer are taken, so TPOT does not exceed that of all planned seats. What keeps no more than the rate ``above``
    may count as 0.
    """
    limits, rate = costs.problem.limits_of_classes(), saturated_rate(costs, outcome)
    if not any(limits.values()):
        return Kept(most, {})
    costs = costs.at(most, lanes_of(costs, outcome))
    pools = _pools(costs, outcome)
    own = min((_own_utilisation(costs, pool.own, t, most) for pool in pools for t, _ in pool.chosen), default=0.0)
    best = Kept(0.0, {})
    if not own or own * rate <= above:
        return best
    shares = costs.problem.workload.shares
    parts = parts_of_classes(shares, {pool.classes: pool.rate_rps for pool in pools})
    tried = list[Mapping[Template, int]]()
    for factor in MORE_SEATS:
        building = [_Queues(costs, pool, factor) for pool in pools]
        seats = {t: b for one in building for t, b in one.seats.items()}
        if seats in tried:
            continue  # the family's next micro-batch may be larger
        tried.append(seats)
        queues = {pool.classes: tuple(one.queues()) for pool, one in zip(pools, building, strict=True)}
        if not any(queues.values()):
            break
        of_pools = partial(RequestQueue.of_pools, queues, shares, parts)
        of_all, counted = of_pools(""), [(of_pools(name), limit) for name, limit in limits.items() if limit is not None]
        least_rps = max(above, best.utilisation * WORTH_SEATS * rate)
        if not all(queue.keeps(least_rps, MARGIN * limit) for queue, limit in counted if least_rps):
            continue  # one look, before the many of a search
        kept = min(own, *(queue.highest_rate(own * rate, MARGIN * limit) / rate for queue, limit in counted))
        if kept > best.utilisation * WORTH_SEATS:
            best = Kept(kept, seats, of_all.ttft_p95_s(kept * rate))
        if kept >= own:
            break
    return best


def _known(costs: CostTables, template: Template, kind: Hashable, make: Callable[[], T]) -> T:
    """Return what follows from a replica and no limit on latency, made once for the searches of all utilisations."""
    key = kind, template
    if key not in costs.shared:
        costs.shared[key] = make()
    return costs.shared[key]  # type: ignore[no-any-return]


def _interval(costs: CostTables, template: Template) -> float:
    return _known(costs, replace(template, interval_s=0.0), "interval", lambda: interval_of(costs, template))


def own_rate(costs: CostTables, most: float, template: Template, count: int) -> float:
    """Return the rate that each of so many equal unified replicas keeps, up to a utilisation."""
    none = np.zeros((1, 1))
    alone = Outcome(((template, count),), template.rate * count, math.inf, none[0], none[0], flows=none)
    return kept_by(costs, alone, most).utilisation * template.rate


def _own_utilisation(costs: CostTables, own: CostTables, template: Template, most: float) -> float:
    """Return the highest utilisation at which a replica's own p95 TTFT, without its seats, keeps the limit."""
    mix, limit_s = own.mixes[template.mix], own.problem.objective.ttft_limit_s
    if mix.role is Role.DECODE or limit_s is None:
        return most
    times, landed_s = prompt_times(costs, template), landing_s(costs, template)

    def keeps(utilisation: float) -> bool:
        assumed = replace(own.problem.assumptions, planned_utilisation=utilisation)
        chunks = mixes.chunks_ahead(own.moments, assumed, mix)
        return mixes.ttft_s(chunks, times.round_trip_s, times.slot_s) + landed_s <= limit_s * (1.0 + 1e-9)

    if keeps(most):
        return most
    low, high = 0.0, most
    while high - low > PRECISE:
        middle = (low + high) / 2.0
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low if keeps(low) else 0.0


class _Queues:
    """The queues of a pool: one of its unified replicas, one of its prefill and decode replicas.

    ``costs`` are the tables of the templates' scopes.
    """

    def __init__(self, costs: CostTables, pool: _Pool, more_seats: float = 1.0) -> None:
        self._costs, self._own, problem = costs, pool.own, pool.own.problem
        self._chosen, self._routed_rps = pool.chosen, pool.routed_rps
        workload = problem.workload.clipped_to(problem.model.max_position)
        self._burstiness = workload.burstiness
        weights = np.array([one.weight for one in workload.bins])
        self._weights = weights / weights.sum()
        prompts = np.array([one.prompt_tokens for one in workload.bins])
        self._computed = prompts - np.minimum(workload.prefix_hit_rate * prompts, prompts - 1.0)
        self._iterations = np.array([one.output_tokens for one in workload.bins]) / problem.model.emitted_tokens
        self._sizes: dict[tuple[int, bool, int], list[tuple[int, int]]] = {}
        for x, mix in enumerate(self._own.mixes):
            if mix.micro_batch:
                kind = mix.chunk_tokens, mix.sends_afar, mix.attention_dp
                self._sizes.setdefault(kind, []).append((mix.micro_batch, x))
        self.seats = dict[Template, int]()  # of a micro-batch, where they are more than planned
        if more_seats > 1.0 and problem.family.engine_settings.max_num_seqs is None:
            largest = ((t, self._largest(t, more_seats)) for t, _ in self._chosen)
            self.seats = {t: b for t, b in largest if b > self._own.mixes[t.mix].micro_batch}

    def _largest(self, template: Template, more: float) -> int:
        """Return the largest micro-batch up to so many times the planned one for which there is room."""
        mix = self._own.mixes[template.mix]
        if mix.role is Role.PREFILL or any(stage.pool_class >= 0 for stage in template.stages):
            return 0
        wanted = max(mix.micro_batch + 1.0, more * mix.micro_batch)
        sizes = [(b, x) for b, x in self._of_kind(mix) if mix.micro_batch < b <= wanted]
        return next((b for b, x in reversed(sizes) if _fits(self._costs, replace(template, mix=x))), 0)

    def _of_kind(self, mix: Mix) -> list[tuple[int, int]]:
        """Return all micro-batches of mixes that differ in them alone, ascending, each with its mix."""
        return sorted(self._sizes[mix.chunk_tokens, mix.sends_afar, mix.attention_dp])

    def queues(self) -> Iterator[SharedQueue]:
        """Yield the queue of each pair of roles that serves something."""
        for prefill, decode in ((Role.UNIFIED, Role.UNIFIED), (Role.PREFILL, Role.DECODE)):
            senders, receivers = self._of(prefill), self._of(decode)
            if not senders or not receivers or (prefill is Role.PREFILL and not self._routed_rps):
                continue
            total_rps = sum(t.rate * n for t, n in senders)
            share = 1.0 if prefill is Role.UNIFIED else self._routed_rps / total_rps
            prefills = [self._prefills(t, n, share) for t, n in senders]
            rates = [one.rate_rps for one in prefills]
            under_way_s = np.average([one.crowded_s for one in prefills], weights=rates, axis=0)
            arriving = sum(self._under_way(t) * n for t, n in senders) / sum(t.rate * n for t, n in receivers)
            seats = [replace(self._seats(t, under_way_s, arriving * t.rate), count=n) for t, n in receivers]
            yield SharedQueue(seats, prefills, self._weights, self._own.moments.computed_cv2, self._burstiness**2)

    def _of(self, role: Role) -> Sequence[Counted]:
        return [(t, n) for t, n in self._chosen if self._own.mixes[t.mix].role is role]

    def _in_flight(self, template: Template) -> int:
        """Return M, all copies that iterate together included."""
        m = self._costs.problem.family.in_flight[template.in_flight_index]
        return m * self._own.mixes[template.mix].attention_dp

    def _under_way(self, template: Template) -> float:
        """Return the prompts that a prefill replica computes at once."""
        chunk = self._own.mixes[template.mix].chunk_tokens
        return self._in_flight(template) * max(1.0, chunk / self._own.moments.mean_computed)

    def _prefills(self, template: Template, count: int, share: float) -> EqualPrefills:
        of_one = _known(self._costs, template, "prefills", lambda: self._prefills_of(template))
        return replace(of_one, lanes=count * of_one.lanes, rate_rps=share * count * template.rate)

    def _prefills_of(self, template: Template) -> EqualPrefills:
        mix, times = self._own.mixes[template.mix], prompt_times(self._costs, template)
        before, landed_s = np.ceil(self._computed / mix.chunk_tokens) - 1.0, landing_s(self._costs, template)
        sizes, seconds = zip(*self._chunks(template), strict=True)
        last_s = np.interp(self._computed - before * mix.chunk_tokens, sizes, seconds)
        return EqualPrefills(
            lanes=mix.attention_dp,
            occupied_s=self._computed / mix.chunk_tokens * times.slot_s,
            held=max(float(mix.micro_batch), max(1.0, mix.chunk_tokens / self._own.moments.mean_computed))
            * self._in_flight(template)
            / mix.attention_dp,
            rate_rps=template.rate,
            alone_s=before * times.busiest_s + last_s + landed_s,
            # Among others it begins anywhere in a chunk, and ends that much later.
            crowded_s=self._computed / mix.chunk_tokens * times.slot_s + times.round_trip_s + landed_s,
        )

    def _chunks(self, template: Template) -> list[tuple[int, float]]:
        """Return the family's chunks up to a replica's, ascending, each with its seconds in all stages, alone."""
        own = self._own.mixes[template.mix]
        kind = own.micro_batch, own.sends_afar, own.attention_dp
        alike = sorted(
            (mix.chunk_tokens, x)
            for x, mix in enumerate(self._own.mixes)
            if (mix.micro_batch, mix.sends_afar, mix.attention_dp) == kind and 0 < mix.chunk_tokens <= own.chunk_tokens
        )
        return [(size, prompt_times(self._costs, replace(template, mix=x)).chunk_s) for size, x in alike]

    def _seats(self, template: Template, under_way_s: FloatArray, arriving: float) -> EqualReplicas:
        make = partial(self._seats_of, template, under_way_s, arriving)
        if self._own.mixes[template.mix].role is Role.DECODE:  # depends on what sends prompts
            return make()
        return _known(self._costs, template, ("seats", self.seats.get(template)), make)

    def _seats_of(self, template: Template, under_way_s: FloatArray, arriving: float) -> EqualReplicas:
        costs, mix, in_flight = self._costs, self._own.mixes[template.mix], self._in_flight(template)
        sizes = self._taken(template)
        numbers = np.array([float(b * in_flight) for b, _ in sizes])
        rates = np.array([1.0 / _interval(costs, replace(template, mix=x)) for _, x in sizes])
        copy = mix.of_a_copy()
        iteration_s = in_flight / copy.iterations * template.interval_s
        seats, beside = self.seats.get(template, mix.micro_batch) * in_flight, 0
        if mix.role is Role.UNIFIED:
            holding_s = (self._iterations + self._computed / mix.chunk_tokens) * iteration_s
            chunks = max(1.0, self._own.moments.mean_computed / mix.chunk_tokens)
            beside = self._with_room(template, math.ceil(chunks / copy.iterations) * in_flight)
            most = costs.problem.family.engine_settings.max_num_seqs
            if most is not None:
                beside = max(0, min(beside, most * mix.attention_dp // in_flight * in_flight - seats))
        else:
            holding_s = self._iterations * iteration_s + under_way_s
            seats += max(1, math.ceil(arriving / in_flight)) * in_flight
            numbers = numbers + rates * float(self._weights @ under_way_s)
            if numbers[-1] < seats:  # the others wait to decode
                numbers, rates = np.append(numbers, float(seats)), np.append(rates, rates[-1])
        mean_s = float(self._weights @ holding_s)
        return EqualReplicas(
            count=1,
            seats=seats,
            beside=beside,
            in_flight=numbers,
            rates=rates,
            holding_cv2=float(self._weights @ (holding_s - mean_s) ** 2 / mean_s**2),
        )

    def _with_room(self, template: Template, prompts: int) -> int:
        """Return how many of these prompts KV has room for beside the requests in all of a replica's seats."""
        mix, f, model = self._own.mixes[template.mix], template.in_flight_index, self._own.problem.model
        seats = self.seats.get(template, mix.micro_batch)
        full = replace(template, mix=dict(self._of_kind(mix))[seats])
        prompt = model.cached_tokens(self._own.moments.mean_prompt)
        counted = float(self._costs.scopes[template.scope].tables.prompt_tokens[full.mix, f])

        def is_too_many(each: int) -> bool:
            return not _fits(self._costs, full, max(0.0, each * prompt - counted))

        copies = mix.attention_dp
        return copies * bisect_left(range(1, prompts // copies + 1), True, key=is_too_many)

    def _taken(self, template: Template) -> list[tuple[int, int]]:
        """Return micro-batches up to the replica's seats, each with its mix, ascending: those nearest to `FILLS`."""
        mix = self._own.mixes[template.mix]
        most = self.seats.get(template, mix.micro_batch)
        smaller = [one for one in self._of_kind(mix) if one[0] <= most]
        wanted = (min(smaller, key=lambda one: abs(one[0] - fill * most)) for fill in FILLS)
        return sorted({smaller[0], *wanted})


# --- Replicas that were found, with other iterations


def retuned(costs: CostTables, outcome: Outcome) -> Iterator[Outcome]:
    """Yield the outcome with every chunk of the family and smaller micro-batches in all of its unified replicas.

    A search that counts saturated rates fills the limits with large batches and chunks, whose iterations are long.
    Replicas of the same stages with less in each iteration serve less when saturated, but prompts wait less.
    """
    unified = [t for t, _ in outcome.chosen if costs.mixes[t.mix].role is Role.UNIFIED]
    if not unified:
        return
    for chunk in costs.problem.family.chunk_tokens:
        tried = {tuple(unified)}
        for share in BATCHES:
            others = {template: _with(costs, template, chunk, share) for template in unified}
            changed = {template: other for template, other in others.items() if other is not None}
            if len(changed) < len(others) or (key := tuple(changed.values())) in tried:
                continue
            tried.add(key)
            yield replace(outcome, chosen=tuple((changed.get(t, t), n) for t, n in outcome.chosen))


def _with(costs: CostTables, template: Template, chunk_tokens: int, share: float) -> Template | None:
    """Return a replica of the same stages with this chunk and at most a share of its micro-batch, if it may run so."""
    mix, m = costs.mixes[template.mix], costs.problem.family.in_flight[template.in_flight_index]
    kind = mix.sends_afar, mix.attention_dp
    alike = [
        (other.micro_batch, x)
        for x, other in enumerate(costs.mixes)
        if other.role is Role.UNIFIED
        and other.chunk_tokens == chunk_tokens
        and (other.sends_afar, other.attention_dp) == kind
        and other.micro_batch <= max(1.0, share * mix.micro_batch)
    ]
    if not alike:
        return None
    _, x = max(alike)
    other = replace(template, mix=x)
    other = replace(other, interval_s=_interval(costs, other))
    own = costs.of_scope(template.scope)  # requests of a class have iterations of their own
    tpot_s = mixes.tpot_per_interval(own.problem.model, own.mixes[x], m) * other.interval_s
    limit_s = own.problem.objective.tpot_limit_s
    is_in_time = limit_s is None or tpot_s <= limit_s * (1.0 + 1e-9)
    return other if is_in_time and _fits(costs, other) else None


def _fits(costs: CostTables, template: Template, more_tokens: float = 0.0) -> bool:
    """Return whether all stages have room for their layers, with so many more KV tokens in a copy."""
    return all(room_layers(costs, template, i, more_tokens) >= one.layers for i, one in enumerate(template.stages))
