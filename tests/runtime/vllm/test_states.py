"""Whatever clients, workers, agents and time do: groups have one owner, blocks are conserved, changes end once."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hetis.runtime.moves.refusals import RefusedError
from hetis.v1.change_pb2 import Change, ChangeOutcome, ChangePhase
from hetis.v1.replica_pb2 import DeviceCondition
from hetis.v1.report_pb2 import DeviceStatus
from tests.runtime.vllm.scheduling import GROUPS, NAMES, REPLICA, World

FINAL = (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_ABORTED, ChangePhase.CHANGE_PHASE_RELEASED)
POOL, WORKERS = 90, (60, 40)


class SteeredStates(RuleBasedStateMachine):
    """A small pool, two workers that come and go, and an agent that prepares, permits, aborts and disconnects."""

    @initialize(policy=st.sampled_from(["local", "remote", "remote"]), copy_steps=st.integers(1, 3))
    def begin(self, policy: str, copy_steps: int) -> None:
        self.world = World(pool=POOL, blocks=WORKERS, policy=policy, copy_steps=copy_steps)
        self.names = 0
        self.change: Change | None = None
        self.outcomes: dict[str, int] = {}
        self.world.assign()

    # --- clients and workers

    @rule(tokens=st.integers(1, 200))
    def add(self, tokens: int) -> None:
        if len(self.world.running) + len(self.world.waiting) < 5:
            self.names += 1
            name = f"r{self.names}"
            self.world.arrive(name, tokens)
            self.world.step()

    @rule(times=st.integers(1, 20))
    def step(self, times: int) -> None:
        self.world.step(times)

    @rule(which=st.integers(0, 9), how=st.sampled_from(["finish", "preempt"]))
    @precondition(lambda self: self.world.running)
    def end(self, which: int, how: str) -> None:
        name = list(self.world.running)[which % len(self.world.running)]
        getattr(self.world, how)(name)

    @rule(device=st.integers(1, 2), blocks=st.sampled_from([0, 0, 30, 60]))
    def worker(self, device: int, blocks: int) -> None:
        before = self.world.ranks.blocks[device - 1]
        self.world.ranks.blocks[device - 1] = blocks if not before or not blocks else before
        self.world.step()

    @rule(which=st.integers(0, 9), group=st.integers(0, GROUPS - 1), to=st.integers(0, 2))
    @precondition(lambda self: self.world.running)
    def move_by_itself(self, which: int, group: int, to: int) -> None:
        name = list(self.world.running)[which % len(self.world.running)]
        self.world.side.begin_move(name, [group], to)

    # --- an agent

    @rule(drained=st.lists(st.integers(1, 2), max_size=1), blocks=st.sampled_from([10, 400]))
    def assign(self, drained: list[int], blocks: int) -> None:
        said = [DeviceCondition(device=NAMES[device], status=DeviceStatus.DEVICE_STATUS_DRAINING) for device in drained]
        stage = self.world.stage()
        stage.devices[1].total_blocks = blocks
        self.world.generation = self.held
        self.world.assign(self.world.assignment(conditions=said, stage=stage))

    @rule(
        wanted=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(1, 2)), min_size=1, max_size=3),
        timeout_s=st.sampled_from([1.0, 30.0]),
        steps=st.integers(0, 4),
        then=st.sampled_from(["wait", "flip", "flip late", "abort", "abort", "release"]),
    )
    @precondition(lambda self: self.world.running)
    def reserve(self, wanted: list[tuple[int, int, int]], timeout_s: float, steps: int, then: str) -> None:
        world, moves = self.world, []
        running = [name for name in world.running if name in world.side.allocator.running]
        for number, (which, group, further) in enumerate(wanted if running else ()):
            name = running[which % len(running)]
            owner = world.devices(name)[group]
            known = str(world.side.allocator.number(name))
            moves.append(
                world.move(known, [group], NAMES[(owner + further) % 3], source=NAMES[owner], index=number, together=0)
            )
        world.generation = self.held
        change = world.change(*moves, timeout_s=timeout_s)
        try:
            world.reserve(change)
        except RefusedError:
            return  # for one of the documented reasons, and nothing of it is kept
        world.copy(change)
        self.change = change
        world.step(steps)
        if then != "wait":
            self.decide(then)

    @rule(what=st.sampled_from(["flip", "flip", "flip late", "abort", "release"]))
    @precondition(lambda self: self.change is not None)
    def decide(self, what: str) -> None:
        assert self.change is not None
        try:
            if what.startswith("flip"):
                self.world.request_flip(self.change, timeout_s=0 if what == "flip late" else 5)
                self.world.step()
                answer = self.world.steered.flip_answer(self.change.change_id)
                assert answer is None or answer.outcome in ChangeOutcome.values()
            elif what == "abort":
                self.world.abort(self.change.change_id)
            else:
                self.world.release(self.change)
        except RefusedError:
            pass

    @rule()
    def another_planner_leads(self) -> None:
        self.world.epoch += 1

    @rule(passed_s=st.sampled_from([0.1, 2.0, 20.0]))
    def let_time_pass(self, passed_s: float) -> None:
        self.world.now_s += passed_s
        self.world.steered.step(self.world.now_s)

    # --- what must hold

    @property
    def held(self) -> int:
        """Return the replica's generation in the engine."""
        return max(report.generation for report in self.world.steered.report(self.world.now_s).replicas)

    @invariant()
    def how_a_change_ended_stays_so(self) -> None:
        for status in self.world.steered.report(self.world.now_s).changes:
            before = self.outcomes.get(status.change_id)
            if before == ChangePhase.CHANGE_PHASE_ABORTED:
                assert status.phase == before
            elif before is not None:
                assert status.phase in (ChangePhase.CHANGE_PHASE_FLIPPED, ChangePhase.CHANGE_PHASE_RELEASED)
            if status.phase in FINAL:
                self.outcomes[status.change_id] = status.phase

    @invariant()
    def what_is_reported_is_what_is(self) -> None:
        world, allocator = self.world, self.world.side.allocator
        (head_map,) = world.steered.head_maps(REPLICA).head_maps
        owners = {str(allocator.number(name)): list(world.devices(name)) for name in allocator.running}
        assert {request.id: list(request.owners) for request in head_map.requests} == owners
        for device, total in enumerate(head_map.devices):
            used = sum(
                -(-request.context_tokens // 16) * list(request.owners).count(device) for request in head_map.requests
            )
            assert used <= total.total_blocks

    @invariant()
    def no_block_is_lost(self) -> None:
        blocks = self.world.blocks
        assert blocks.free + len(blocks.tables) + sum(map(sum, blocks.tables.values())) == POOL

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        for name in [*world.running, *world.waiting]:
            world.finish(name)
        world.now_s += 1000.0
        world.step(2)
        assert world.side.is_idle
        assert world.blocks.free == POOL
        assert world.side.allocator.moves == ()
        assert all(status.phase in FINAL for status in world.steered.report(world.now_s).changes)


SteeredStates.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestSteeredStates = SteeredStates.TestCase
