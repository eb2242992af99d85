"""Whatever clients, devices, agents and time do: heads have one owner, pages are conserved, texts are right."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import initialize, invariant, precondition, rule

from hetis.runtime.executor.refusals import RefusedError
from hetis.runtime.moving.hauler import Hauler
from hetis.runtime.steering.engine import RealEngine
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePhase
from hetis.v1.executor_service_pb2 import (
    AbortMovesRequest,
    ApplyAssignmentRequest,
    CopyMovesRequest,
    FlipMovesRequest,
    ReleaseMovesRequest,
    ReserveMovesRequest,
)
from hetis.v1.head_map_pb2 import Move, MoveReason
from hetis.v1.replica_pb2 import DeviceCondition
from hetis.v1.report_pb2 import DeviceStatus
from tests.runtime.engine.test_engine_states import DEVICES, TOKENS, EngineStates
from tests.runtime.moving.test_hauler import HaulerStates
from tests.runtime.steering.world import EVERYTHING, REPLICA, assignment_of, seconds

FINAL = (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_ABORTED, ChangePhase.CHANGE_PHASE_RELEASED)


class SteeredStates(EngineStates):
    """The engine's states under an agent that prepares, permits, gives up, repeats itself, and goes away."""

    @initialize()
    def begin(self) -> None:
        super().begin()
        self.now_s, self.epoch, self.generation, self.names = 10.0, 1, 1, 0
        page_bytes = self.engine.stage.shape.page_bytes
        self.hauler = Hauler(engine=self.engine, bytes_per_step=2 * page_bytes, clock=lambda: self.now_s)
        self.steered = RealEngine(self.hauler, clock=lambda: self.now_s)
        self.change: Change | None = None
        self.outcomes: dict[str, int] = {}
        self.assign([])

    # --- what an agent does

    @rule(draining=st.lists(st.integers(1, DEVICES - 1), max_size=1))
    def assign(self, draining: list[int]) -> None:
        conditions = [
            DeviceCondition(device=f"d{device}", status=DeviceStatus.DEVICE_STATUS_DRAINING) for device in draining
        ]
        self.generation = self.held + 1
        self.steered.apply_assignment(
            ApplyAssignmentRequest(
                epoch=self.epoch,
                generation=self.generation,
                assignment=assignment_of(self.engine, conditions=conditions),
            ),
            self.now_s,
        )

    @rule(
        wanted=st.lists(
            st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(1, DEVICES - 1)), min_size=1, max_size=3
        ),
        timeout_s=st.sampled_from([1.0, 30.0]),
        steps=st.integers(0, 2),
        then=st.sampled_from(["wait", "flip", "flip late", "abort", "release"]),
    )
    def reserve(self, wanted: list[tuple[int, int, int]], timeout_s: float, steps: int, then: str) -> None:
        if len(self.engine.running) < 2:  # else most runs would have nothing to move
            self.add(self.names % 2, TOKENS)
            self.step(2)
        if not self.engine.running:
            return
        self.names += 1
        moves, running = [], list(self.engine.running.values())
        for number, (which, head, further) in enumerate(wanted):
            request = running[which % len(running)]
            owner = request.heads[0][head]
            moves.append(
                Move(
                    number=number,
                    request=str(request.number),
                    incarnation=request.incarnation,
                    head_groups=[head],
                    source=f"d{owner}",
                    target=f"d{(owner + further) % DEVICES}",
                    reason=MoveReason.MOVE_REASON_BALANCE,
                    together=number,
                )
            )
        change = Change(
            change_id=f"c{self.names}",
            replica=REPLICA,
            base_generation=self.held,
            generation=self.held + 1,
            moves=moves,
            prepare_timeout=seconds(timeout_s),
        )
        try:
            self.steered.reserve_moves(
                ReserveMovesRequest(epoch=self.epoch, change=change, parts=EVERYTHING), self.now_s
            )
        except RefusedError:
            return  # for one of the documented reasons, and nothing is held of it
        self.steered.copy_moves(CopyMovesRequest(epoch=self.epoch, change_id=change.change_id), self.now_s)
        self.change = change
        self.step(steps)
        if then != "wait":
            self.decide(then)

    @rule(what=st.sampled_from(["flip", "flip", "flip late", "abort", "release"]))
    @precondition(lambda self: self.change is not None)
    def decide(self, what: str) -> None:
        assert self.change is not None
        name, epoch = self.change.change_id, self.epoch
        try:
            if what.startswith("flip"):
                timeout = seconds(0 if what == "flip late" else 5)
                self.steered.flip_moves(FlipMovesRequest(epoch=epoch, change_id=name, timeout=timeout), self.now_s)
                self.steered.step(self.now_s)
                answer = self.steered.flip_answer(name)
                assert answer is None or answer.outcome in ChangeOutcome.values()
            elif what == "abort":
                self.steered.abort_moves(AbortMovesRequest(epoch=epoch, change_id=name), self.now_s)
            else:
                request = ReleaseMovesRequest(epoch=epoch, change_id=name, generation=self.change.generation)
                self.steered.release_moves(request, self.now_s)
        except RefusedError:
            pass

    @rule()
    def another_planner_leads(self) -> None:
        self.epoch += 1

    @rule(passed_s=st.sampled_from([0.1, 2.0, 20.0]))
    def let_time_pass(self, passed_s: float) -> None:
        self.now_s += passed_s
        self.steered.step(self.now_s)

    @rule(which=st.integers(0, 9), head=st.integers(0, 3), many=st.integers(1, 4), further=st.integers(1, DEVICES - 1))
    @precondition(lambda self: self.engine.running)
    def move(self, which: int, head: int, many: int, further: int) -> None:
        if not self.engine.placement.moves:
            super().move(which, head, many, further)

    # --- what must hold

    @property
    def held(self) -> int:
        """Generation of the replica in the engine; 0: it holds none."""
        return max((report.generation for report in self.steered.report(self.now_s).replicas), default=0)

    @invariant()
    def how_a_change_ended_stays_so(self) -> None:
        for status in self.steered.report(self.now_s).changes:
            before = self.outcomes.get(status.change_id)
            if before == ChangePhase.CHANGE_PHASE_ABORTED:
                assert status.phase == before
            elif before is not None:
                assert status.phase in (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_RELEASED)
            if status.phase in FINAL:
                self.outcomes[status.change_id] = status.phase

    @invariant()
    def what_is_reported_is_what_is(self) -> None:
        (head_map,) = self.steered.head_maps(REPLICA).head_maps
        assert {int(request.id) for request in head_map.requests} == set(self.engine.running)
        for request in head_map.requests:
            assert tuple(request.owners) == self.engine.running[int(request.id)].heads[0]
        open_moves = [move for change in self.hauler.open_changes for move in change.moves]
        assert len(head_map.moves) == len(open_moves)

    @invariant()
    def everything_has_one_owner(self) -> None:
        HaulerStates.everything_has_one_owner(self)  # type: ignore[arg-type]

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.now_s += 1000.0
            self.assign([])  # whoever waits for a device that drains would wait for long
            super().teardown()
            self.steered.step(self.now_s)
            assert not self.hauler.open_changes
            assert self.steered.permission == "none"


SteeredStates.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestSteeredStates = SteeredStates.TestCase
