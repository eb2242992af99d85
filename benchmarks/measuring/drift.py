"""One replica stage in virtual time: requests arrive, grow and finish, devices change, and a policy moves head groups.

A decode step takes ``layers x makespan`` plus the dense part; prefill takes time if it replaces lost KV. Moves run
sequentially in the background at link speed, and the source owns the groups until they end. If the policy wants it, a
`Watch` silences triggers that an earlier look could not answer, as in the service. Requests, their lengths and device
events depend only on the seed and the step, not on the policy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from benchmarks.measuring.baselines import last_admitted
from hetis.solver.dispatch.dispatch_problem import HeadShape, Primary, Requests, Stage
from hetis.solver.dispatch.dispatcher import Dispatcher
from hetis.solver.dispatch.snapshot import DeviceStatus, StateSnapshot
from hetis.solver.dispatch.state import DispatchState
from hetis.solver.redispatch.redispatch_problem import Move, RedispatchProblem
from hetis.solver.redispatch.triggers import TriggerKind, Watch, ideal_dispatch, makespan_s, triggers

LAYERS = 80
DENSE_S = 0.02
LINK_BYTE_S = 1 / 12.5e9  # 100 Gb/s
OUTPUTS = (150, 1200)  # expected tokens of short and of long outputs; the actual ones are exponential
LONG_ANSWERS = 0.2
LENGTHENED = 8  # times the expected length
REFILL_TOKEN_S = 4e-4  # prefill of lost KV: 140 GFLOP per token at 350 TFLOP/s
WATERMARK = 0.01  # share of the blocks that admission leaves free if it overcommits
LOOK_EVERY = 5  # steps
NOTICE = 150  # steps from the notice of a device's departure to its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """The disturbances, and when they happen.

    Attributes:
        name: name in the table.
        long_share: share of the requests whose output is `LENGTHENED` times as long as expected.
        slow_at: step at which the device named ``slow`` begins to take twice as long.
        leaves_at: step at which the device named ``leaves`` starts to drain; it is gone `NOTICE` steps later.
        requests: approximate number of concurrent requests, unless memory holds fewer.
        overcommits: requests are admitted as long as memory holds them at their present size, as in engines; otherwise
            memory is kept for the expected growth of all.
    """

    name: str
    long_share: float = 0.0
    slow: str = ""
    slow_at: int | None = None
    leaves: str = ""
    leaves_at: int | None = None
    requests: int = 110
    overcommits: bool = False


class Policy(Protocol):
    """A policy that decides what to move when a trigger fires or memory runs out."""

    evicts_itself: bool  # evict the request that cannot grow, not the one admitted last on the full device
    heeds: frozenset[TriggerKind]  # triggers that it reacts to
    is_watched: bool  # whether triggers without an answer stay silent until something changes
    solve_s: list[float]  # thread seconds of each call that searched for moves

    def moves(self, problem: RedispatchProblem, dispatcher: Dispatcher, full: int | None) -> Sequence[Move]:
        """Return moves in order. ``full`` is a device that ran out of blocks, or None if a trigger fired."""


@dataclass(slots=True)
class Still:
    """A policy that moves nothing and only evicts."""

    evicts_itself: bool
    heeds: frozenset[TriggerKind] = frozenset()
    is_watched: bool = False
    solve_s: list[float] = field(default_factory=list)

    def moves(self, problem: RedispatchProblem, dispatcher: Dispatcher, full: int | None) -> Sequence[Move]:
        return ()


@dataclass(slots=True)
class Tally:
    """The results, step by step."""

    makespans_s: list[float] = field(default_factory=list)
    ideals_s: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    moved_bytes: float = 0.0
    evictions: int = 0
    refilled_tokens: int = 0
    refilled_bytes: float = 0.0
    looks: int = 0


@dataclass(slots=True)
class Coming:
    """A request to admit: new, or evicted after part of its output."""

    id: str
    context: int
    remaining: int
    output: int  # actual number of tokens from now on


def stage() -> Stage:
    """Return two A100 as primary, two RTX 3090 and four P100 as attention workers, with Llama-2-70B's heads."""
    shape = HeadShape(head_groups=8, queries_per_group=8, kv_bytes_per_token=512.0, exchange_bytes_per_head=576.0)
    bandwidth = np.array([1.5e12, 0.7e12, 0.7e12, 0.45e12, 0.45e12, 0.45e12, 0.45e12])
    workers = np.arange(len(bandwidth)) > 0
    return Stage(
        heads=shape,
        devices=("2xA100", "3090-0", "3090-1", "P100-0", "P100-1", "P100-2", "P100-3"),
        head_s=np.array([1.2e-9, 3e-9, 3e-9, 9e-9, 9e-9, 9e-9, 9e-9])[:, None],
        kv_byte_s=1 / bandwidth[:, None],
        call_s=np.where(workers, 1e-5, 5e-6)[:, None],
        transfer_byte_s=np.where(workers, LINK_BYTE_S, 0.0),
        transfer_s=np.where(workers, 1e-5, 0.0),
        primary=Primary(device=0, tp=2, nic_byte_s=LINK_BYTE_S, nic_s=1e-5),
    )


TOTAL_BLOCKS = (60_000, 30_000, 30_000, 15_000, 15_000, 15_000, 15_000)


class Run:
    """One policy through one scenario."""

    def __init__(self, scenario: Scenario, policy: Policy, *, theta: float, seed: int) -> None:
        self.scenario, self.policy, self.theta = scenario, policy, theta
        self.state = DispatchState(stage(), TOTAL_BLOCKS)
        self.dispatcher = Dispatcher(self.state.stage)
        self.tally = Tally()
        self._watch = Watch()
        self._random = np.random.default_rng(seed)
        self._queue: deque[Coming] = deque()
        self._left: dict[str, int] = {}  # output tokens still to come
        self._expected: dict[str, int] = {}
        self._plan: deque[list[Move]] = deque()  # bundles that are committed together
        self._under_way: list[int] = []
        self._bytes_left = 0.0
        self._named = 0

    def run(self, steps: int) -> Tally:
        for _ in range(self.scenario.requests):
            self._arrive()
        mean = OUTPUTS[0] + LONG_ANSWERS * (OUTPUTS[1] - OUTPUTS[0])
        rate = self.scenario.requests / (mean * (1 + (LENGTHENED - 1) * self.scenario.long_share))
        for step in range(steps):
            self._change_devices(step)
            for _ in range(self._random.poisson(rate)):
                self._arrive()
            self._admit()
            if step % LOOK_EVERY == 0:
                for name in self.state.ids:
                    self.state.expect(name, self._expected[name])  # exponential outputs are memoryless
                if not self._plan and not self._under_way:
                    self._look()
            self._decode()
        return self.tally

    # --- the world

    def _arrive(self) -> None:
        random = self._random
        context = int(min(8000, max(16, random.lognormal(6.8, 0.8))))
        expected = OUTPUTS[int(random.random() < LONG_ANSWERS)]
        lengthened = LENGTHENED if random.random() < self.scenario.long_share else 1
        output = max(1, int(random.exponential(expected) * lengthened))
        name = f"r{self._named}"
        self._expected[name] = expected
        self._queue.append(Coming(name, context, expected, output))
        self._named += 1

    def _change_devices(self, step: int) -> None:
        names, scenario, stage = self.state.stage.devices, self.scenario, self.state.stage
        if step == scenario.slow_at:
            factor = np.where(np.array(names) == scenario.slow, 2.0, 1.0)[:, None]
            slower = replace(
                stage, head_s=stage.head_s * factor, kv_byte_s=stage.kv_byte_s * factor, call_s=stage.call_s * factor
            )
            self.state.change_costs(slower)
            self.dispatcher = Dispatcher(slower)
        if scenario.leaves_at is not None and step == scenario.leaves_at:
            self.state.drain_device(names.index(scenario.leaves))
        if scenario.leaves_at is not None and step == scenario.leaves_at + NOTICE:
            for lost in self.state.lose_device(names.index(scenario.leaves)):
                self._wait_again(lost.id, lost.context_tokens, lost.remaining_tokens)

    def _admit(self) -> None:
        if not self._queue:
            return
        coming = list(self._queue)
        requests = Requests(
            ids=tuple(c.id for c in coming),
            context_tokens=np.array([c.context for c in coming]),
            growth_tokens=np.array([c.remaining for c in coming]),
        )
        load = self.state.load()
        if self.scenario.overcommits:
            takes = [device.status is DeviceStatus.OK for device in self.state.devices]
            now = np.where(takes, self.state.free_blocks() - WATERMARK * np.array(TOTAL_BLOCKS), 0).astype(np.int64)
            load = replace(load, free_blocks=now)
            requests = replace(requests, growth_tokens=np.zeros(len(coming), np.int64))
        plan = self.dispatcher.dispatch(load, requests)
        admitted = set(self.state.admit(requests, plan))
        for c in coming:
            if c.id in admitted:
                self.state.expect(c.id, c.remaining)
        self._left.update({c.id: c.output for c in coming if c.id in admitted})
        self._queue = deque(c for c in coming if c.id not in admitted)

    def _decode(self) -> None:
        """Make one step: requests with room grow by a token, finished ones leave, copies continue."""
        state = self.state
        names = list(state.ids)
        stuck = state.grow(names)
        snapshot = state.snapshot()
        seconds = LAYERS * makespan_s(snapshot) + DENSE_S
        self.tally.makespans_s.append(makespan_s(snapshot))
        self.tally.ideals_s.append(ideal_dispatch(snapshot, self.dispatcher).bound_s)
        self.tally.tokens += len(names) - len(stuck)
        self.tally.seconds += seconds
        for name in set(names) - set(stuck):
            self._left[name] -= 1
            if self._left[name] <= 0:
                state.finish(name)
                del self._left[name]
        self._copy(seconds)
        for name in stuck:
            if name in state:
                self._make_room(name)

    def _copy(self, seconds: float) -> None:
        budget = seconds / LINK_BYTE_S
        while budget > 0 and (self._under_way or self._plan):
            if not self._under_way and not self._prepare(self._plan.popleft()):
                continue
            copied = min(budget, self._bytes_left)
            budget -= copied
            self._bytes_left -= copied
            if self._bytes_left <= 0:
                alive = {move.number for move in self.state.moves}
                if alive >= set(self._under_way):  # its request may have finished in the meantime
                    self.state.commit_moves(*self._under_way)
                self._under_way = []

    def _prepare(self, bundle: list[Move]) -> bool:
        state, numbers = self.state, list[int]()
        for move in bundle:
            holds = move.request in state and state.groups(move.request)[move.source] >= move.groups
            takes = state.devices[move.target].status is DeviceStatus.OK
            prepared = None
            if holds and takes:
                prepared = state.prepare_move(move.request, groups=move.groups, source=move.source, target=move.target)
            if prepared is None:
                for number in numbers:
                    state.abort_move(number)
                return False
            numbers.append(prepared.number)
        self._under_way = numbers
        self._bytes_left = sum(move.num_bytes for move in bundle)
        self.tally.moved_bytes += self._bytes_left
        return True

    # --- the policy

    def _look(self) -> None:
        snapshot = self.state.snapshot()
        fired = triggers(snapshot, self.dispatcher, theta=self.theta)
        fired = tuple(trigger for trigger in fired if trigger.kind in self.policy.heeds)
        if self._watch.due(snapshot, fired) if self.policy.is_watched else fired:
            self.tally.looks += 1
            found = self.policy.moves(self._problem(snapshot), self.dispatcher, None)
            self._watch.looked(snapshot, fired, moved=bool(found))
            self._follow(found)
            self.state.mark_seen()

    def _make_room(self, stuck: str) -> None:
        """Let ``stuck`` grow: by pending moves, else by the policy's moves, else by an eviction."""
        state = self.state
        groups, free = state.groups(stuck), state.free_blocks()
        full = int(np.argmax(np.where(groups > 0, groups - free, -np.inf)))
        if self._under_way or self._plan:
            if any(move.source == full for bundle in self._plan for move in bundle) or any(
                move.source == full for move in state.moves
            ):
                return
        elif found := self.policy.moves(self._problem(state.snapshot()), self.dispatcher, full):
            self._follow(found)
            if any(move.source == full for move in found):
                return
        victim = stuck if self.policy.evicts_itself else last_admitted(state.snapshot(), full)
        assert victim is not None
        self.tally.evictions += 1
        self._wait_again(victim, state.context_tokens(victim), state.remaining_tokens(victim))
        state.finish(victim)

    def _problem(self, snapshot: StateSnapshot) -> RedispatchProblem:
        links = np.full(snapshot.stage.num_devices, LINK_BYTE_S)
        return RedispatchProblem(snapshot=snapshot, num_layers=LAYERS, link_byte_s=links)

    def _follow(self, moves: Sequence[Move]) -> None:
        bundles: dict[int, list[Move]] = {}
        for move in moves:
            bundles.setdefault(move.together, []).append(move)
        self._plan.extend(bundles.values())

    def _wait_again(self, name: str, context: int, remaining: int) -> None:
        self.tally.refilled_tokens += context
        self.tally.seconds += context * REFILL_TOKEN_S
        shape = self.state.stage.heads
        self.tally.refilled_bytes += context * shape.head_groups * shape.kv_bytes_per_token * LAYERS
        self._queue.appendleft(Coming(name, context, remaining, self._left.pop(name)))
