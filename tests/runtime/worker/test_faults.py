"""A fault at every message: a worker that dies, hangs, is cut off, stops in mid-frame or wakes too late costs a prefill
of the requests that had heads there, never a token."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest
import torch

from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.engine.engine import Engine, EngineOptions
from hetis.runtime.engine.generate import engine_from_folder
from hetis.runtime.engine.request import SamplingParams
from hetis.runtime.kv.errors import StaleEpochError, UnknownSequenceError
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.transport.frames import Frame, Kind, bytes_of
from hetis.runtime.transport.messages import ErrorCode, Hello, read_error
from hetis.runtime.worker.core import WorkerCore
from hetis.runtime.worker.remote import RemoteDevice
from tests.runtime.checkpoints import random_model, random_prompts
from tests.runtime.worker.inproc import KEY, Fault, InprocWorker, with_workers

TOKENS = 5
WORKERS = 2


def engine_with(workers: list[InprocWorker]) -> Engine:
    options = EngineOptions(chunk_tokens=12)
    return engine_from_folder(random_model().folder, with_workers(workers, own_pages=60), options=options)


def run(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """Answers, with heads that move to the workers and between them in every step."""
    chooser = random.Random(1)
    numbers = [engine.add(prompt, SamplingParams(max_tokens=TOKENS)) for prompt in prompts]
    answers: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_work:
        for news in engine.step():
            if news.token is not None:
                answers[news.request].append(news.token)
        for request in list(engine.running.values()):
            if request.number not in engine.running:
                continue  # a move before this one found a device lost, on which it had heads
            head, target = chooser.randrange(len(request.heads[0])), chooser.randrange(1 + WORKERS)
            takes = engine.placement.state.devices[target].status == "ok"
            if takes and request.heads[0][head] != target:
                engine.move(request.number, [head], target)
    return [answers[number] for number in numbers]


def received(frame: Frame) -> Frame:
    """As it comes out of a channel: its body in one piece."""
    raw = b"".join(bytes(bytes_of(part)) for part in frame.parts)
    return frame._replace(parts=(np.frombuffer(raw, np.uint8),))


@cache
def prompts_and_answers() -> tuple[list[list[int]], list[list[int]]]:
    prompts = random_prompts(31, 2, shortest=14, longest=18)
    return prompts, [random_model().generate(prompt, TOKENS) for prompt in prompts]


@cache
def messages() -> tuple[Kind, ...]:
    """What the first worker is sent when nothing goes wrong."""
    prompts, answers = prompts_and_answers()
    workers = [InprocWorker(f"w{i}", 40) for i in range(WORKERS)]
    assert run(engine_with(workers), prompts) == answers
    return tuple(workers[0].handled)


def test_the_run_without_faults_has_every_kind_of_message() -> None:
    everything = {Kind.HELLO, Kind.BEGIN, Kind.ATTEND, Kind.FINISH, Kind.ADOPT, Kind.EXPORT, Kind.DROP}
    assert everything <= set(messages())


EVERY = 3  # message of a fault, each fault beginning at another: together they come to every one


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_at_a_third_of_the_messages_costs_no_token(fault: Fault) -> None:
    check_faults(fault, range(1 + list(Fault).index(fault) % EVERY, len(messages()), EVERY))


@pytest.mark.soak
@pytest.mark.parametrize("fault", Fault)
def test_a_fault_at_any_message_costs_no_token(fault: Fault) -> None:
    check_faults(fault, range(1, len(messages())))


def check_faults(fault: Fault, indices: range) -> None:
    prompts, answers = prompts_and_answers()
    for index in indices:
        workers = [InprocWorker(f"w{i}", 40) for i in range(WORKERS)]
        workers[0].fault, workers[0].fault_at = fault, index
        engine = engine_with(workers)
        where = f"{fault} at message {index}, {messages()[index].name}"
        assert run(engine, prompts) == answers, where
        assert workers[0].has_failed, where
        engine.placement.check_invariants()
        assert len(engine.placement) == 0, where
        assert engine.stage.prompts == ()
        primary, lost, alive = engine.stage.devices
        assert isinstance(primary, LocalDevice)
        assert isinstance(alive, RemoteDevice)
        assert isinstance(lost, RemoteDevice)
        assert primary.pool.free_pages == primary.num_pages, where
        assert alive.ping() == (40, 0), where
        if fault is Fault.ZOMBIE:
            workers[0].wake()
        if fault in (Fault.KILL, Fault.KILL_AFTER, Fault.STOP, Fault.HALF):
            workers[0].start()
        workers[0].fault = None
        engine.restore_device(1, workers[0].join(engine.stage.shape))
        assert run(engine, prompts) == answers, f"{where}, and it came back"


def test_a_zombie_that_serves_an_old_connection_answers_nobody() -> None:
    """The same worker is met again while frames of the old connection are still to come."""
    worker = InprocWorker("w0", 40)
    engine = engine_with([worker, InprocWorker("w1", 40)])
    prompts, answers = prompts_and_answers()
    old = engine.stage.devices[1]
    assert isinstance(old, RemoteDevice)
    new = worker.join(engine.stage.shape)
    frame = old._session.frame(Kind.PING)
    answer = worker.core.handle(frame)
    assert answer is not None
    assert answer.kind is Kind.ERROR
    assert worker.core.handle(old._session.frame(Kind.BEGIN)) is None
    assert worker.core.device is not None
    assert len(worker.core.device.pool) == 0
    engine.stage.devices[1] = new
    assert run(engine, prompts) == answers


def test_a_worker_does_not_obey_an_engine_of_an_older_epoch() -> None:
    worker = InprocWorker("w0", 40)
    shape = engine_with([]).stage.shape
    newer = worker.join(shape, epoch=7)
    with pytest.raises(StaleEpochError, match="epoch 6 has ended, 7 is current"):
        worker.join(shape, epoch=6)
    del newer


def test_a_worker_without_memory_for_its_kv_says_so_and_lives() -> None:
    def make_device(shape: KvShape) -> LocalDevice:
        raise RuntimeError("you tried to allocate 990 TiB\nand more")

    shape, core = engine_with([]).stage.shape, WorkerCore("w0", make_device, key=KEY)
    for epoch in (1, 2):
        answer = core.handle(received(Hello(shape=shape, key=KEY).frame(epoch=epoch, session=epoch)))
        assert answer is not None
        assert answer.counts[0] == ErrorCode.FAILED
        assert read_error(received(answer))[2] == "no memory for its KV: you tried to allocate 990 TiB"
    assert core.handle(Frame(kind=Kind.FINISH, epoch=2, session=2)) is None  # nobody is served


def test_kv_of_an_earlier_incarnation_is_refused_and_that_of_a_later_one_takes_its_place() -> None:
    worker = InprocWorker("w0", 40)
    shape = engine_with([]).stage.shape
    device = worker.join(shape)
    kv = torch.zeros(1, shape.layers, 3, shape.head_dim)
    for incarnation in (0, 1):
        device.adopt(7, incarnation, [0], 0, kv, kv)
    assert device.ping() == (39, 1)
    device.adopt(7, 0, [1], 0, kv, kv)
    with pytest.raises(UnknownSequenceError, match="request 7 is at incarnation 1, 0 is void"):
        device.export(7, 1, [0], 0, 3)
    assert device.ping() == (39, 1)
