"""A fault at every message of a copy: a worker that dies, hangs, is cut off, stops in mid-frame or wakes too late is a
lost device, and never one that returns or keeps wrong KV. Faults within steps are in `test_ranges_and_faults.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hetis.runtime.attention.device import LocalDevice
from hetis.runtime.attention.kv import DeviceLostError, KvShape, SequenceKey, UnknownSequenceError
from hetis.runtime.transport.frames import ErrorCode, Frame, FrameError, FrameKind, bytes_of, read_error, read_welcome
from hetis.runtime.worker.core import WorkerCore
from hetis.runtime.worker.remote import RemoteDevice
from tests.runtime.worker.inproc import CHALLENGE, KEY, Fault, InprocWorker, hello

SHAPE = KvShape(layers=2, head_dim=8, queries_per_group=2, page_tokens=4, dtype="float32", scale=0.3, windows=(0, 0))
PAGES, TOKENS = 20, 11
HEADS = [0, 2, 3]


def received(frame: Frame) -> Frame:
    """Return the frame as a channel delivers it, with its body in one piece."""
    raw = b"".join(bytes(bytes_of(part)) for part in frame.parts)
    return frame._replace(parts=(np.frombuffer(raw, np.uint8),))


def carry(device: RemoteDevice) -> None:
    """Import KV in two pieces, export it again, and free it: everything that a move does."""
    generator = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, len(HEADS), SHAPE.layers, TOKENS, SHAPE.head_dim, generator=generator)
    for begin, end in ((0, 6), (6, TOKENS)):
        device.adopt(7, 0, HEADS, begin, k[:, :, begin:end], v[:, :, begin:end])
    for first, heads in ((0, 0), (2, 1)):
        for found, wanted in zip(device.export(7, 0, HEADS[heads:], first, TOKENS), (k, v), strict=True):
            assert torch.equal(found, wanted[heads:, :, first:])
    device.drop([SequenceKey(7, 0, head) for head in HEADS])
    assert device.ping() == (PAGES, 0)


def test_a_copy_has_every_kind_of_message_that_moves_have() -> None:
    worker = InprocWorker("w0", PAGES)
    carry(worker.join(SHAPE))
    assert {FrameKind.ADOPT, FrameKind.EXPORT, FrameKind.DROP, FrameKind.PING} <= set(worker.handled)


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_at_any_message_is_a_lost_device_and_the_next_connection_finds_nothing(fault: Fault) -> None:
    whole = InprocWorker("w0", PAGES)
    carry(whole.join(SHAPE))
    for index in range(1, len(whole.handled)):
        worker = InprocWorker("w0", PAGES, fault=fault, fault_at=index)
        device = worker.join(SHAPE)
        with pytest.raises(DeviceLostError):
            carry(device)
        assert worker.has_failed
        assert device.is_lost, f"{fault} at message {index}, {whole.handled[index].name}"
        if fault is Fault.ZOMBIE:
            worker.wake()
        elif not worker.is_running:
            worker.start()
        worker.fault = None
        again = worker.join(SHAPE, epoch=2)
        assert again.ping() == (PAGES, 0)
        carry(again)


def test_a_zombie_that_serves_an_old_connection_answers_nobody() -> None:
    """The engine reconnects to the same worker while frames of the old connection are still to come."""
    worker = InprocWorker("w0", PAGES)
    old = worker.join(SHAPE)
    new = worker.join(SHAPE)
    answer = worker.core.handle(old._frame(FrameKind.PING))
    assert answer is not None
    assert answer.kind is FrameKind.ERROR
    assert worker.core.handle(old._frame(FrameKind.BEGIN)) is None
    assert worker.core.device is not None
    assert len(worker.core.device.pool) == 0
    carry(new)


def test_a_worker_without_memory_for_its_kv_says_so_and_lives() -> None:
    def make_device(shape: KvShape) -> LocalDevice:
        raise RuntimeError("you tried to allocate 990 TiB\nand more")

    core = WorkerCore("w0", make_device, key=KEY)
    for epoch in (1, 2):
        answer = core.handle(hello(SHAPE, epoch=epoch, session=epoch), challenge=CHALLENGE)
        assert answer is not None
        assert answer.counts[0] == ErrorCode.FAILED
        assert read_error(received(answer))[2] == "no memory for its KV: you tried to allocate 990 TiB"
    assert core.handle(Frame(kind=FrameKind.FINISH, epoch=2, session=2)) is None  # no engine is served


def test_a_hello_that_was_overheard_opens_nothing() -> None:
    core = WorkerCore("w0", lambda shape: LocalDevice("w0", shape, PAGES), key=KEY)
    heard = hello(SHAPE, epoch=1, session=1)
    welcome = core.handle(heard, challenge=CHALLENGE)
    assert welcome is not None
    assert read_welcome(received(welcome), key=KEY, nonce=bytes(32)) == PAGES
    other = bytes(reversed(CHALLENGE))
    of_another_epoch = heard._replace(epoch=2)
    older = bytearray(heard.raw)
    older[8 * SHAPE.layers + 16] ^= 1  # the engine's age
    changed = heard._replace(parts=(np.frombuffer(older, np.uint8),))
    for frame, challenge in ((heard, other), (heard, b""), (of_another_epoch, CHALLENGE), (changed, CHALLENGE)):
        answer = core.handle(frame, challenge=challenge)
        assert answer is not None
        assert answer.counts[0] == ErrorCode.REFUSED
    assert core.epoch == 1
    for key, nonce in ((KEY, bytes(31) + b"1"), (bytes(32), bytes(32))):
        with pytest.raises(FrameError, match="does not have the worker's key"):
            read_welcome(received(welcome), key=key, nonce=nonce)


def test_kv_of_an_earlier_incarnation_is_refused_and_that_of_a_later_one_takes_its_place() -> None:
    device = InprocWorker("w0", PAGES).join(SHAPE)
    kv = torch.zeros(1, SHAPE.layers, 3, SHAPE.head_dim)
    for incarnation in (0, 1):
        device.adopt(7, incarnation, [0], 0, kv, kv)
    assert device.ping() == (PAGES - 1, 1)
    device.adopt(7, 0, [1], 0, kv, kv)
    with pytest.raises(UnknownSequenceError, match="request 7 is at incarnation 1, 0 is void"):
        device.export(7, 1, [0], 0, 3)
    assert device.ping() == (PAGES - 1, 1)
