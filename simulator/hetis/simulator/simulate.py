"""Simulation of a plan with given requests, in virtual time."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from hetis.simulator.attention_workers import PoolCopy, SharedCard
from hetis.simulator.disciplines import Apart, Lockstep
from hetis.simulator.events import Events, FleetLinks
from hetis.simulator.fleet import Faults, KvTransfers, SimulatedFleet
from hetis.simulator.kv_memory import KvGrowth, KvRoom, card_room_bytes, group_blocks, rank_room_bytes
from hetis.simulator.micro_batch import SimulatedStageCopy
from hetis.simulator.pool_timing import PoolTiming
from hetis.simulator.replica import Batching, ReplicaRun
from hetis.simulator.routers import RangeRouter, router_of
from hetis.simulator.timing import StageTiming
from hetis.simulator.values import FloatArray, RequestLog, Requests, Run, SaturatingSource, Series, Settings
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.replica_shapes import Fleet, ReplicaShape, StageShape, replica_shape
from hetis.solver.check.setting import Setting
from hetis.solver.check.structure import check_replica_structure
from hetis.solver.check.violation import Rule
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import AttentionWorkerPool, Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import WorkloadMoments

# Rules of the search alone: plans outside the searched family can be simulated as well.
_OF_THE_SEARCH = frozenset((
    Rule.SETTING, Rule.MAX_NUM_SEQS, Rule.IN_FLIGHT, Rule.EQUAL_LAYERS, Rule.ONE_TYPE, Rule.POOL_SIZE, Rule.COPIES,
    Rule.SHARED_POOL,
))  # fmt: skip

# Of stages, which depend on the problem alone: runs of it may share them.
Timings = dict[tuple[StageShape, bool, bool, float, int, tuple[str, ...]], StageTiming]


class Builder:
    """Builds the replicas of a plan; equal stages share their timings, also with earlier runs of the problem.

    Raises:
        InvalidProblemError: the plan contradicts its problem.
    """

    def __init__(
        self, plan: Plan, problem: PlacementProblem, log: RequestLog, events: Events, settings: Settings,
        timings: Timings | None = None,
    ) -> None:  # fmt: skip
        self.plan, self.problem, self._timings = plan, problem, {} if timings is None else timings
        self.links = FleetLinks()
        self._log, self._events, self._settings = log, events, settings
        self.fleet = Fleet.of(problem.cluster)
        self._moments = problem.moments_of_ranges()
        self._derivation = Rederivation(problem)
        self._growth = KvGrowth(problem.model, problem.assumptions.block_tokens)
        self._problems: dict[tuple[str, tuple[str, ...]], PlacementProblem] = {}  # by GPU type and classes

    def replicas(self) -> list[ReplicaRun]:
        return [self._replica(number, one) for number, one in enumerate(self.plan.replicas)]

    def _replica(self, number: int, one: ReplicaPlan) -> ReplicaRun:
        check_simulable(one, number, self.problem, self.fleet)
        shape = replica_shape(one, self.problem, self.fleet)
        pools = {pool.stage: pool for pool in one.attention_workers}
        shares = _shares_of_shared_cards(one)
        cards = {name: SharedCard() for name in shares}
        stages = [
            self._copies(number, position, one, shape, pools.get(position), shares, cards)
            for position in range(len(one.stages))
        ]
        replica = ReplicaRun(
            number,
            rate=(self._sent(number) if one.role is Role.PREFILL else one.rate) / self.plan.pool_share(one.classes),
            batching=self._batching(one, number, shape),
            growth=self._growth,
            log=self._log,
            stages=stages,
        )
        discipline: type[Lockstep] | partial[Apart]
        discipline = partial(Apart, passes_at_once=self._passes_at_once(replica), is_alone=one.in_flight == 1)
        discipline = Lockstep if one.expert_parallel else discipline
        replica.discipline = discipline(self._events, self._log, replica.done)
        return replica

    def _passes_at_once(self, replica: ReplicaRun) -> bool:
        """Return whether nothing interferes with a micro-batch on its way through the stages of a replica."""
        is_watched = bool(self._settings.faults) or self._settings.sample_every_s is not None
        copies = [copies for copies in replica.stages if len(copies) > 1]
        shared = (copy.pool.is_shared for copies in replica.stages for copy in copies if copy.pool is not None)
        return not is_watched and not copies and not any(shared)

    def _batching(self, one: ReplicaPlan, number: int, shape: ReplicaShape) -> Batching:
        b, chunk = one.micro_batch, math.ceil(one.chunk_tokens / _steps(one, self.problem.model))
        growing: int | None = None
        if b and self.problem.family.engine_settings:  # an engine may have more seats than there is room for KV
            growing = batch_with_room(shape, self._derivation.serving(one.classes))
        if one.role is Role.PREFILL:
            ahead = chunk  # any number of prompts that fit in a chunk
        elif one.role is Role.DECODE:
            arriving = sum(
                self._under_way(route.prefill) * route.rate / self._sent(route.prefill)
                for route in self.plan.kv_routes
                if route.decode == number
            )
            ahead = max(1, math.ceil(arriving / one.in_flight))
        else:
            moments = self._moments[one.classes]
            prompt, iterations = moments.mean_computed, moments.mean_output / b
            ahead = max(1, math.ceil(max(1.0, prompt / chunk) / max(iterations, prompt / chunk)))
        most = self.problem.family.engine_settings.max_num_seqs
        if most is not None and one.role is not Role.DECODE:  # engines count a request from its first chunk on
            ahead = max(0, min(ahead, most * one.attention_dp // one.in_flight - b))
        return Batching(micro_batch=b, in_flight=one.in_flight, chunk_tokens=chunk, ahead=ahead, growing=growing)

    def _under_way(self, prefill: int) -> float:
        """Return the number of prompts that a prefill replica works on at once when its chunks are full."""
        one = self.plan.replicas[prefill]
        return one.in_flight * max(1.0, one.chunk_tokens / self._moments[one.classes].mean_computed)

    def _sent(self, prefill: int) -> float:
        return sum(route.rate for route in self.plan.kv_routes if route.prefill == prefill)

    def _copies(
        self, number: int, position: int, one: ReplicaPlan, shape: ReplicaShape, pool: AttentionWorkerPool | None,
        shares: Mapping[str, float], cards: Mapping[str, SharedCard],
    ) -> list[SimulatedStageCopy]:  # fmt: skip
        stage, stage_shape, problem = one.stages[position], shape.stages[position], self._problem_of(one)
        is_first, is_last = position == 0, position == len(one.stages) - 1
        steps = _steps(one, problem.model)
        key = (stage_shape, is_first, is_last, steps, one.attention_dp, one.classes)
        timing = self._timings.get(key)
        if timing is None:
            timing = self._timings[key] = StageTiming(
                problem, stage_shape, is_first=is_first, is_last=is_last, steps=steps, attention_dp=one.attention_dp
            )
        moments = self._moments[one.classes]
        setting = Setting.of(self.problem, moments, shape)
        rank_bytes = rank_room_bytes(setting, stage_shape, is_first=is_first, is_last=is_last)
        copies, most_blocks = [], problem.family.engine_settings.kv_blocks
        for copy in range(stage.copies):
            ranks = stage.devices[copy * stage.tp : (copy + 1) * stage.tp]
            # Copies that share their experts fail together, and send and receive KV over a single link.
            devices = stage.devices if one.expert_parallel else ranks
            room, workers = None, None
            names: tuple[str, ...] = ()
            if pool is None:
                blocks = self._blocks(timing, rank_bytes, timing.cost.shape.groups)
                room = KvRoom(blocks if most_blocks is None else min(blocks, most_blocks))
            else:
                room = None if most_blocks is None else KvRoom(most_blocks)
                num = len(pool.devices) // stage.copies
                names = pool.devices[copy * num : (copy + 1) * num]
                seats = one.micro_batch * one.in_flight / stage.copies
                workers = self._pool_copy(
                    problem, timing, pool, ranks, names, rank_bytes, shares, cards, moments, seats
                )
            copies.append(
                SimulatedStageCopy(
                    ranks=ranks,
                    stage=position,
                    timing=timing,
                    room=room,
                    pool=workers,
                    cards=names,
                    devices=devices,
                )
            )
        return copies

    def _problem_of(self, one: ReplicaPlan) -> PlacementProblem:
        key = one.stages[0].gpu, one.classes
        if key not in self._problems:
            self._problems[key] = self.problem.of_replica(one)
        return self._problems[key]

    def _pool_copy(
        self, problem: PlacementProblem, timing: StageTiming, pool: AttentionWorkerPool, ranks: tuple[str, ...],
        names: tuple[str, ...], rank_bytes: float, shares: Mapping[str, float], cards: Mapping[str, SharedCard],
        moments: WorkloadMoments, seats: float,
    ) -> PoolCopy:  # fmt: skip
        tp, model, planned = timing.shape.tp, problem.model, timing.shape.pool
        assert planned is not None, "the stage has these attention workers"
        away = pool.kv_head_groups * tp
        blocks = [tp * self._blocks(timing, rank_bytes, 1)]
        for name in names:
            card_bytes = card_room_bytes(self.problem, planned)
            if pool.shared:
                card_bytes *= timing.layers * away / shares[name]
            blocks.append(self._blocks(timing, card_bytes, 1))
        return PoolCopy(
            names=(ranks[0], *names),
            blocks=np.array(blocks, np.int64),
            timing=PoolTiming(problem, timing, cards=len(names)),
            split=(model.head_groups - away, away),
            log=self._log,
            events=self._events,
            settings=self._settings,
            mean_output=moments.mean_output,
            growth=self._kept_for_growth(moments, seats),
            shared=tuple(cards[name] for name in names) if pool.shared else None,
            links=self.links,
        )

    def _kept_for_growth(self, moments: WorkloadMoments, seats: float) -> int:
        """Return the tokens of room that a new request leaves for its output if this number of requests decode.

        As in the plan: the average output that a request holds, which is half of the mean output, plus its part of the
        excess of the joint reserve of all requests over this average. Room for the whole mean would leave 1/5 of 256
        seats empty.
        """
        m, z = moments, self.problem.assumptions.kv_headroom_z
        return round(min(m.mean_output, m.mean_output / 2 + z * m.resident_context_sd / math.sqrt(seats)))

    def _blocks(self, timing: StageTiming, room_bytes: float, groups: int) -> int:
        return group_blocks(
            room_bytes,
            timing.cost.model,
            layers=timing.layers,
            groups=groups,
            block_tokens=self.problem.assumptions.block_tokens,
        )


def _steps(one: ReplicaPlan, model: ModelSpec) -> float:
    """Return the steps of an iteration: the tokens that it adds to each decoding request, if there are any."""
    return 1.0 if one.role is Role.PREFILL else model.emitted_tokens


def batch_with_room(shape: ReplicaShape, derivation: Rederivation) -> int:
    """Return the largest micro-batch whose KV fits in a replica, from 1 to the size in the shape."""
    sizes = range(1, shape.micro_batch + 1)

    def is_too_large(size: int) -> bool:
        return not derivation.of(replace(shape, micro_batch=size)).fits

    return max(1, bisect_left(sizes, True, key=is_too_large))


def check_simulable(one: ReplicaPlan, number: int, problem: PlacementProblem, fleet: Fleet) -> None:
    """Refuse a replica that cannot be simulated, for instance because its GPUs are not in the cluster.

    Raises:
        InvalidProblemError: the replica cannot be simulated; gives the first reason.
    """
    most, checked = problem.family.engine_settings.max_num_seqs, one
    if one.in_flight == most and not one.expert_parallel:
        # An engine has a micro-batch for every stage, of which only as many hold a request as it may run at once.
        checked = replace(one, in_flight=max(most, len(one.stages)))
    for violation in check_replica_structure(checked, f"replica {number}", problem, fleet):
        if violation.rule not in _OF_THE_SEARCH:
            raise InvalidProblemError(f"plan cannot be simulated: {violation}")
    _check_batching(one, number)


def _check_batching(one: ReplicaPlan, number: int) -> None:
    least = {
        "micro_batch": 0 if one.role is Role.PREFILL else 1,
        "chunk_tokens": 0 if one.role is Role.DECODE else 1,
        "in_flight": 1,
    }
    for name, limit in least.items():
        if getattr(one, name) < limit:
            raise InvalidProblemError(
                f"plan cannot be simulated: replica {number}: {name} is {getattr(one, name)}, must be >= {limit}"
            )
    if one.expert_parallel and one.in_flight != one.attention_dp:  # the structure check ensures a single stage
        raise InvalidProblemError(
            f"plan cannot be simulated: replica {number}: its copies share experts, "
            "it must have one stage with as many copies as micro-batches in flight"
        )
    if not one.rate > 0:
        raise InvalidProblemError(f"plan cannot be simulated: replica {number}: rate is {one.rate}, must be > 0")


def _shares_of_shared_cards(one: ReplicaPlan) -> dict[str, float]:
    """Return the (layer, head group) pairs assigned to each shared card, over all stages that share it."""
    total: dict[str, float] = {}
    for pool in one.attention_workers:
        if pool.shared:
            stage = one.stages[pool.stage]
            for name in pool.devices:
                total[name] = total.get(name, 0.0) + stage.num_layers * pool.kv_head_groups * stage.tp
    return total


class Sampler:
    """Samples the devices of all replicas every ``every_s``, until no other event is scheduled."""

    def __init__(self, replicas: Sequence[ReplicaRun], events: Events, every_s: float) -> None:
        self._copies = [copy for replica in replicas for copies in replica.stages for copy in copies]
        self._devices = tuple(dict.fromkeys(name for copy in self._copies for name in (*copy.devices, *copy.cards)))
        self._place = {name: position for position, name in enumerate(self._devices)}
        self._events, self._every_s = events, every_s
        self._times = list[float]()
        self._used = list[FloatArray]()
        self._busy = list[FloatArray]()
        self._before = 0.0, np.zeros(len(self._devices))
        events.at(every_s, self._tick)

    def series(self, end_s: float) -> Series:
        """Return all samples, plus one at the end."""
        if not self._times or self._times[-1] < end_s:
            self._sample(end_s)
        return Series(
            devices=self._devices,
            times_s=np.array(self._times),
            kv_used_fraction=np.array(self._used),
            busy_fraction=np.array(self._busy),
        )

    def _tick(self, now_s: float) -> None:
        if self._events.is_empty:  # nothing can change any more: the run ended with the event before
            self._events.now_s = self._events.before_s
            return
        self._sample(now_s)
        self._events.at(now_s + self._every_s, self._tick)

    def _sample(self, now_s: float) -> None:
        used, busy_s = np.zeros(len(self._devices)), np.zeros(len(self._devices))
        for copy in self._copies:
            self._add(copy, now_s, used, busy_s)
        before_s, busy_before = self._before
        self._times.append(now_s)
        self._used.append(used)
        self._busy.append(np.clip((busy_s - busy_before) / max(now_s - before_s, 1e-12), 0.0, 1.0))
        self._before = now_s, busy_s

    def _add(self, copy: SimulatedStageCopy, now_s: float, used: FloatArray, busy_s: FloatArray) -> None:
        ranks = [self._place[name] for name in copy.ranks]
        busy_s[ranks] += copy.busy_until(now_s)
        if copy.room is not None:
            used[ranks] = copy.room.used / max(1, copy.room.total)
        if copy.pool is not None:
            pool = copy.pool
            share = 1.0 - pool.state.free_blocks() / np.maximum(1, pool.total_blocks)
            used[ranks] = share[0]
            cards = [self._place[name] for name in copy.cards]
            used[cards] = np.maximum(used[cards], share[1:])
            busy_s[cards] += pool.busy_s[1:]


def simulate(
    plan: Plan, problem: PlacementProblem, requests: Requests, settings: Settings | None = None,
    timings: Timings | None = None,
) -> Run:  # fmt: skip
    """Return the run of a plan with requests: a list or endless stream of arrivals, or a saturating source.

    This is a pure function: the same arguments give the same run. The run ends when all requests are finished, or at
    ``settings.horizon_s``, which an endless stream needs.

    Raises:
        InvalidProblemError: the plan contradicts the problem, arrival times fall, or a fault names an unknown device.
    """
    settings = settings or Settings()
    log, events = RequestLog(), Events()
    builder = Builder(plan, problem, log, events, settings, timings)
    replicas = builder.replicas()
    router = (
        RangeRouter(plan, problem.workload, settings, replicas, log)
        if plan.classes
        else router_of(settings, plan, replicas)
    )
    fleet = SimulatedFleet(replicas, log, events, router)
    if plan.kv_routes:
        fleet.transfers = KvTransfers(
            plan, problem, builder.fleet, fleet.replicas, log, events, fleet.route, builder.links,
            to_emptiest=settings.router == "fewest-tokens",
        )  # fmt: skip
    if not fleet.takers:
        raise InvalidProblemError("the plan has no replica that takes prompts")
    faults = Faults(fleet)
    for fault in settings.faults:
        if fault.device not in builder.fleet.devices:
            raise InvalidProblemError(f"fault at {fault.at_s} s: the cluster has no device {fault.device}")
        events.at(fault.at_s, faults.change, fault.device, fault.joins)
    sampler = None
    if settings.sample_every_s is not None:
        sampler = Sampler(fleet.replicas, events, settings.sample_every_s)
    if isinstance(requests, SaturatingSource):
        if plan.classes:
            raise InvalidProblemError("a plan with classes of requests needs arrivals, which its router can choose for")
        fleet.serve_all(requests)
    else:
        fleet.serve(iter(requests))
    end_s = events.run(math.inf if settings.horizon_s is None else settings.horizon_s)
    for replica in fleet.replicas:
        replica.discipline.interrupt()
    if events.is_empty:
        _check_all_is_given_back(fleet)
    return log.run(end_s, None if sampler is None else sampler.series(end_s))


def _check_all_is_given_back(fleet: SimulatedFleet) -> None:
    """Check that no request holds a block once no event is left; otherwise the simulator has a bug."""
    if fleet.held or any(replica.queue for replica in fleet.replicas):
        return  # some requests wait for devices that never return
    for replica in fleet.replicas:
        assert replica.outstanding == 0, f"replica {replica.number} still has {replica.outstanding} requests"
        assert replica.is_empty(), f"replica {replica.number} still holds KV blocks"
