"""A stage process without sockets: frames in, frames out.

It obeys one engine at a time, as an attention worker does: a SETUP of an epoch that is not below the newest begins
with nothing, and frames of another connection are refused. What has no answer (DROP, FORGET, ADOPT) cannot fail in a
way that counts: a device that is lost, or does not hold what it should, shows in the next step with heads there.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

import torch

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.engine.stage import Stage
from hetis.runtime.kv.errors import DeviceError, DeviceLostError
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.stages.messages import read_numbers, read_run, read_setup
from hetis.runtime.stages.setup import StageSetup
from hetis.runtime.transport.errors import FrameError
from hetis.runtime.transport.frames import Frame, Kind
from hetis.runtime.transport.messages import ErrorCode, error_answer, read_adopted, read_keys, read_part, stale_answer
from hetis.runtime.worker.remote import RemoteDevice

Build = Callable[[StageSetup, int], Stage]
_log = logging.getLogger(__name__)


class StageWorkers(Protocol):
    """Attention workers in processes of their own; `Meetings` where there are such."""

    def back(self, name: str, shape: KvShape, *, epoch: int, num_pages: int) -> AttentionDevice | None:
        """One that was lost, once it is there again, with nothing in it; waits for nobody. None: not yet."""

    def end(self) -> None:
        """The engine has ended."""


class StageCore:
    """The state of one stage process.

    Attributes:
        epoch: newest that it has obeyed.
        stage: what it is now; None before the first SETUP.
    """

    def __init__(self, name: str, build: Build, workers: StageWorkers, *, key: bytes) -> None:
        """``build`` joins the ``workers``, and they are found again when they are lost."""
        self.name = name
        self.epoch = 0
        self.stage: Stage | None = None
        self._build, self._workers, self._key = build, workers, key
        self._session = 0
        self._dtype = ""

    def handle(self, frame: Frame) -> Frame | None:
        """What one frame does; returns the answer, where the kind has one.

        Raises:
            FrameError: the frame does not fit: the connection is to be closed, and what it left is void.
        """
        is_answered = frame.kind in _ANSWERED
        try:
            if frame.kind is Kind.SETUP:
                return self._set_up(frame)
            if (frame.epoch, frame.session) != (self.epoch, self._session):
                return self._stale(frame) if is_answered else None
            assert self.stage is not None, "a session has a stage"
            return self._obey(frame, self.stage)
        except FrameError:
            raise
        except DeviceLostError as error:
            return error_answer(frame, ErrorCode.DEVICE_LOST, error.device) if is_answered else None
        except Exception as error:
            if not isinstance(error, DeviceError):
                _log.exception("%s: %s failed", self.name, frame.kind.name)
            return error_answer(frame, ErrorCode.FAILED, f"{type(error).__name__}: {error}") if is_answered else None

    def leave(self) -> None:
        """The connection ended: what it left is void."""
        self._session = 0
        self._workers.end()
        stage, self.stage = self.stage, None
        for device in stage.devices if stage is not None else ():
            if isinstance(device, RemoteDevice):
                _close(device)

    # --- inside

    def _set_up(self, frame: Frame) -> Frame:
        setup, key = read_setup(frame)
        if key != self._key:
            return error_answer(frame, ErrorCode.REFUSED, f"{self.name}: the key is another process's, or an old one")
        if frame.epoch < self.epoch:
            return self._stale(frame)
        self.leave()
        self.epoch = frame.epoch
        try:
            self.stage = self._build(setup, frame.epoch)
        except DeviceError as error:  # an attention worker that did not come is no device that was lost
            return error_answer(frame, ErrorCode.FAILED, str(error))
        self._session, self._dtype = frame.session, setup.dtype
        pages = torch.tensor([device.num_pages for device in self.stage.devices], dtype=torch.int64)
        return frame.answered(Kind.WELCOME, parts=(pages,))

    def _obey(self, frame: Frame, stage: Stage) -> Frame | None:
        match frame.kind:
            case Kind.RUN:
                step, hidden = read_run(frame, self._dtype)
                out = stage.run(step, hidden)
                if out.dtype is torch.int64:
                    return frame.answered(Kind.TOKENS, counts=(len(out), 0, 0), parts=(out,))
                counts = out.shape[0], out.shape[1], 0
                return frame.answered(Kind.HIDDEN, counts=counts, dtype=self._dtype, parts=(out,))
            case Kind.DROP:
                stage.drop(frame.layer, read_keys(frame))
            case Kind.FORGET:
                request, incarnation = read_numbers(frame, 2)
                stage.forget_prompt(request, incarnation)
            case Kind.COPY:
                source, target, request, incarnation, first, last, *heads = read_numbers(frame, 6)
                stage.copy(source, target, request, incarnation, heads, first, last)
                return frame.answered(Kind.DONE)
            case Kind.EXPORT:
                part = read_part(frame)
                k, v = stage.export(frame.layer, part.request, part.incarnation, part.heads, part.first, part.last)
                counts = len(part.heads), part.last - part.first, 0
                return frame.answered(Kind.KV, counts=counts, dtype=self._dtype, parts=(k, v))
            case Kind.ADOPT:
                part, k, v = read_adopted(frame, stage.shape)
                stage.adopt(frame.layer, part.request, part.incarnation, part.heads, part.first, k, v)
            case Kind.DIGEST:
                part = read_part(frame)
                sums = stage.digest(frame.layer, part.request, part.incarnation, part.heads, part.last)
                return frame.answered(Kind.DIGESTS, counts=(len(sums), 0, 0), parts=(torch.from_numpy(sums),))
            case Kind.REJOIN:
                return self._rejoin(frame, stage)
            case _:
                raise FrameError(f"{frame.kind.name} is not for a stage")
        return None

    def _rejoin(self, frame: Frame, stage: Stage) -> Frame:
        """The engine has given up what the lost device held, and sends nothing there before it is answered."""
        if frame.layer >= len(stage.devices):
            raise FrameError(f"REJOIN of device {frame.layer}, the stage has {len(stage.devices)}")
        lost = stage.devices[frame.layer]
        back = self._workers.back(lost.name, stage.shape, epoch=self.epoch, num_pages=lost.num_pages)
        if back is None:
            return frame.answered(Kind.DONE)
        if isinstance(lost, RemoteDevice):
            _close(lost)
        stage.replace_device(frame.layer, back)
        return frame.answered(Kind.WELCOME, parts=(torch.tensor([back.num_pages], dtype=torch.int64),))

    def _stale(self, frame: Frame) -> Frame:
        return stale_answer(frame, self.name, current=self.epoch)


def _close(device: RemoteDevice) -> None:
    with contextlib.suppress(DeviceError):
        device.close()


_ANSWERED = frozenset({Kind.SETUP, Kind.RUN, Kind.COPY, Kind.DIGEST, Kind.EXPORT, Kind.REJOIN})
