"""Simulated replicas built from a plan: stage copies with their timings, KV blocks and attention workers."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hetis.simulator.attention_workers import PoolCopy, SharedCard
from hetis.simulator.events import Events
from hetis.simulator.growth import KvGrowth
from hetis.simulator.links import FleetLinks
from hetis.simulator.memory import KvRoom, card_room_bytes, group_blocks, rank_room_bytes
from hetis.simulator.micro_batch import SimulatedStageCopy
from hetis.simulator.pipeline import Apart, Greedy, Lockstep
from hetis.simulator.pool_timing import PoolTiming
from hetis.simulator.replica import Batching, ReplicaRun
from hetis.simulator.request_log import RequestLog
from hetis.simulator.timing import StageTiming
from hetis.simulator.values import Settings
from hetis.solver.check.fleet import Fleet, ReplicaShape, StageShape, replica_shape
from hetis.solver.check.rederive import Rederivation
from hetis.solver.check.setting import Setting
from hetis.solver.check.structure import check_replica_structure
from hetis.solver.check.violation import Rule
from hetis.solver.errors import InvalidProblemError
from hetis.solver.model import ModelSpec
from hetis.solver.plan import AttentionWorkerPool, Plan, ReplicaPlan, Role
from hetis.solver.problem import PlacementProblem
from hetis.solver.workload import WorkloadMoments

# Plans outside the searched family can run as well.
_OF_THE_SEARCH = frozenset(
    {
        Rule.SETTING,
        Rule.MAX_NUM_SEQS,
        Rule.IN_FLIGHT,
        Rule.EQUAL_LAYERS,
        Rule.ONE_TYPE,
        Rule.POOL_SIZE,
        Rule.COPIES,
        Rule.SHARED_POOL,
    }
)


PACE = 1.2  # prompt tokens of a paced iteration over those that keep the seats filled on average: lengths vary


class Builder:
    """Builds the replicas of a plan; equal stages share their timings.

    Raises:
        InvalidProblemError: the plan contradicts its problem.
    """

    def __init__(
        self, plan: Plan, problem: PlacementProblem, log: RequestLog, events: Events, settings: Settings
    ) -> None:
        self.plan, self.problem = plan, problem
        self.links = FleetLinks()
        self._log, self._events, self._settings = log, events, settings
        self.fleet = Fleet.of(problem.cluster)
        workload = problem.workload.clipped_to(problem.model.max_position)
        self.moments: WorkloadMoments = workload.moments(block_tokens=problem.assumptions.block_tokens)
        self._growth = KvGrowth(problem.model, problem.assumptions.block_tokens)
        self._derivation = Rederivation(problem)
        self._problems: dict[str, PlacementProblem] = {}  # in the precision of a GPU type
        self._timings: dict[tuple[StageShape, bool, bool, float, int], StageTiming] = {}

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
            rate=self._sent(number) if one.role is Role.PREFILL else one.rate,
            batching=self._batching(one, number, shape),
            growth=self._growth,
            log=self._log,
            stages=stages,
        )
        discipline: type[Apart | Greedy | Lockstep] = Greedy if self._settings.discipline == "greedy" else Apart
        discipline = Lockstep if one.expert_parallel else discipline
        replica.discipline = discipline(self._events, self._log, replica.done, traced=self._settings.trace)
        return replica

    def _batching(self, one: ReplicaPlan, number: int, shape: ReplicaShape) -> Batching:
        b, chunk = one.micro_batch, math.ceil(one.chunk_tokens / _steps(one, self.problem.model))
        growing: int | None = None
        if b and self.problem.family.engine_settings:  # an engine may have more seats than KV has room for
            growing = batch_with_room(shape, self._derivation)
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
            prompt, iterations = self.moments.mean_computed, self.moments.mean_output / b
            if self._settings.chunks == "paced":
                chunk = min(chunk, max(1, math.ceil(PACE * prompt / iterations)))
            ahead = max(1, math.ceil(max(1.0, prompt / chunk) / max(iterations, prompt / chunk)))
        most = self.problem.family.engine_settings.max_num_seqs
        if most is not None and one.role is not Role.DECODE:  # engines count a request from its first chunk on
            ahead = max(0, min(ahead, most * one.attention_dp // one.in_flight - b))
        return Batching(micro_batch=b, in_flight=one.in_flight, chunk_tokens=chunk, ahead=ahead, growing=growing)

    def _under_way(self, prefill: int) -> float:
        """Return the number of prompts that a prefill replica works on at once when its chunks are full."""
        one = self.plan.replicas[prefill]
        return one.in_flight * max(1.0, one.chunk_tokens / self.moments.mean_computed)

    def _sent(self, prefill: int) -> float:
        return sum(route.rate for route in self.plan.kv_routes if route.prefill == prefill)

    def _copies(
        self, number: int, position: int, one: ReplicaPlan, shape: ReplicaShape, pool: AttentionWorkerPool | None,
        shares: Mapping[str, float], cards: Mapping[str, SharedCard],
    ) -> list[SimulatedStageCopy]:  # fmt: skip
        stage, stage_shape, problem = one.stages[position], shape.stages[position], self._problem_of(one)
        is_first, is_last = position == 0, position == len(one.stages) - 1
        steps = _steps(one, problem.model)
        key = (stage_shape, is_first, is_last, steps, one.attention_dp)
        timing = self._timings.get(key)
        if timing is None:
            timing = self._timings[key] = StageTiming(
                problem, stage_shape, is_first=is_first, is_last=is_last, steps=steps, attention_dp=one.attention_dp
            )
        setting = Setting.of(self.problem, self.moments, shape)
        rank_bytes = rank_room_bytes(setting, stage_shape, is_first=is_first, is_last=is_last)
        copies, most_blocks = [], problem.family.engine_settings.kv_blocks
        for copy in range(stage.copies):
            ranks = stage.devices[copy * stage.tp : (copy + 1) * stage.tp]
            # Copies that share their experts fail together, and send and receive KV over one link.
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
                workers = self._pool_copy(problem, timing, pool, ranks, names, rank_bytes, shares, cards, seats)
            track = f"replica {number}, stage {position + 1}, copy {copy + 1}: {ranks[0]}"
            copies.append(
                SimulatedStageCopy(
                    track=track, devices=devices, stage=position, timing=timing, room=room, pool=workers, cards=names
                )
            )
        return copies

    def _problem_of(self, one: ReplicaPlan) -> PlacementProblem:
        gpu = one.stages[0].gpu
        if gpu not in self._problems:
            self._problems[gpu] = self.problem.of_replica(one)
        return self._problems[gpu]

    def _pool_copy(
        self, problem: PlacementProblem, timing: StageTiming, pool: AttentionWorkerPool, ranks: tuple[str, ...],
        names: tuple[str, ...], rank_bytes: float, shares: Mapping[str, float], cards: Mapping[str, SharedCard],
        seats: float,
    ) -> PoolCopy:  # fmt: skip
        tp, model = timing.shape.tp, problem.model
        away = pool.kv_head_groups * tp
        blocks = [tp * self._blocks(timing, rank_bytes, 1)]
        for name in names:
            card_bytes = card_room_bytes(self.problem, pool.gpu)
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
            mean_output=self.moments.mean_output,
            growth=self._kept_for_growth(seats),
            shared=tuple(cards[name] for name in names) if pool.shared else None,
            links=self.links,
        )

    def _kept_for_growth(self, seats: float) -> int:
        """Return the tokens of room that a new request leaves for its output if this number of requests decode.

        Counted as in the plan: the average output tokens held by a request, half of the mean, and its part of the
        reserve that all of them together have above this. Room for the whole mean would leave 1/5 of 256 seats empty.
        """
        m, z = self.moments, self.problem.assumptions.kv_headroom_z
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
    """Return the steps of an iteration: the tokens that it adds to a decoding request, where there are any."""
    return 1.0 if one.role is Role.PREFILL else model.emitted_tokens


def batch_with_room(shape: ReplicaShape, derivation: Rederivation) -> int:
    """Return the size of the largest micro-batch for whose KV a replica has room, from 1 to that of the shape."""
    sizes = range(1, shape.micro_batch + 1)

    def is_too_large(size: int) -> bool:
        return not derivation.of(replace(shape, micro_batch=size)).fits

    return max(1, bisect_left(sizes, True, key=is_too_large))


def check_simulable(one: ReplicaPlan, number: int, problem: PlacementProblem, fleet: Fleet) -> None:
    """Refuse a replica that cannot be simulated, such as one on GPUs that the cluster lacks.

    Raises:
        InvalidProblemError: the first reason why it cannot.
    """
    for violation in check_replica_structure(one, f"replica {number}", problem, fleet):
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
    if one.expert_parallel and one.in_flight != one.attention_dp:  # of one stage, as the structure has been checked
        raise InvalidProblemError(
            f"plan cannot be simulated: replica {number}: its copies share experts, "
            "it must have one stage with as many copies as micro-batches in flight"
        )
    if not one.rate > 0:
        raise InvalidProblemError(f"plan cannot be simulated: replica {number}: rate is {one.rate}, must be > 0")


def _shares_of_shared_cards(one: ReplicaPlan) -> dict[str, float]:
    """Return the (layer, head group) pairs that the stages together give to each card shared by several of them."""
    total: dict[str, float] = {}
    for pool in one.attention_workers:
        if pool.shared:
            stage = one.stages[pool.stage]
            for name in pool.devices:
                total[name] = total.get(name, 0.0) + stage.num_layers * pool.kv_head_groups * stage.tp
    return total
