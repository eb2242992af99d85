"""Workers with position ranges: whatever fails at any message, repeating the step elsewhere gives the same outputs."""

from __future__ import annotations

import math
import struct
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetis.runtime.attention.device import DeviceStep, LocalDevice
from hetis.runtime.attention.kv import (
    DeviceLostError,
    OutOfPagesError,
    SequenceKey,
    StaleEpochError,
    UnknownSequenceError,
)
from hetis.runtime.transport.frames import (
    DTYPES,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Frame,
    FrameError,
    FrameKind,
    read_header,
)
from hetis.runtime.worker.core import WorkerCore
from hetis.runtime.worker.remote import RemoteDevice
from tests.runtime.attention.test_ranges import LAYERS, Case, check, step
from tests.runtime.worker.inproc import CHALLENGE, KEY, Fault, InprocWorker, hello

CASE = Case(tokens=(21, 5, 9), cuts=((8, 20), (4,), (3, 4, 5)), window=6, dtype="float32")
PAGES = sum(CASE.shape().pages(tokens) for tokens in CASE.tokens)
SESSION = 7


@pytest.fixture(scope="module")
def messages() -> tuple[FrameKind, ...]:
    """Return the messages to a worker if nothing goes wrong."""
    worker = InprocWorker("w0", PAGES)
    check(worker.join(CASE.shape()), CASE)
    return tuple(worker.handled)


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_at_any_message_is_a_lost_device_and_the_next_connection_computes_all_again(
    fault: Fault, messages: tuple[FrameKind, ...]
) -> None:
    for index in range(1, len(messages)):
        worker = InprocWorker("w0", PAGES, fault=fault, fault_at=index)
        device = worker.join(CASE.shape())
        with pytest.raises(DeviceLostError):
            check_and_ask(device)
        assert device.is_lost
        if not worker.is_running:
            if fault is Fault.ZOMBIE:
                worker.wake()
            else:
                worker.start()
        worker.fault = None
        check(worker.join(CASE.shape(), epoch=2), CASE)


def check_and_ask(device: RemoteDevice) -> None:
    """A fault at the last frame, which has no answer, is detected at the next request."""
    check(device, CASE)
    device.ping()


def test_a_step_that_finds_too_few_pages_changes_nothing_and_may_be_done_in_smaller_chunks() -> None:
    shape = CASE.shape()
    device = InprocWorker("w0", 3).join(shape)
    rows = torch.zeros(13, CASE.r + 2, CASE.d)
    device.begin(step([0], [0], [13]))
    with pytest.raises(OutOfPagesError, match="w0: 4 KV pages are needed, 3 are free"):
        device.attend(0, rows).wait()
    device.abort(0)
    assert device.ping() == (3, 0)
    device.begin(step([0], [0], [12]))
    assert device.attend(0, rows[:12]).wait().shape == (12, CASE.r, CASE.d)
    device.finish(0)
    assert device.ping() == (0, 1)
    device.begin(step([0], [12], [1]))
    with pytest.raises(OutOfPagesError):
        device.attend(0, rows[:1]).wait()
    device.abort(0)
    device.drop([SequenceKey(0, 0, 0)])
    assert device.ping() == (3, 0)


def test_a_range_that_would_leave_a_gap_is_unknown() -> None:
    device = InprocWorker("w0", 9).join(CASE.shape())
    device.begin(step([0], [3], [2]))
    with pytest.raises(UnknownSequenceError, match="holds nothing, 3 come before what is to be written"):
        device.attend(0, torch.zeros(2, CASE.r + 2, CASE.d)).wait()


def test_an_older_engine_is_refused_and_cannot_write_into_a_newer_ones_ranges() -> None:
    worker = InprocWorker("w0", PAGES)
    old = worker.join(CASE.shape(), epoch=5)
    old.begin(step([0], [0], [4]))
    core, frames = worker.core, list(old._queued)
    newer = worker.join(CASE.shape(), epoch=6)
    for frame in frames:
        assert core.handle(frame) is None
    assert newer.ping() == (PAGES, 0)
    with pytest.raises(StaleEpochError, match="epoch 5 has ended, 6 is current"):
        worker.join(CASE.shape(), epoch=5)


def test_a_restarted_engine_takes_over_whatever_its_number_and_nobody_before_it_returns() -> None:
    """An engine's number used to be the time of its clock, which may have been put back between two engines."""
    worker = InprocWorker("w0", PAGES)
    worker.join(CASE.shape(), epoch=900)
    worker.now_s += 60
    worker.join(CASE.shape(), epoch=5).close()
    worker.now_s += 60
    for number, age_s in ((900, 120.0), (900, 0.0), (901, 60.5)):  # it knows its age; it was paused; it never came
        with pytest.raises(StaleEpochError, match=f"epoch {number} has ended, 5 is current"):
            worker.join(CASE.shape(), epoch=number, age_s=age_s)
    assert worker.join(CASE.shape(), epoch=5, age_s=61.0).ping() == (PAGES, 0)  # over a slow way


def test_the_later_of_two_engines_is_obeyed_by_a_worker_that_knows_neither() -> None:
    for order in ((900, 5), (5, 900)):
        worker = InprocWorker("w0", PAGES)
        worker.start()
        for number in order:
            with suppress(StaleEpochError):
                worker.join(CASE.shape(), epoch=number, age_s={900: 120.0, 5: 60.0}[number])
        assert worker.core.epoch == 5


def test_an_engine_that_started_while_the_workers_host_slept_is_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    uptime_s = 1000.0
    monkeypatch.setattr(time, "clock_gettime", lambda _: uptime_s)
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)  # stands still in sleep
    worker = InprocWorker("w0", PAGES)
    worker.core = WorkerCore("w0", lambda shape: LocalDevice("w0", shape, PAGES), key=KEY)
    worker.join(CASE.shape(), epoch=1, age_s=100.0)
    uptime_s += 600.0
    assert worker.join(CASE.shape(), epoch=2, age_s=200.0).ping() == (PAGES, 0)


@pytest.mark.parametrize("age_s", [-1.0, math.inf, math.nan])
def test_an_age_that_nothing_has_is_refused(age_s: float) -> None:
    with pytest.raises(DeviceLostError):
        InprocWorker("w0", PAGES).join(CASE.shape(), age_s=age_s)


# --- hostile frames


def begun(pages: int = 20) -> WorkerCore:
    """A worker that has an engine and is in the middle of a step, with a range of 3 positions."""
    core = WorkerCore("w0", lambda shape: LocalDevice("w0", shape, pages), key=KEY)
    core.handle(hello(CASE.shape(), epoch=1, session=SESSION), challenge=CHALLENGE)
    core.handle(frame_of(FrameKind.BEGIN, (2, 4, 0), np.array([[0, 1], [0, 0], [0, 0], [0, 0], [3, 1]]).tobytes()))
    return core


def frame_of(kind: FrameKind, counts: tuple[int, int, int], body: bytes, *, layer: int = 0, dtype: str = "") -> Frame:
    raw = np.frombuffer(bytearray(body), np.uint8)
    return Frame(kind=kind, epoch=1, session=SESSION, layer=layer, counts=counts, dtype=dtype, parts=(raw,))


def received(frame: Frame) -> Frame:
    raw = b"".join(part.numpy().tobytes() if isinstance(part, torch.Tensor) else part.tobytes() for part in frame.parts)
    return frame._replace(parts=(np.frombuffer(raw, np.uint8),))


@pytest.mark.parametrize(
    ("counts", "columns"),
    [
        ((2, 5, 0), [[0, 1], [0, 0], [0, 0], [0, 0], [3, 1]]),  # their sum is 4
        ((2, 4, 0), [[0, 1], [0, 0], [0, 0], [0, 0], [4, 0]]),  # a sequence that writes nothing
        ((2, 4, 0), [[0, 1], [0, 0], [0, 0], [0, 0], [5, -1]]),
        ((2, 4, 0), [[0, 1], [0, 0], [0, 0], [-1, 0], [3, 1]]),
        ((2, 4, 0), [[0, 1], [0, 0], [0, 0], [0, 0]]),  # a column is missing
        ((2, 2, 0), [[0, 1], [0, 0], [0, 0], [0, 0], [1, 1]]),  # one too many
        ((2, 4, 0), [[0, 1], [0, 0], [0, 0], [0, 0], [2**62, 2**62]]),
        ((0, 4, 0), [[]]),
    ],
)
def test_ranges_that_contradict_themselves_end_the_connection(
    counts: tuple[int, int, int], columns: list[list[int]]
) -> None:
    with pytest.raises(FrameError, match="BEGIN"):
        begun().handle(frame_of(FrameKind.BEGIN, counts, np.array(columns, np.int64).tobytes()))


def test_queries_of_another_number_than_was_begun_end_the_connection() -> None:
    rows = torch.zeros(2, CASE.r + 2, CASE.d).numpy().tobytes()
    with pytest.raises(FrameError, match="ATTEND of 2 positions in layer 0: 4 were begun"):
        begun().handle(frame_of(FrameKind.ATTEND, (2, 0, 0), rows, dtype="float32"))
    with pytest.raises(FrameError, match=f"in layer {LAYERS}"):
        begun().handle(frame_of(FrameKind.ATTEND, (4, 0, 0), 2 * rows, layer=LAYERS, dtype="float32"))


numbers = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1))
words = st.one_of(st.integers(-2, 30), st.integers(-(2**63), 2**63 - 1))


@given(
    frames=st.lists(
        st.tuples(
            st.sampled_from([kind for kind in FrameKind if kind is not FrameKind.HELLO]),
            st.tuples(numbers, numbers, numbers),
            st.one_of(
                st.lists(words, max_size=16).map(lambda some: struct.pack(f"<{len(some)}q", *some)),
                st.binary(max_size=300),
                st.integers(0, 6).map(lambda rows: bytes(4 * rows * (CASE.r + 2) * CASE.d)),
            ),
            st.integers(0, 3),
            st.sampled_from(DTYPES),
        ),
        max_size=6,
    )
)
@settings(max_examples=150)
def test_whatever_frames_come_a_worker_answers_or_hangs_up_and_keeps_its_pages_in_order(
    frames: list[tuple[FrameKind, tuple[int, int, int], bytes, int, str]],
) -> None:
    core = begun()
    for kind, counts, body, layer, dtype in frames:
        try:
            core.handle(frame_of(kind, counts, body, layer=layer, dtype=dtype))
        except FrameError:
            core.leave()
            break
        assert core.device is not None
        core.device.pool.check_invariants()
    # The next engine finds the worker empty.
    answer = core.handle(hello(CASE.shape(), epoch=2, session=SESSION + 1), challenge=CHALLENGE)
    assert answer is not None
    assert answer.kind is FrameKind.WELCOME
    assert core.device is not None
    assert core.device.pool.free_pages == core.device.num_pages


@given(st.one_of(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.binary(max_size=2 * HEADER_BYTES)))
def test_bytes_that_are_no_header_are_refused(raw: bytes) -> None:
    with pytest.raises(FrameError):
        read_header(raw)


@given(
    kind=st.integers(0, 255),
    dtype=st.integers(0, 255),
    rest=st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8),
    body_bytes=st.one_of(st.integers(0, 10_000), st.integers(0, 2**64 - 1)),
)
def test_a_header_is_read_as_it_was_written_or_refused(kind: int, dtype: int, rest: list[int], body_bytes: int) -> None:
    raw = HEADER.pack(MAGIC, VERSION, kind, dtype, *rest, body_bytes)
    try:
        frame, body = read_header(raw, most_body_bytes=10_000)
    except FrameError:
        assert kind not in set(FrameKind) or dtype >= len(DTYPES) or body_bytes > 10_000
        return
    assert (frame.kind, DTYPES.index(frame.dtype), len(body)) == (kind, dtype, body_bytes)
    assert [*frame[1:6], *frame.counts] == rest


@given(shape=st.tuples(*[st.integers(0, 2**32 - 1)] * 4), body=st.binary(max_size=200), dtype=st.sampled_from(DTYPES))
def test_no_greeting_breaks_a_worker(shape: tuple[int, int, int, int], body: bytes, dtype: str) -> None:
    core = WorkerCore("w0", lambda shape: LocalDevice("w0", shape, 0), key=KEY)
    layers, *counts = shape
    hello = Frame(
        kind=FrameKind.HELLO,
        epoch=1,
        session=1,
        layer=layers % 30,
        counts=(counts[0], counts[1], counts[2]),
        dtype=dtype,
        parts=(np.frombuffer(body, np.uint8),),
    )
    try:
        answer = core.handle(hello)
    except FrameError:
        return
    assert answer is not None
    assert answer.kind is FrameKind.ERROR  # a wrong key is refused


def test_a_device_that_was_lost_does_nothing_more() -> None:
    worker = InprocWorker("w0", PAGES, fault=Fault.KILL, fault_at=1)
    device: RemoteDevice = worker.join(CASE.shape())
    with pytest.raises(DeviceLostError):
        device.ping()
    no_step: DeviceStep = step([0], [0], [2])
    with pytest.raises(DeviceLostError, match="w0: it was lost"):
        device.begin(no_step)
    device.abort(0)
    device.drop([SequenceKey(0, 0, 0)])
    device.close()
