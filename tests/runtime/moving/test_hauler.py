"""Changes are copied in the background and flip at one step boundary, or leave everything as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import engine_from_folder, local_devices
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.kv.shape import SequenceKey
from hetis.runtime.moving.hauler import Change, Hauler, Phase, WantedMove
from hetis.runtime.moving.redispatch import Redispatch
from hetis.runtime.worker.remote import RemoteDevice
from tests.runtime.checkpoints import random_model, random_prompts
from tests.runtime.engine.test_engine_states import DEVICES, EngineStates
from tests.runtime.worker.inproc import Fault, InprocWorker, with_workers

TOKENS = 24
PAGE_BYTES = 2 * 3 * 16 * 8 * 4  # of `random_model`: layers, page tokens, head size, float32


class World:
    """An engine whose clock the test turns, with one request under way on device 0."""

    def __init__(self, *, pages: tuple[int, ...] = (200, 200, 200), prompt: int = 60, **hauler: Any) -> None:
        self.now_s = 0.0
        self.engine = engine_from_folder(random_model().folder, local_devices(pages))
        self.hauler = Hauler(engine=self.engine, clock=lambda: self.now_s, **hauler)
        [self.prompt] = random_prompts(5, 1, shortest=prompt, longest=prompt)
        self.number = self.engine.add(self.prompt, SamplingParams(max_tokens=TOKENS))
        self.tokens: list[int] = []
        self.step(2)
        here = [h for h, owner in enumerate(self.request.heads[0]) if owner]
        if here:
            assert all(self.engine.move(self.number, [h], 0) for h in here)

    @property
    def request(self) -> Any:
        return self.engine.running[self.number]

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.tokens += [news.token for news in self.engine.step() if news.token is not None]

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()
        assert self.tokens == random_model().generate(self.prompt, TOKENS)
        assert_empty(self.engine)

    def reserve(self, *heads: int, target: int = 1, **more: Any) -> Change:
        return self.hauler.reserve([WantedMove(self.number, tuple(heads), target)], **more)


def assert_empty(engine: Engine, *, but: int | None = None) -> None:
    engine.placement.check_invariants()
    assert len(engine.placement) == 0
    assert engine.placement.moves == ()
    for number, device in enumerate(engine.stage.devices):
        if isinstance(device, LocalDevice):
            device.pool.check_invariants()
            assert device.pool.free_pages == device.num_pages
        elif isinstance(device, RemoteDevice) and number != but:
            assert device.ping() == (device.num_pages, 0)


def test_a_change_is_copied_in_the_background_and_flips_at_one_boundary() -> None:
    world = World(bytes_per_step=PAGE_BYTES, prompt=120)
    change = world.reserve(0, 2, permitted_s=100)
    seen = []
    while change.is_open:
        seen.append(change.copied_bytes)
        assert world.request.heads[0] == (0, 0, 0, 0)  # until the flip, the source owns and serves
        world.step()
    assert change.phase is Phase.FLIPPED
    assert world.request.heads[0] == (1, 0, 1, 0)
    assert len(seen) > 3, "chunk by chunk"
    assert max(np.diff(seen)) <= 2 * PAGE_BYTES
    # Everything was sent once: two heads, every position but the few of the tail, which the flip sends.
    assert change.copied_bytes <= 2 * PAGE_BYTES // 16 * (world.request.computed)
    world.finish()


def test_a_change_that_is_ready_waits_for_permission() -> None:
    world = World()
    change = world.reserve(1)
    world.step(4)
    assert (change.phase, world.request.heads[0]) == (Phase.READY, (0, 0, 0, 0))
    world.hauler.permit(change, 5)
    world.step()
    assert (change.phase, world.request.heads[0]) == (Phase.FLIPPED, (0, 1, 0, 0))
    world.finish()


@pytest.mark.parametrize("bytes_per_step", [PAGE_BYTES // 2, 1 << 20])
def test_time_that_passed_aborts_and_nothing_has_changed(bytes_per_step: int) -> None:
    world = World(bytes_per_step=bytes_per_step)
    change = world.reserve(0, 1, 2, 3, prepare_s=10)
    world.step(2)
    world.now_s = 10.0
    world.step()
    assert (change.phase, change.why, world.request.heads[0]) == (Phase.ABORTED, "its time passed", (0, 0, 0, 0))
    assert world.engine.placement.moves == ()
    world.finish()


def test_permission_expires() -> None:
    world = World()
    change = world.reserve(0)
    world.step(2)
    world.hauler.permit(change, 3)
    world.now_s = 3.0
    world.step()
    assert change.phase is Phase.ABORTED
    world.finish()


def test_a_copy_that_differs_is_not_flipped() -> None:
    world = World()
    change = world.reserve(0, 3)
    world.step(3)
    target = world.engine.stage.devices[1]
    assert isinstance(target, LocalDevice)
    k, v = target.export(world.number, 0, [3], 7, 8)
    target.adopt(world.number, 0, [3], 7, k + 1e-3, v)
    world.hauler.permit(change, 9)
    world.step()
    assert change.phase is Phase.ABORTED
    assert "differs from its source" in change.why
    assert world.request.heads[0] == (0, 0, 0, 0)
    world.finish()


@pytest.mark.parametrize("how", ["preempt", "cancel", "lose_target", "abort"])
def test_whatever_else_happens_leaves_no_copy_behind(how: str) -> None:
    world = World(bytes_per_step=PAGE_BYTES)
    change = world.reserve(0, 1)
    world.step(2)
    acts: dict[str, Callable[[], object]] = {
        "preempt": lambda: world.engine.preempt(world.number),
        "cancel": lambda: world.engine.cancel(world.number),
        "lose_target": lambda: world.engine.lose_device(1),
        "abort": lambda: world.hauler.abort(change, "the planner said so"),
    }
    acts[how]()
    world.engine.step() if how == "cancel" else world.step()
    assert change.phase is Phase.ABORTED
    target = world.engine.stage.devices[1]
    assert isinstance(target, LocalDevice)
    if how == "cancel":
        assert_empty(world.engine)
    else:
        if how == "abort":
            assert len(target.pool) == 0
        world.finish() if how != "lose_target" else None


def test_moves_of_one_bundle_go_together_or_not_at_all() -> None:
    world = World(pages=(200, 200, 3))
    change = world.hauler.reserve(
        [
            WantedMove(world.number, (0,), 1, 7),
            WantedMove(world.number, (1,), 2, 7),
            WantedMove(world.number, (2,), 1, 8),
        ],
        permitted_s=100,
    )
    assert [one.heads for one, _ in change.left_out] == [(1,), (0,)]
    assert "too few free pages" in change.left_out[0][1]
    assert [move.heads for move in world.engine.placement.moves] == [(2,)]
    world.step(4)
    assert world.request.heads[0] == (0, 0, 1, 0)
    world.finish()


def test_a_change_gives_way_before_a_request_is_preempted() -> None:
    """Pages that are only reserved are given back when a request needs one to grow."""
    world = World(pages=(200, 18), prompt=60)
    assert world.engine.move(world.number, [0, 1, 2], 1)  # 5 pages each at most
    other = world.reserve(3)
    assert other.is_open
    world.step(8)
    assert other.phase is Phase.ABORTED
    assert world.engine.num_preempted == 0
    world.finish()


def test_a_request_whose_prompt_has_not_begun_may_move() -> None:
    model, prompts = random_model(), random_prompts(70, 2, shortest=40, longest=40)
    engine = engine_from_folder(model.folder, local_devices([100, 100]), options=EngineOptions(chunk_tokens=16))
    hauler = Hauler(engine=engine)
    numbers = [engine.add(prompt, SamplingParams(max_tokens=TOKENS)) for prompt in prompts]
    engine.step()
    last = engine.running[numbers[1]]
    assert last.computed == 0
    head, source = 0, last.heads[0][0]
    hauler.reserve([WantedMove(last.number, (head,), 1 - source)], permitted_s=9)
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_work:
        for news in engine.step():
            answers[news.request] += [] if news.token is None else [news.token]
    assert hauler.counts.flipped == 1
    assert [answers[number] for number in numbers] == [model.generate(prompt, TOKENS) for prompt in prompts]


def test_heads_leave_a_device_without_pages_before_anyone_is_preempted() -> None:
    world = World(pages=(200, 17), prompt=60)  # three heads take six pages each in the end
    assert world.engine.move(world.number, [0, 1, 2], 1)
    world.finish()
    assert world.engine.num_preempted == 0


def run_changing(engine: Engine, hauler: Hauler, prompts: list[list[int]], tokens: int, seed: int) -> list[list[int]]:
    """Answers, with changes of one to three moves under way all the time."""
    chooser = random.Random(seed)
    numbers = [engine.add(prompt, SamplingParams(max_tokens=tokens)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_work:
        for news in engine.step():
            if news.token is not None:
                answers[news.request].append(news.token)
        while engine.running and len(hauler.open_changes) < 2:
            wanted = []
            for _ in range(chooser.randint(1, 3)):
                request = chooser.choice(list(engine.running.values()))
                wanted.append(
                    WantedMove(request.number, (chooser.randrange(4),), chooser.randrange(len(engine.stage.devices)))
                )
            if not hauler.reserve(wanted, permitted_s=100).is_open:
                break
    return [answers[number] for number in numbers]


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_heads_that_change_devices_all_the_time_give_what_transformers_gives(workers: int) -> None:
    model, prompts = random_model(), random_prompts(40 + workers, 4)
    engine = engine_from_folder(model.folder, with_workers([InprocWorker(f"w{i}", 80) for i in range(workers)]))
    hauler = Hauler(engine=engine, bytes_per_step=3 * PAGE_BYTES)
    assert run_changing(engine, hauler, prompts, TOKENS, seed=workers) == [model.generate(p, TOKENS) for p in prompts]
    assert hauler.counts.flipped > 5
    assert_empty(engine)


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_at_a_quarter_of_a_changes_messages_costs_no_token(fault: Fault) -> None:
    check_faults(fault, 1 + list(Fault).index(fault) % 4, every=4)  # together they come to every one


@pytest.mark.soak
@pytest.mark.parametrize("fault", Fault)
def test_a_fault_at_any_message_of_a_change_costs_no_token(fault: Fault) -> None:
    check_faults(fault, 1, every=1)


def check_faults(fault: Fault, index: int, *, every: int) -> None:
    model, prompts = random_model(), random_prompts(50, 2, shortest=14, longest=18)
    expected = [model.generate(prompt, 6) for prompt in prompts]
    is_over = False
    while not is_over:
        workers = [InprocWorker(f"w{i}", 40) for i in range(2)]
        workers[0].fault, workers[0].fault_at = fault, index
        engine = engine_from_folder(
            model.folder, with_workers(workers, own_pages=60), options=EngineOptions(chunk_tokens=12)
        )
        hauler = Hauler(engine=engine, bytes_per_step=PAGE_BYTES)
        assert run_changing(engine, hauler, prompts, 6, seed=3) == expected, f"{fault} at message {index}"
        assert_empty(engine, but=1)
        is_over, index = not workers[0].has_failed, index + every


def test_the_solver_moves_heads_when_the_stage_has_drifted() -> None:
    """All on the primary, whose attention then turns out slow: heads go to the other device, and the text stays.

    When costs have changed there is a look soon, long before the next is due.
    """
    world = World(pages=(400, 400), prompt=200)
    redispatch = Redispatch(
        hauler=world.hauler, link_byte_s=np.array([1e-12, 1e-12]), every_steps=10_000, least_steps=4
    )
    placement = world.engine.placement
    world.step(5)
    assert redispatch.num_looks == 0
    slow = placement.costs.kv_byte_s * np.array([[50.0], [1.0]])
    placement.change_costs(type(placement.costs)(**{**fields_of(placement.costs), "kv_byte_s": slow}))
    world.step(8)
    assert redispatch.num_looks == 1
    assert redispatch.num_moves > 0
    assert world.request.heads[0].count(1) >= 2
    world.finish()


def test_a_full_device_is_relieved_by_the_solvers_moves_before_anyone_is_preempted() -> None:
    world = World(pages=(200, 17), prompt=60)  # three heads take six pages each in the end
    redispatch = Redispatch(hauler=world.hauler, link_byte_s=np.array([1e-12, 1e-12]), every_steps=10_000)
    assert world.engine.move(world.number, [0, 1, 2], 1)
    world.finish()
    assert redispatch.num_relieved == 1
    assert redispatch.num_moves >= 1
    assert world.engine.num_preempted == 0


def fields_of(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in type(value).__dataclass_fields__}


class HaulerStates(EngineStates):
    """The engine's states with changes under way: also while devices are lost, requests end and pages run out."""

    @initialize()
    def begin(self) -> None:
        super().begin()
        self.now_s = 0.0
        page_bytes = self.engine.stage.shape.page_bytes
        self.hauler = Hauler(engine=self.engine, bytes_per_step=2 * page_bytes, clock=lambda: self.now_s)
        self.changes: list[Change] = []

    @rule(
        wanted=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, DEVICES - 1)), max_size=3),
        is_permitted=st.booleans(),
    )
    @precondition(lambda self: self.engine.running)
    def reserve(self, wanted: list[tuple[int, int, int]], is_permitted: bool) -> None:
        running = list(self.engine.running)
        moves = [WantedMove(running[which % len(running)], (head,), target) for which, head, target in wanted]
        self.changes.append(self.hauler.reserve(moves, prepare_s=20, permitted_s=10 if is_permitted else None))

    @rule(which=st.integers(0, 9), what=st.sampled_from(["permit", "abort"]))
    @precondition(lambda self: self.hauler.open_changes)
    def decide(self, which: int, what: str) -> None:
        change = self.hauler.open_changes[which % len(self.hauler.open_changes)]
        if what == "permit":
            self.hauler.permit(change, 10)
        else:
            self.hauler.abort(change, "asked to")

    @rule(seconds=st.integers(1, 9))
    def let_time_pass(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(which=st.integers(0, 9), head=st.integers(0, 3), many=st.integers(1, 4), further=st.integers(1, DEVICES - 1))
    @precondition(lambda self: self.engine.running)
    def move(self, which: int, head: int, many: int, further: int) -> None:
        self.step(1)
        if self.engine.running and not self.engine.placement.moves:
            super().move(which, head, many, further)

    @invariant()
    def everything_has_one_owner(self) -> None:
        self.engine.placement.check_invariants()
        copies = {(m.request, h, m.target) for m in self.engine.placement.moves for h in m.heads}
        for request in self.engine.running.values():
            assert request.heads[0] == self.engine.placement.heads(request.number)
            for head, owner in enumerate(request.heads[0]):
                key = SequenceKey(request.number, request.incarnation, head)
                for number, device in enumerate(self.devices):
                    if device.calls_left == 0:
                        continue
                    if number == owner:
                        assert not request.computed or device.pool.tokens(key) >= request.computed
                    elif (request.number, head, number) not in copies:
                        assert key not in device.pool, "a copy that belongs to no move"


HaulerStates.TestCase.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
TestHaulerStates = HaulerStates.TestCase
