"""The plugin in vLLM's scheduler: places requests, moves their head groups, and informs the ranks with every step.

Nothing here imports vLLM: the connector passes on vLLM's requests, and the block manager comes from there, too. An
agent's requests come through `hetis.runtime.vllm.steering`, between two steps; see `Boundary`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hetis.runtime.vllm.counts import RequestStats, VllmRequest
from hetis.runtime.vllm.settings import PluginSettings
from hetis.runtime.vllm.steps import LOCAL, Exchanged, GroupMove, MoveStep, RankReport, Rehomed, StepPlan

if TYPE_CHECKING:
    from hetis.runtime.moves.engine import SteeredEngine
    from hetis.runtime.vllm.allocator import HeadAllocator
    from hetis.runtime.vllm.blocks import HeadGroupManager
    from hetis.runtime.vllm.calibration import Calibration
    from hetis.runtime.vllm.costs import EngineCosts
    from hetis.solver.dispatch.dispatch_problem import HeadShape

MOST_WORKS, MOST_S = 8, 0.002  # limits on other threads' work between two steps; at least one piece of work is done

T = TypeVar("T")
_log = logging.getLogger(__name__)
MovedBy = Literal["planner", "engine", "relief"]


class Boundary:
    """Hands the scheduler's state from thread to thread."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        # Held by the thread at work on the state. vLLM's thread holds it between two steps, others for one short piece
        # of work, and only while nothing runs.
        self.lock = threading.Lock()
        self.num_steps = 0  # boundaries that vLLM's thread has reached
        self._clock = clock
        self._is_busy = False
        self._works: deque[Callable[[], None]] = deque()
        self._waiting: set[Callable[[], None]] = set()

    # --- vLLM's thread

    def enter(self) -> None:
        """Reserve the state for vLLM's thread until `leave`, because something is about to run."""
        if not self._is_busy:
            with self.lock:
                self._is_busy = True

    def leave(self, *, is_idle: bool) -> None:
        """Do other threads' work at a boundary, with `lock` held; all of it if nothing will run (``is_idle``)."""
        self.num_steps += 1
        begun_s, done = self._clock(), 0
        while self._works and (is_idle or not done or (done < MOST_WORKS and self._clock() - begun_s < MOST_S)):
            self._works.popleft()()
            done += 1
        self._is_busy = not is_idle
        waiting, self._waiting = self._waiting, set()
        for wake in waiting:
            wake()

    # --- other threads

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run ``work`` and return a future with its result or exception."""
        future: Future[T] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        with self.lock:
            if self._is_busy:
                self._works.append(do)
            else:
                do()
        return future

    def on_step(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` once, on vLLM's thread, at the next boundary."""
        with self.lock:
            self._waiting.add(wake)

    def off_step(self, wake: Callable[[], None]) -> None:
        """Undo `on_step`. The call may have happened already."""
        with self.lock:
            self._waiting.discard(wake)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """The properties of the engine that matter for placement."""

    heads: HeadShape  # heads of a layer on one tensor parallel rank
    num_layers: int  # layers of the model, over all pipeline stages
    tensor_parallel: int = 1  # ranks of a stage, each with ``heads.head_groups`` groups of its own
    stage_layers: tuple[int, ...] = ()  # layers of each pipeline stage; empty: there is one
    most_running: int = 2**20  # maximum number of requests that vLLM runs concurrently

    def share(self, rank: int) -> float:
        """Return the share of the model's layers that a rank computes, by its stage.

        Times per layer count by it: the slowest stage, not the slowest layer, sets the pace of a pipeline.
        """
        return self.stage_layers[rank // self.tensor_parallel] / self.num_layers if self.stage_layers else 1.0


class SchedulerSide:
    """The connector's part in the scheduler's process."""

    def __init__(self, settings: PluginSettings) -> None:
        self.settings = settings  # settings in the plugin's file
        self.boundary = Boundary()  # controls which thread may touch all this
        # Exchanges with each device since the start, over all ranks
        self.exchanged = {device: Exchanged() for device in range(1, len(settings.workers) + 1)}
        # Number of moves that began, were committed, and were aborted, by origin
        self.moves: Counter[tuple[MovedBy, str]] = Counter()
        self.shape: EngineShape
        self.allocator: HeadAllocator
        self.costs: EngineCosts
        self.num_steps = 0  # number of steps planned so far
        self._manager: HeadGroupManager
        self._copied: dict[int, set[int]] = {}  # ranks that have copied a move
        self._moved_by: dict[int, MovedBy] = {}
        self._blocks: dict[tuple[int, int], list[int]] = {}  # KV blocks of each worker, by rank
        self._take_counts: Callable[[bool], dict[str, Any] | None]
        self._steered: SteeredEngine[Any] | None = None
        self._close: Callable[[], None] = lambda: None
        self.requests = RequestStats()  # the state of vLLM's requests that the allocator does not need
        self._placed: dict[str, VllmRequest] = {}

    # --- life

    def bind(self, manager: HeadGroupManager, shape: EngineShape) -> None:
        """Connect to the block manager."""
        # Load compiled code here and not earlier, because vLLM inspects everything that is loaded while it starts.
        from hetis.runtime.vllm.allocator import HeadAllocator
        from hetis.runtime.vllm.costs import EngineCosts
        from hetis.runtime.vllm.redispatch import Redispatch
        from hetis.solver.dispatch.dispatcher import compile_dispatch
        from hetis.solver.redispatch.redispatcher import compile_redispatch

        settings = self.settings
        names = [worker.name for worker in settings.workers]
        self.shape, self._manager = shape, manager
        self.costs = EngineCosts(shape.heads, names)
        self.allocator = HeadAllocator(
            self.costs.stage,
            free_here=manager.block_pool.get_num_free_blocks,
            policy=settings.dispatch.policy,
            output_tokens=settings.dispatch.expected_output_tokens,
        )
        self.costs.follow(self.allocator.change_costs)
        manager.homes = self.allocator
        manager.relieve = self.relieve
        layers, rules = shape.num_layers, settings.redispatch
        self._redispatch = Redispatch(
            self.allocator, self.begin_move, rules, num_layers=layers, link_byte_s=lambda: self.costs.link_byte_s
        )
        if names and (rules.enabled or settings.dispatch.policy == "solver"):
            _log.info("loading the solver's kernels, which are compiled once per machine: a minute or two")
            compile_dispatch()
            if rules.enabled:
                compile_redispatch()  # otherwise the first look at running requests would stop them for that time

    def attach(
        self,
        take_counts: Callable[[bool], dict[str, Any] | None],
        steered: SteeredEngine[Any] | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """Connect the counts and, if there is an agent, the engine that it steers; ``close`` closes its socket."""
        self._take_counts, self._steered, self._close = take_counts, steered, close

    def workers_connected(
        self,
        blocks: Mapping[tuple[int, int], tuple[int, ...]],
        calibrations: Mapping[tuple[int, int], Mapping[int, Calibration]] | None = None,
    ) -> None:
        """Take the ranks' workers and calibrations, both by pipeline and tensor parallel rank."""
        with self.boundary.lock:
            self._blocks = {where: list(counts) for where, counts in blocks.items()}
            for rank, where in enumerate(sorted(self._blocks)):
                self.costs.measured(rank, (calibrations or {}).get(where, {}), self.shape.share(rank))
            for device in range(1, len(self.settings.workers) + 1):
                self._settle(device)

    def close(self) -> None:
        """Close the agent's socket, because vLLM ends."""
        self._close()

    # --- requests

    def arrived(self, request: VllmRequest) -> None:
        """Record a request that vLLM has accepted."""
        self.boundary.enter()
        self.requests.arrived(request)

    def place(self, request: VllmRequest, num_computed_tokens: int) -> None:
        """Place a request that vLLM is about to admit."""
        self.boundary.enter()
        self._placed[request.request_id] = request
        tokens = request.num_tokens
        most = max(request.max_tokens - request.num_output_tokens, 0)
        self.allocator.place(request.request_id, tokens=tokens, most_output=most, has_hits=num_computed_tokens > 0)

    def finished(self, request: VllmRequest) -> None:
        """Record that a request ended. If it ran, its blocks are about to be freed."""
        with self.boundary.lock:
            self._manager.finished(request)
            self.requests.finished(request, has_run=request.request_id in self.allocator.state)
            self.allocator.forget(request.request_id)
            self._placed.pop(request.request_id, None)

    # --- steps

    def plan(self) -> StepPlan:
        """Return everything that has not been sent to the ranks yet."""
        with self.boundary.lock:
            self.num_steps += 1
            for number in [n for n in self._copied if self.is_copied(n) and self._moved_by.get(n) != "planner"]:
                self.commit([number])
            if self._steered is not None:
                self._steered.step(time.monotonic())
            self.boundary.leave(is_idle=self.is_idle)
            if not self.is_steered:
                self._redispatch.advance()
            self.costs.advance()
            self.requests.look(time.time())
            events, self._manager.events = self._manager.events, []
            return StepPlan(self.num_steps, tuple(events))

    def take_reports(self, reports: Mapping[int, RankReport]) -> None:
        """Take the ranks' reports after a step."""
        with self.boundary.lock:
            for rank, report in reports.items():
                self._take_report(rank, report)

    def recompute_void(self, anchors: Collection[int]) -> None:
        """Recompute the requests, given by their anchors, whose outputs of a step are void."""
        if anchors:
            with self.boundary.lock:
                for request_id in self.allocator.running:
                    if self._manager.anchor(request_id) in anchors:
                        self._compute_again(request_id)

    def take_stats(self) -> dict[str, Any] | None:
        """Return the counts since the last take, after a step, or None if it is too early."""
        with self.boundary.lock:
            return self._take_counts(self.is_idle)

    # --- moves

    def begin_move(self, request_id: str, groups: Sequence[int], target: int, *, by: MovedBy = "engine") -> int | None:
        """Have groups of a running request copied elsewhere while it decodes.

        They move when all ranks have copied them or, for the planner's moves, when `commit` is called. Returns the
        number of the move, or None if the target has no room or the groups do not rest on one other device.
        """
        move = self._prepare(request_id, groups, target, by)
        return None if move is None else move.number

    def is_copied(self, number: int) -> bool:
        """Return whether all ranks had copied all existing KV of a move at their last report."""
        return len(self._copied.get(number, ())) == len(self._blocks) > 0

    def commit(self, numbers: Iterable[int]) -> None:
        """Make the targets own the groups of these moves from this step on. Moves that have ended are skipped."""
        for number in numbers:
            self._copied.pop(number, None)
            if not self.allocator.is_under_way(number):
                continue
            self.moves[self._moved_by.pop(number), "committed"] += 1
            request_id, move = self.allocator.commit(number)
            if move.target == LOCAL:
                needed = self._manager.blocks_of(request_id)
                missing = sum(max(needed - self._manager.held(request_id, group), 0) for group in move.groups)
                if missing > self._manager.block_pool.get_num_free_blocks():
                    raise AssertionError("a move that came in has no room for what was made meanwhile")
                for group in move.groups:
                    self._manager.extend(request_id, group, needed)
            self._manager.events.append(MoveStep("commit", move))
            self._manager.left(request_id, move.groups)

    def abort(self, number: int) -> None:
        """Leave the groups of a move where they are. It may have ended already."""
        self._copied.pop(number, None)
        by = self._moved_by.pop(number, None)
        if by is not None:
            self.moves[by, "aborted"] += 1
        ended = self.allocator.abort(number)
        if ended is None:
            return
        request_id, move = ended
        self._manager.events.append(MoveStep("abort", move))
        if move.target == LOCAL:
            for group in move.groups:
                self._manager.free_group(request_id, group)

    def relieve(self, blocks: int, request_id: str, tokens: int) -> None:
        """Move groups at once to workers with room, because the pool lacks blocks for a running request that grows to
        ``tokens``, and one would otherwise be preempted.

        The freed blocks are written by this step at the earliest, after the ranks have copied them.
        """
        for name, groups, target in self.allocator.relief(blocks, request_id, tokens):
            move = self._prepare(name, groups, target, "relief")
            if move is not None:
                self.allocator.stats.relieved_blocks += len(groups) * self._manager.blocks_of(name)
                self.commit([move.number])

    def follow_plan(self, limits: Mapping[int, int], drained: frozenset[int]) -> None:
        """Apply a plan's limits on the workers' blocks, and stop the ``drained`` workers from taking groups."""
        self.allocator.bound(limits)
        for move in self.allocator.moves:
            if move.target in drained:
                self.abort(move.number)
        self.allocator.drain(drained)

    # --- state

    @property
    def is_steered(self) -> bool:
        """Return whether a planner decides which groups move."""
        return self._steered is not None and self._steered.is_assigned

    @property
    def is_idle(self) -> bool:
        """Return whether vLLM has no request."""
        return self.requests.is_empty and self.allocator.is_idle

    def _take_report(self, rank: int, report: RankReport) -> None:
        share = self.shape.share(rank)
        self.costs.measured(rank, report.calibrations, share)
        for device, taken in report.taken.items():
            self.costs.record(device, taken, share)
        for device, one in report.devices.items():
            self.exchanged[device].add(one.exchanged)
            for where in sorted(self._blocks)[rank : rank + 1]:
                self._blocks[where][device - 1] = one.blocks
            self._settle(device)
        for number in report.copied:
            self._copied.setdefault(number, set()).add(rank)
        for number in report.failed:
            self.abort(number)

    def _prepare(self, request_id: str, groups: Sequence[int], target: int, by: MovedBy) -> GroupMove | None:
        manager = self._manager
        needed = len(groups) * manager.blocks_of(request_id) if target == LOCAL else 0
        if needed > manager.block_pool.get_num_free_blocks():
            return None
        move = self.allocator.prepare(request_id, groups, target)
        if move is None:
            return None
        if target == LOCAL:
            for group in move.groups:
                manager.extend(request_id, group, manager.blocks_of(request_id))
        self._moved_by[move.number] = by
        self.moves[by, "begun"] += 1
        manager.events.append(MoveStep("begin", move))
        return move

    def _compute_again(self, request_id: str) -> None:
        """Have vLLM restart a request.

        With pipeline stages, more of its steps may be in flight. Their outputs must not count: they are void or, if one
        of them restarts already, duplicates. vLLM itself only handles the step that failed.
        """
        self._manager.computed_again(request_id)
        request = self._placed[request_id]
        request.num_computed_tokens = 0
        request.num_stale_output_tokens, request.drop_stale_output = request.num_in_flight_tokens, True

    def _settle(self, device: int) -> None:
        """Make a worker available when it is there for every rank, with the smallest room, and lose it otherwise."""
        blocks = min((counts[device - 1] for counts in self._blocks.values()), default=0)
        if blocks:
            self.allocator.set_blocks(device, blocks)
            return
        for move in self.allocator.moves:
            if move.target == device:  # ranks whose own worker is still there continue it
                self.abort(move.number)
        for request_id in self.allocator.lose(device):
            self._manager.lost(request_id)
            self._compute_again(request_id)
            anchor, devices = self._manager.anchor(request_id), tuple(self.allocator.devices(request_id))
            self._manager.events.append(Rehomed(anchor, devices))
            _log.warning("request %s lost KV with worker %s", request_id, self.settings.workers[device - 1].name)
