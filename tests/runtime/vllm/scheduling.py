"""The scheduler's side of the plugin without vLLM: a pool and tables that only count, and ranks that only answer."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration

from hetis.runtime.vllm.calibration import head_shape
from hetis.runtime.vllm.executing import surround
from hetis.runtime.vllm.scheduler import EngineShape, SchedulerSide
from hetis.runtime.vllm.settings import PluginSettings
from hetis.runtime.vllm.steering import SteeredVllm
from hetis.runtime.vllm.steps import LOCAL, Event, MoveStep, RankReport, StepPlan, WorkerReport
from hetis.v1.change_pb2 import Change, ChangePart
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    ApplyAssignmentRequest,
    CopyMovesRequest,
    FlipMovesRequest,
    FlipMovesResponse,
    ReleaseMovesRequest,
    ReserveMovesRequest,
    ReserveMovesResponse,
)
from hetis.v1.head_map_pb2 import HeadMap, Move, MoveReason
from hetis.v1.replica_pb2 import Assignment, AssignmentGoal, DeviceCondition, ReplicaPlan
from hetis.v1.stage_pb2 import AttentionPiece, HeadShape, StageDevice, StageModel

REPLICA = "clusters/c/replicas/r"
NAMES = ("n/0", "n/1", "n/2")  # the planner's names of the engine's devices
GROUPS, LAYERS, BLOCK = 4, 3, 16
EVERYTHING = (
    ChangePart.CHANGE_PART_AUTHORITY,
    ChangePart.CHANGE_PART_SOURCE,
    ChangePart.CHANGE_PART_TARGET,
)


class CountedBlocks:
    """The block manager: a pool, and how many blocks each group of a request has."""

    def __init__(self, num_blocks: int) -> None:
        self.homes: Any = None
        self.relieve: Callable[[int, str, int], None] | None = None
        self.events: list[Event] = []
        self.free = num_blocks
        self.anchors: dict[str, int] = {}
        self.tables: dict[str, list[int]] = {}
        self.needed: dict[str, int] = {}
        self._next_anchor = 1

    @property
    def block_pool(self) -> CountedBlocks:
        return self

    def get_num_free_blocks(self) -> int:
        return self.free

    def take(self, request_id: str, tokens: int) -> bool:
        """Allocate room for this many tokens of a request, as vLLM does; return False if there is none."""
        needed = -(-tokens // BLOCK)
        if not self.homes.has_room(request_id, tokens):
            return False
        if self._missing(request_id, needed) > self.free and self.relieve is not None and request_id in self.tables:
            self.relieve(self._missing(request_id, needed) - self.free, request_id, tokens)
        if self._missing(request_id, needed) > self.free:
            return False
        if request_id not in self.tables:
            self.anchors[request_id], self._next_anchor = self._next_anchor, self._next_anchor + 1
            self.free -= 1
            self.tables[request_id] = [0] * GROUPS
            self.events.append(self.homes.admitted(request_id, self.anchors[request_id]))
        for group in self._growing(request_id):
            self.extend(request_id, group, needed)
        self.needed[request_id] = needed
        self.homes.grow(request_id, tokens)
        return True

    def release(self, request_id: str) -> None:
        if request_id in self.tables:
            self.free += 1 + sum(self.tables.pop(request_id))
            self.homes.released(request_id)

    def anchor(self, request_id: str) -> int:
        return self.anchors[request_id]

    def blocks_of(self, request_id: str) -> int:
        return self.needed[request_id]

    def held(self, request_id: str, group: int) -> int:
        return self.tables[request_id][group]

    def extend(self, request_id: str, group: int, blocks: int) -> None:
        more = max(blocks - self.tables[request_id][group], 0)
        assert more <= self.free, "the pool is empty"
        self.free -= more
        self.tables[request_id][group] += more

    def free_group(self, request_id: str, group: int) -> None:
        self.free += self.tables[request_id][group]
        self.tables[request_id][group] = 0

    def left(self, request_id: str, groups: Sequence[int]) -> None:
        for group, device in enumerate(self.homes.devices(request_id)):
            if device != LOCAL and group in groups:
                self.free_group(request_id, group)

    def finished(self, request: Any) -> None:
        """There is no prefix cache."""

    def computed_again(self, request_id: str) -> None:
        """No blocks are shared."""

    def lost(self, request_id: str) -> None:
        self.left(request_id, range(GROUPS))

    def _growing(self, request_id: str) -> list[int]:
        devices = self.homes.devices(request_id)
        tables = self.tables.get(request_id, [0] * GROUPS)
        return [group for group in range(GROUPS) if devices[group] == LOCAL or tables[group]]

    def _missing(self, request_id: str, needed: int) -> int:
        """Return the blocks that a request lacks, with the anchor of a new one."""
        tables = self.tables.get(request_id, [0] * GROUPS)
        missing = sum(max(needed - tables[group], 0) for group in self._growing(request_id))
        return missing + (request_id not in self.tables)


@dataclass
class FakeRequest:
    """A vLLM request."""

    request_id: str
    num_tokens: int
    max_tokens: int = 200
    num_output_tokens: int = 0
    arrival_time: float = 0.0
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    num_stale_output_tokens: int = 0
    drop_stale_output: bool = False


@dataclass
class Ranks:
    """One rank, or several that do the same: they copy a move within some steps.

    Attributes:
        copy_steps: number of steps that a copy takes.
        blocks: number of blocks of each worker; 0: the worker is lost.
    """

    count: int
    copy_steps: int
    blocks: list[int]
    under_way: dict[int, int] = field(default_factory=dict)
    told: list[int] = field(default_factory=list)

    def step(self, plan: StepPlan) -> dict[int, RankReport]:
        copied = set()
        for event in plan.events:
            if isinstance(event, MoveStep):
                if event.phase == "begin":
                    self.under_way[event.move.number] = self.copy_steps
                else:
                    self.under_way.pop(event.move.number, None)
        for number in self.under_way:
            self.under_way[number] -= 1
            if self.under_way[number] == 0:
                copied.add(number)
        changed = {i + 1: WorkerReport(n) for i, n in enumerate(self.blocks) if self.told[i] != n}
        self.told = list(self.blocks)
        return {rank: RankReport(devices=dict(changed), copied=set(copied)) for rank in range(self.count)}


class World:
    """vLLM's scheduler around `SchedulerSide`, which a planner steers."""

    def __init__(
        self,
        *,
        pool: int = 400,
        blocks: tuple[int, ...] = (400, 400),
        ranks: int = 1,
        copy_steps: int = 1,
        policy: str = "local",
        socket: Path | None = None,
        stage_layers: tuple[int, ...] = (),
    ) -> None:
        stages = max(len(stage_layers), 1)
        ranks *= stages
        workers = [
            {
                "name": "+".join([NAMES[1 + i], *(f"m{stage}/{i}" for stage in range(1, stages))]),
                "addresses": [f"127.0.0.1:{7000 + i * ranks + rank}" for rank in range(ranks)],
                "keyFile": "key",
            }
            for i in range(len(blocks))
        ]
        document = {
            "apiVersion": "hetis/v1",
            "kind": "VllmWorkers",
            "workers": workers,
            "dispatch": {"policy": policy},
            "executor": None if socket is None else str(socket),
        }
        self.now_s, self.epoch, self.generation = 100.0, 1, 0
        self.blocks = CountedBlocks(pool)
        self.side = SchedulerSide(PluginSettings.model_validate(document))
        heads = head_shape(groups=GROUPS, queries=2, head_dim=8, item_bytes=4, block_tokens=BLOCK)
        shape = EngineShape(heads=heads, num_layers=LAYERS, tensor_parallel=ranks // stages, stage_layers=stage_layers)
        self.side.bind(self.blocks, shape)
        attached = surround(self.side)
        self.ranks = Ranks(ranks, copy_steps, list(blocks), told=list(blocks))
        self.side.workers_connected({divmod(rank, ranks // stages): blocks for rank in range(ranks)})
        self.steered = attached or SteeredVllm(self.side, "one")
        self.running: dict[str, FakeRequest] = {}
        self.waiting: dict[str, FakeRequest] = {}
        self.plans: list[StepPlan] = []

    # --- vLLM

    def add(self, name: str, tokens: int = 60) -> str:
        """Add a request, which runs with the next step; return the planner's name of it."""
        self.arrive(name, tokens)
        self.step()
        return str(self.side.allocator.number(name))

    def arrive(self, name: str, tokens: int) -> None:
        """Add a request, which runs as soon as there is room."""
        self.waiting[name] = FakeRequest(name, tokens)
        self.side.arrived(self.waiting[name])

    def step(self, times: int = 1) -> None:
        """Admit the requests for which there is room, extend the others, and hand the plan to the ranks."""
        for _ in range(times):
            for request in list(self.running.values()):
                if not self.blocks.take(request.request_id, request.num_tokens + 1):
                    self.preempt(request.request_id)
                    continue
                request.num_tokens += 1
                request.num_output_tokens += 1
            for request in list(self.waiting.values()):
                self.side.place(request, 0)
                if self.blocks.take(request.request_id, request.num_tokens):
                    self.running[request.request_id] = self.waiting.pop(request.request_id)
            self.steered.step(self.now_s)
            self.plans.append(self.side.plan())
            self.check()
            self.side.take_reports(self.ranks.step(self.plans[-1]))

    def finish(self, name: str) -> None:
        request = self.running.pop(name, None) or self.waiting.pop(name)
        self.side.finished(request)
        self.blocks.release(name)

    def preempt(self, name: str) -> None:
        self.waiting[name] = self.running.pop(name)
        self.blocks.release(name)

    def lose_worker(self, device: int) -> None:
        self.ranks.blocks[device - 1] = 0

    def devices(self, name: str) -> tuple[int, ...]:
        return tuple(self.side.allocator.devices(name))

    def check(self) -> None:
        """Check the invariant that all blocks belong to groups that are here or on their way."""
        self.side.allocator.check_invariants()
        for name, tables in self.blocks.tables.items():
            anchor, moves = self.blocks.anchors[name], self.side.allocator.moves
            coming = {g for m in moves if m.target == LOCAL and m.anchor == anchor for g in m.groups}
            for group, device in enumerate(self.devices(name)):
                held = tables[group]
                assert held == self.blocks.needed[name] if device == LOCAL else held == 0 or group in coming

    # --- the planner

    def stage(self, **heads: int) -> StageModel:
        ranks = self.side.shape.tensor_parallel
        shape = {"head_groups": GROUPS * ranks, "queries_per_group": 2, "block_tokens": BLOCK} | heads
        return StageModel(
            num_layers=LAYERS,
            heads=HeadShape(kv_bytes_per_token=64, exchange_bytes_per_head=96, **shape),
            devices=[
                StageDevice(
                    name=name,
                    gpus=self.side.settings.workers[number - 1].name.split("+")
                    if number
                    else [f"n/{9 - rank}" for rank in reversed(range(ranks))],
                    is_primary=not number,
                    pieces=[AttentionPiece(head_s=1e-7, kv_byte_s=1e-10, call_s=1e-6)],
                    transfer_s=1e-6 * bool(number),
                    total_blocks=400 * ranks,
                )
                for number, name in enumerate(NAMES[: 1 + len(self.side.settings.workers)])
            ],
        )

    def assignment(
        self,
        *,
        goal: AssignmentGoal.ValueType = AssignmentGoal.ASSIGNMENT_GOAL_SERVE,
        conditions: Sequence[DeviceCondition] = (),
        stage: StageModel | None = None,
    ) -> Assignment:
        return Assignment(
            replica=REPLICA,
            plan="plans/one",
            goal=goal,
            shape=ReplicaPlan(rate_rps=1),
            primary_node="clusters/c/nodes/n",
            stages=[stage or self.stage()],
            conditions=conditions,
        )

    def assign(self, assignment: Assignment | None = None) -> int:
        """Return the state."""
        self.generation += 1
        request = ApplyAssignmentRequest(
            epoch=self.epoch, generation=self.generation, assignment=assignment or self.assignment()
        )
        return self.steered.apply_assignment(request, self.now_s).state

    def head_map(self) -> HeadMap:
        (found,) = self.steered.head_maps(REPLICA).head_maps
        return found

    def move(
        self,
        request: str,
        groups: Sequence[int],
        target: str,
        *,
        source: str = NAMES[0],
        index: int = 0,
        together: int | None = None,
    ) -> Move:
        return Move(
            number=index,
            request=request,
            head_groups=groups,
            source=source,
            target=target,
            reason=MoveReason.MOVE_REASON_BALANCE,
            together=index if together is None else together,
        )

    def change(self, *moves: Move, timeout_s: float = 30.0) -> Change:
        return Change(
            change_id=str(uuid.uuid4()),
            replica=REPLICA,
            base_generation=self.generation,
            generation=self.generation + 1,
            moves=moves,
            prepare_timeout=seconds(timeout_s),
        )

    def reserve(self, change: Change, *, epoch: int | None = None) -> ReserveMovesResponse:
        request = ReserveMovesRequest(epoch=epoch or self.epoch, change=change, parts=EVERYTHING)
        return self.steered.reserve_moves(request, self.now_s)

    def copy(self, change: Change) -> None:
        self.steered.copy_moves(CopyMovesRequest(epoch=self.epoch, change_id=change.change_id), self.now_s)

    def request_flip(self, change: Change, *, timeout_s: float = 5.0, epoch: int | None = None) -> None:
        request = FlipMovesRequest(epoch=epoch or self.epoch, change_id=change.change_id, timeout=seconds(timeout_s))
        self.steered.flip_moves(request, self.now_s)

    def flip(self, change: Change, **more: Any) -> FlipMovesResponse:
        """Request the flip, and let the engine reach a step boundary."""
        self.request_flip(change, **more)
        self.step()
        answer = self.steered.flip_answer(change.change_id)
        assert answer is not None
        self.generation = max(self.generation, answer.generation)
        return answer

    def release(self, change: Change) -> None:
        self.steered.release_moves(
            ReleaseMovesRequest(epoch=self.epoch, change_id=change.change_id, generation=change.generation), self.now_s
        )

    def abort(self, change_id: str) -> Any:
        return self.steered.abort_moves(AbortMovesRequest(epoch=self.epoch, change_id=change_id), self.now_s)

    def prepared(self, *moves: Move, **more: Any) -> Change:
        """Return a change that is ready to be flipped."""
        change = self.change(*moves, **more)
        self.reserve(change)
        self.copy(change)
        self.step(self.ranks.copy_steps + 1)
        return change


def seconds(duration_s: float) -> Duration:
    found = Duration()
    found.FromNanoseconds(int(duration_s * 1e9))
    return found
