"""A real engine with a tiny model under the contract: a planner of a few calls, and a clock that the test turns."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import engine_from_folder, local_devices
from hetis.runtime.engine.request import FinishReason, SamplingParams
from hetis.runtime.moving.hauler import Hauler
from hetis.runtime.steering.engine import RealEngine
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
from tests.runtime.checkpoints import random_model, random_prompts
from tests.runtime.engine.pipelines import Part, pipeline_of

REPLICA = "clusters/c/replicas/r"
NAMES = ("local0", "local1", "local2")  # as `local_devices` calls them
EVERYTHING = (ChangePart.CHANGE_PART_AUTHORITY, ChangePart.CHANGE_PART_SOURCE, ChangePart.CHANGE_PART_TARGET)
SERVE = AssignmentGoal.ASSIGNMENT_GOAL_SERVE
TOKENS = 24


def seconds(value: float) -> Duration:
    found = Duration()
    found.FromNanoseconds(int(value * 1e9))
    return found


def stage_of(engine: Engine, **heads: int) -> StageModel:
    """The engine's stage as a plan would have it; ``heads`` are other figures of its heads."""
    here = engine.placement.costs.heads
    shape = {
        "head_groups": here.head_groups,
        "queries_per_group": here.queries_per_group,
        "block_tokens": here.block_tokens,
    } | heads
    return StageModel(
        num_layers=engine.stage.shape.layers,
        heads=HeadShape(kv_bytes_per_token=64, exchange_bytes_per_head=64, **shape),  # type: ignore[arg-type]
        devices=[
            StageDevice(
                name=gpus[0].name,
                gpus=[gpu.name for gpu in gpus],
                is_primary=number == 0,
                pieces=[AttentionPiece(head_s=1e-7, kv_byte_s=1e-10, call_s=1e-6)],
                transfer_s=1e-6 * bool(number),
                link_byte_s=1e-10 * bool(number),
                total_blocks=sum(gpu.num_pages for gpu in gpus),
            )
            for number, gpus in enumerate(places_of(engine))
        ],
    )


def places_of(engine: Engine) -> list[list[AttentionDevice]]:
    """The devices of the engine's stage as a plan has them: the ranks of the primary are one."""
    group = engine.placement.group
    return [[engine.stage.devices[device] for device in group.devices(i)] for i in range(group.num_places)]


def assignment_of(
    engine: Engine, *, goal: AssignmentGoal.ValueType = SERVE, conditions: Sequence[DeviceCondition] = ()
) -> Assignment:
    return Assignment(
        replica=REPLICA,
        plan="plans/one",
        goal=goal,
        shape=ReplicaPlan(rate_rps=1),
        primary_node="clusters/c/nodes/n",
        stages=[stage_of(engine)],
        conditions=conditions,
    )


class World:
    """One engine, steered; requests are greedy, and what they answer is compared with transformers.

    Attributes:
        names: of its devices, as the planner calls them.
    """

    def __init__(
        self,
        *,
        pages: tuple[int, ...] = (200, 200, 200),
        bytes_per_step: int = 1 << 20,
        ranks: int = 1,
        **options: Any,
    ) -> None:
        """With several ``ranks`` there are two devices more, with as many pages as the first has."""
        self.now_s, self.epoch, self.generation = 100.0, 1, 0
        engine_options = EngineOptions(**options) if options else None
        if ranks > 1:
            self.engine = pipeline_of(random_model().folder, Part(until=3, ranks=ranks, workers=2, pages=pages[0]))
        else:
            self.engine = engine_from_folder(random_model().folder, local_devices(pages), options=engine_options)
        self.names = [devices[0].name for devices in places_of(self.engine)]
        self.hauler = Hauler(engine=self.engine, bytes_per_step=bytes_per_step, clock=lambda: self.now_s)
        self.steered = RealEngine(self.hauler, clock=lambda: self.now_s, engine_id="one")
        self.prompts: dict[int, list[int]] = {}
        self.answers: dict[int, list[int]] = {}
        self.ended: dict[int, FinishReason] = {}

    # --- requests

    def add(self, prompt: list[int] | None = None, *, tokens: int = TOKENS) -> int:
        prompt = random_prompts(5, 1, shortest=60, longest=60)[0] if prompt is None else prompt
        number = self.engine.add(prompt, SamplingParams(max_tokens=tokens))
        self.prompts[number], self.answers[number] = prompt, []
        return number

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for news in self.engine.step():
                if news.token is not None:
                    self.answers[news.request].append(news.token)
                if news.finish_reason is not None:
                    self.ended[news.request] = news.finish_reason

    def finish(self) -> None:
        """Everything is answered, as transformers does, and nothing is left behind."""
        while self.engine.has_work:
            self.step()
        self.steered.step(self.now_s)
        for number, answer in self.answers.items():
            assert answer == random_model().generate(self.prompts[number], TOKENS)[: len(answer)]
        assert self.engine.placement.moves == ()
        assert len(self.engine.placement) == 0

    def heads(self, number: int) -> tuple[int, ...]:
        return self.engine.running[number].heads[0]

    # --- the planner

    def assign(self, assignment: Assignment | None = None) -> int:
        """Returns the state."""
        self.generation += 1
        return self.steered.apply_assignment(
            ApplyAssignmentRequest(
                epoch=self.epoch, generation=self.generation, assignment=assignment or assignment_of(self.engine)
            ),
            self.now_s,
        ).state

    def head_map(self) -> HeadMap:
        (found,) = self.steered.head_maps(REPLICA).head_maps
        return found

    def move(
        self, number: int, head: int, target: str, *also: int, index: int = 0, together: int | None = None
    ) -> Move:
        """Of a head, and ``also`` of others."""
        request = self.engine.running[number]
        return Move(
            number=index,
            request=str(number),
            incarnation=request.incarnation,
            head_groups=[head, *also],
            source=self.names[self.engine.placement.group.place(request.heads[0][head])],
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

    def ask_flip(self, change: Change, *, timeout_s: float = 5.0, epoch: int | None = None) -> None:
        request = FlipMovesRequest(epoch=epoch or self.epoch, change_id=change.change_id, timeout=seconds(timeout_s))
        self.steered.flip_moves(request, self.now_s)

    def flip(self, change: Change, **more: Any) -> FlipMovesResponse:
        """Asks, and lets the engine come to a boundary."""
        self.ask_flip(change, **more)
        self.steered.step(self.now_s)
        answer = self.steered.flip_answer(change.change_id)
        assert answer is not None
        if answer.generation > self.generation:
            self.generation = answer.generation
        return answer

    def release(self, change: Change) -> None:
        self.steered.release_moves(
            ReleaseMovesRequest(epoch=self.epoch, change_id=change.change_id, generation=change.generation), self.now_s
        )

    def abort(self, change_id: str) -> Any:
        return self.steered.abort_moves(AbortMovesRequest(epoch=self.epoch, change_id=change_id), self.now_s)

    def prepared(self, *moves: Move, **more: Any) -> Change:
        """A change that is ready to be flipped."""
        change = self.change(*moves, **more)
        self.reserve(change)
        self.copy(change)
        self.step(2)
        return change
