"""A simulated replica at the engine of its primary: arrivals, admission, decode steps, growth, preemption.

A replica is controlled while it runs by one small YAML or JSON file.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field

from examples.simulated_engine.stage import AdmissionRule, SimulatedRequest, StageRun
from hetis.solver.traffic import TrafficCounter
from hetis.v1.head_map_pb2 import HeadMap
from hetis.v1.replica_pb2 import Assignment, AssignmentGoal, ReplicaRole
from hetis.v1.report_pb2 import DeviceStatus, ReplicaReport, StageLoad
from hetis.v1.traffic_pb2 import Traffic

_log = logging.getLogger(__name__)
Amount = Annotated[float, Field(ge=0)]
IDLE_S = 0.01  # interval between checks for arrivals when nothing runs
MOST_CATCH_UP_S = 1.0  # an engine that was suspended catches up at most this much
REMEMBERED = 64  # first tokens and outputs over which means are taken
MOST_WAITING = 10_000
Key = tuple[int, int]  # stage and copy


class Control(BaseModel):
    """The load on every replica whose primary is here, and the faults to simulate."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    # Arrivals per second and replica. None: ``load_ratio`` times the rate that the plan promises.
    rate_rps: Amount | None = None
    load_ratio: Amount = 0.0  # see ``rate_rps``
    prompt_tokens: Annotated[float, Field(ge=1)] = 512.0  # mean length of a prompt; lengths are exponential
    output_tokens: Annotated[float, Field(ge=1)] = 128.0  # mean length of an output
    same_lengths: bool = False  # all requests have the mean lengths
    prompt_token_s: Amount = 0.0  # seconds that a step takes longer per prompt token of the requests that it admits
    # Factor by which attention takes longer than the profile predicts, by device ``node/index``
    slow: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    pause: bool = False  # stop decoding
    load_s: Amount = 0.2  # seconds to load the weights
    # Seconds of a step outside attention. None: half the time per token that the plan promises.
    dense_step_s: Amount | None = None
    fail_copies: bool = False  # CopyMoves fails with COPY_FAILED


class ControlFile:
    """A control file that is read again when it changes. A file that cannot be used changes nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self.control = Control()

    def look(self) -> bool:
        """Return whether the control has changed. A missing file counts as empty."""
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size)
        except OSError:
            seen = None
        if seen == self._seen:
            return False
        self._seen = seen
        try:
            text = self._path.read_text(encoding="utf-8") if seen else ""
            control = Control.model_validate(yaml.safe_load(text) or {})
        except (OSError, ValueError, yaml.YAMLError) as error:
            _log.error("control file %s is not used: %s", self._path, error)
            return False
        changed, self.control = control != self.control, control
        return changed


class PrimaryRun:
    """The requests of one replica and the decode loop that serves them. All times are passed in.

    Prompts only take time. Requests of a decode replica arrive with their KV. A prefill replica has no requests,
    because its prompts leave when they would begin to decode.
    """

    def __init__(self, assignment: Assignment, *, seed: int, admission: AdmissionRule, now_s: float) -> None:
        self.stages: dict[Key, StageRun] = {(m.stage, m.copy): StageRun(m) for m in assignment.stages}
        self.waiting: deque[SimulatedRequest] = deque()
        self.running: dict[str, SimulatedRequest] = {}
        self.num_steps = self.num_finished = self.num_preempted = 0
        self._num_waiting_for_kv = self._names = self._turn = self._admitted_tokens = 0
        self._random, self._admission = random.Random(seed), admission
        self.next_step_s = now_s  # when the next decode step begins: owners change before it or not at all
        self._next_arrival_s: float | None = None
        self._first_tokens: deque[float] = deque(maxlen=REMEMBERED)
        self._outputs: deque[float] = deque(maxlen=REMEMBERED)
        self.traffic = TrafficCounter()
        self.assignment = assignment
        self.use(assignment)

    def use(self, assignment: Assignment) -> None:
        """Continue under an assignment with the same stages. Its conditions name the devices not to rely on."""
        self.assignment = assignment
        said = {condition.device: condition.status for condition in assignment.conditions}
        for stage in self.stages.values():
            for i, device in enumerate(stage.model.devices):
                found = [said[gpu] for gpu in [device.name, *device.gpus] if gpu in said]
                # LOST is worse than DRAINING, which is worse than OK, in the order of the numbers.
                stage.status[i] = max(found, default=DeviceStatus.DEVICE_STATUS_OK)
        for stage in self.stages.values():
            gone = {i for i, status in enumerate(stage.status) if status == DeviceStatus.DEVICE_STATUS_LOST}
            for name in [name for name, owners in stage.owners.items() if gone.intersection(owners)]:
                self._prefill_again(self.running[name])

    # --- time

    def step(self, control: Control, *, serves: bool) -> None:
        """Make the decode step that is due."""
        now_s = self.next_step_s
        for stage in self.stages.values():
            stage.slowness = slow_of(stage, control.slow)
        self._admitted_tokens = 0
        goal = self.assignment.goal
        if serves and goal == AssignmentGoal.ASSIGNMENT_GOAL_SERVE:
            self._arrive(now_s, control)
        else:
            self._next_arrival_s = None
        if serves and goal in (AssignmentGoal.ASSIGNMENT_GOAL_SERVE, AssignmentGoal.ASSIGNMENT_GOAL_DRAIN):
            self._admit_waiting(now_s)  # a replica that drains ends what waits, too
        if not self.running or control.pause:
            self.next_step_s = now_s + IDLE_S
            return
        read_s = now_s + self._admitted_tokens * control.prompt_token_s
        self._grow(read_s)
        self.num_steps += 1
        self.next_step_s = read_s + self.step_s(control.dense_step_s)

    def catch_up(self, now_s: float) -> None:
        """Skip lost time, so that a process that was suspended does not race to make up for it."""
        if now_s - self.next_step_s > MOST_CATCH_UP_S:
            self.next_step_s = now_s

    def step_s(self, dense_s: float | None) -> float:
        """Return the seconds of a step: in a layer the slowest device counts, and copies of a stage run in parallel."""
        slowest: dict[int, float] = {}
        for (stage, _), run in self.stages.items():
            times = zip(run.attention_s(), run.slowness, strict=True)
            attention_s = run.model.num_layers * max(seconds * slow for seconds, slow in times)
            slowest[stage] = max(slowest.get(stage, 0.0), attention_s)
        outside_s = self.assignment.shape.tpot_s / 2 if dense_s is None else dense_s
        return max(outside_s + sum(slowest.values()), 1e-4)

    # --- requests

    def _arrive(self, now_s: float, control: Control) -> None:
        rate = 0.0 if self.assignment.shape.role == ReplicaRole.REPLICA_ROLE_PREFILL else control.rate_rps
        if rate is None:
            rate = control.load_ratio * self.assignment.shape.rate_rps
        if rate <= 0:
            self._next_arrival_s = None
            return
        if self._next_arrival_s is None:
            self._next_arrival_s = now_s + self._random.expovariate(rate)
        while self._next_arrival_s <= now_s:
            self._names += 1
            request = SimulatedRequest(
                id=f"r{self._names}",
                context_tokens=self._length(control.prompt_tokens, control),
                remaining_tokens=self._length(control.output_tokens, control),
                arrived_s=self._next_arrival_s,
            )
            self.traffic.num_arrivals += 1
            if len(self.waiting) < MOST_WAITING:
                self.waiting.append(request)
            self._next_arrival_s += self._random.expovariate(rate)

    def _length(self, mean: float, control: Control) -> int:
        if control.same_lengths:
            return round(mean)
        return min(max(round(self._random.expovariate(1 / mean)), 1), round(8 * mean))

    def _admit_waiting(self, now_s: float) -> None:
        shape = self.assignment.shape
        most = max(shape.max_num_seqs, shape.micro_batch * shape.in_flight)
        self._num_waiting_for_kv = 0
        while self.waiting and (not most or len(self.running) < most):
            if not self._admit(self.waiting[0]):
                if self.running:
                    self._num_waiting_for_kv = len(self.waiting)
                    return
                self.num_finished += 1  # it exceeds the replica, and requests behind it must not wait forever
            self.waiting.popleft()

    def _admit(self, request: SimulatedRequest) -> bool:
        """Admit a request if it fits, and return whether it runs now. The copies of a stage take requests in turn."""
        numbers = sorted({stage for stage, _ in self.stages})
        copies = tuple(self._turn % sum(stage == number for stage, _ in self.stages) for number in numbers)
        found = {}
        for key in zip(numbers, copies, strict=True):
            owners = self._admission.owners(self.stages[key], request)
            if owners is None:
                return False
            found[key] = owners
        for key, owners in found.items():
            self.stages[key].admit(request, owners)
        request.copies = copies
        self._admitted_tokens += request.context_tokens
        self.running[request.id] = request
        self._turn += 1
        return True

    def _grow(self, now_s: float) -> None:
        """Generate a token for every request, finish those that end, and preempt the youngest if blocks run out."""
        for request in list(self.running.values()):
            request.context_tokens += 1
            request.remaining_tokens -= 1
            request.made_tokens += 1
            if request.begun_s is None:
                request.begun_s = now_s
                self._first_tokens.append(now_s - request.arrived_s)
                self.traffic.add(ttft_s=self._first_tokens[-1])
            if request.remaining_tokens <= 0:
                self._leave(request)
                self.num_finished += 1
                made = request.made_tokens
                self.traffic.add(prompt_tokens=request.context_tokens - made, output_tokens=made)
                if made > 1:
                    self._outputs.append((now_s - request.begun_s) / (made - 1))
                    self.traffic.add(tpot_s=self._outputs[-1])
        for stage in self.stages.values():
            while (full := stage.overfull()) is not None:
                self._make_room(stage, full)

    def _make_room(self, stage: StageRun, device: int) -> None:
        """Free blocks on a device. Moves not yet made give way first, because nothing is lost with them."""
        for moves in stage.reserved.values():
            coming = next((move for move in moves if stage.index[move.target] == device), None)
            if coming is not None:
                moves.remove(coming)
                return
        self._prefill_again(next(self.running[n] for n in reversed(stage.owners) if device in stage.owners[n]))

    def _prefill_again(self, request: SimulatedRequest) -> None:
        """Drop a request's KV and put it at the head of the queue to start over."""
        self._leave(request)
        request.incarnation += 1
        request.copies = ()
        self.num_preempted += 1
        self.waiting.appendleft(request)

    def _leave(self, request: SimulatedRequest) -> None:
        del self.running[request.id]
        for stage in self.stages.values():
            if request.id in stage.requests:
                stage.drop(request.id)

    # --- reports

    def head_maps(self) -> list[HeadMap]:
        return [self.stages[key].head_map() for key in sorted(self.stages)]

    def loads(self) -> list[StageLoad]:
        return [self.stages[key].load() for key in sorted(self.stages)]

    def fill(self, report: ReplicaReport) -> None:
        """Fill in the primary's part of a report."""
        report.is_primary = True
        report.num_running, report.num_waiting = len(self.running), len(self.waiting)
        report.num_waiting_for_kv = min(self._num_waiting_for_kv, len(self.waiting))
        report.num_preempted, report.num_finished = self.num_preempted, self.num_finished
        report.num_steps = self.num_steps
        report.stages.extend(self.loads())
        report.ttft_s = sum(self._first_tokens) / max(len(self._first_tokens), 1)
        report.tpot_s = sum(self._outputs) / max(len(self._outputs), 1)
        report.traffic.CopyFrom(Traffic(**self.traffic.sketch(int(self.next_step_s)).packed()))

    def check(self) -> None:
        """Recount everything. A failure is a bug."""
        for stage in self.stages.values():
            stage.check()
        for name, request in self.running.items():
            keys = list(zip(sorted({stage for stage, _ in self.stages}), request.copies, strict=True))
            held = [key for key, stage in self.stages.items() if name in stage.requests]
            assert sorted(held) == keys, f"{name} runs on {held}, not {keys}"


def slow_of(stage: StageRun, slow: Mapping[str, float]) -> list[float]:
    """Return how many times slower each device is. A tensor parallel group is as slow as its slowest GPU."""
    return [max((slow.get(gpu, 1.0) for gpu in device.gpus), default=1.0) for device in stage.model.devices]
