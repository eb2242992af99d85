"""A stage in a process of its own as the engine sees it: a `PipelineStage` behind a channel."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hetis.runtime.attention.device import AttentionDevice, IntArray
from hetis.runtime.engine.step import Step
from hetis.runtime.kv.errors import DeviceError, DeviceLostError, StaleEpochError
from hetis.runtime.kv.shape import KvShape, SequenceKey
from hetis.runtime.model.config import ModelConfig
from hetis.runtime.stages.messages import pack_run, pack_setup, read_numbers, read_output
from hetis.runtime.stages.setup import StageSetup
from hetis.runtime.transport.channel import Channel
from hetis.runtime.transport.errors import ChannelError, FrameError
from hetis.runtime.transport.frames import Frame, Kind
from hetis.runtime.transport.messages import ErrorCode, Part, pack_keys, read_digests, read_error, read_kv
from hetis.runtime.transport.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDevice:
    """A device of a stage that is elsewhere."""

    name: str
    shape: KvShape
    num_pages: int


class RemoteStage:
    """One stage process, over one channel, for as long as that lives.

    Where it is lost, every call raises `DeviceLostError` of its first rank: the engine cannot go on without it.

    Attributes:
        name: of the process.
    """

    def __init__(
        self,
        name: str,
        setup: StageSetup,
        config: ModelConfig,
        channel: Channel,
        *,
        epoch: int,
        key: bytes,
        timeout_s: float = 120.0,
        load_s: float = 600.0,
    ) -> None:
        """Tells the process what to be, and waits until it has read its weights, ``load_s`` at most.

        ``timeout_s``: a process that owes an answer for so long is lost.

        Raises:
            DeviceError: it does not answer, or cannot be what it is told.
            StaleEpochError: it obeys a later engine.
        """
        self.name = name
        self.layers, self.shape, self.num_ranks = setup.stage.layers, setup.shape(config), setup.stage.ranks
        each = max(config.kv_heads, self.num_ranks) // self.num_ranks
        self.homes = tuple(rank for rank in range(self.num_ranks) for _ in range(each))
        self._first = setup.stage.devices[0].name
        self._channel, self._session, self._timeout_s = channel, Session(epoch), timeout_s
        self._is_lost = False
        answer = self._ask(self._session.frame(Kind.SETUP, parts=pack_setup(setup, key)), wait_s=load_s)
        pages = read_numbers(answer, len(setup.stage.devices))
        self.devices = [
            StageDevice(name=device.name, shape=self.shape, num_pages=count)
            for device, count in zip(setup.stage.devices, pages, strict=True)
        ]

    def run(self, step: Step, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """As `PipelineStage.run`.

        Raises:
            DeviceLostError: of the stage's attention worker that was lost, or of its first rank.
        """
        dtype = "" if hidden is None else self.shape.dtype
        with torch.inference_mode():
            parts = pack_run(step, hidden)
            answer = self._ask(self._session.frame(Kind.RUN, step=step.number, dtype=dtype, parts=parts))
            try:
                return read_output(answer, self.shape.torch_dtype)
            except FrameError as error:
                raise self._lose(error) from error

    def forget_prompt(self, request: int, incarnation: int) -> None:
        """The prompt's KV there is not needed any more."""
        numbers = torch.tensor([request, incarnation], dtype=torch.int64)
        self._tell(self._session.frame(Kind.FORGET, parts=(numbers,)))

    def drop(self, device: int, keys: Sequence[SequenceKey]) -> None:
        """Frees sequences on one of the stage's devices."""
        if keys:
            counts = len(keys), 0, 0
            self._tell(self._session.frame(Kind.DROP, layer=device, counts=counts, parts=(pack_keys(keys),)))

    def copy(
        self, source: int, target: int, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> None:
        """Copies KV of positions ``first`` to ``last - 1`` from one device of the stage to another."""
        numbers = torch.tensor([source, target, request, incarnation, first, last, *heads], dtype=torch.int64)
        self._ask(self._session.frame(Kind.COPY, parts=(numbers,)))

    def export(
        self, device: int, request: int, incarnation: int, heads: Sequence[int], first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `AttentionDevice.export` of one of the stage's devices."""
        part = Part(request, incarnation, first, last, tuple(heads))
        counts, parts = (len(heads), 0, 0), (part.numbers(),)
        answer = self._ask(self._session.frame(Kind.EXPORT, layer=device, counts=counts, parts=parts))
        try:
            return read_kv(answer, self.shape, part)
        except FrameError as error:
            raise self._lose(error) from error

    def adopt(
        self,
        device: int,
        request: int,
        incarnation: int,
        heads: Sequence[int],
        first: int,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        """As `AttentionDevice.adopt` of one of the stage's devices, without waiting for it."""
        positions = k.shape[2]
        part = Part(request, incarnation, first, first + positions, tuple(heads))
        counts, parts = (len(heads), positions, 0), (part.numbers(), k, v)
        dtype = self.shape.dtype
        self._tell(self._session.frame(Kind.ADOPT, layer=device, counts=counts, dtype=dtype, parts=parts))

    def digest(self, device: int, request: int, incarnation: int, heads: Sequence[int], last: int) -> IntArray:
        """As `AttentionDevice.digest` of one of the stage's devices."""
        part = Part(request, incarnation, 0, last, tuple(heads))
        counts = len(heads), 0, 0
        answer = self._ask(self._session.frame(Kind.DIGEST, layer=device, counts=counts, parts=(part.numbers(),)))
        return read_digests(answer, self.shape, part)

    def replace_device(self, index: int, device: AttentionDevice) -> None:
        """Raises DeviceError: the stage process's devices are its own."""
        raise DeviceError(device.name, f"the devices of stage {self.name} are its own")

    def rejoin(self, index: int) -> bool:
        """Whether the process has found an attention worker again that it had lost."""
        return self._ask(self._session.frame(Kind.REJOIN, layer=index)).kind is Kind.WELCOME

    def close(self) -> None:
        """Says goodbye; the process waits for the next engine."""
        if not self._is_lost:
            self._is_lost = True
            with contextlib.suppress(ChannelError):  # it is gone already, which is as good
                self._channel.send([self._session.frame(Kind.BYE)])
            self._channel.close()

    # --- inside

    def _tell(self, frame: Frame) -> None:
        """Sends a frame that has no answer; to a stage that was lost there is nothing to say."""
        if not self._is_lost:
            self._send(frame)

    def _ask(self, frame: Frame, *, wait_s: float | None = None) -> Frame:
        """Sends a frame, and waits for its answer."""
        if self._is_lost:
            raise DeviceLostError(self._first, f"stage {self.name} was lost")
        self._send(frame)
        wait_s = self._timeout_s if wait_s is None else wait_s
        try:
            answer = self._channel.receive(wait_s)
            if answer is None:
                raise self._lose(f"no answer within {wait_s:g} s")
            if not self._session.has(answer) or answer.serial != frame.serial:
                raise FrameError(f"an answer of epoch {answer.epoch}, which is not of this question")
        except ChannelError as error:
            raise self._lose(error) from error
        if answer.kind is Kind.ERROR:
            raise self._error(answer)
        return answer

    def _send(self, frame: Frame) -> None:
        try:
            self._channel.send([frame])
        except ChannelError as error:
            raise self._lose(error) from error

    def _error(self, frame: Frame) -> DeviceError:
        needed, free, text = read_error(frame)
        match frame.counts[0]:
            case ErrorCode.DEVICE_LOST:
                return DeviceLostError(text, f"stage {self.name} lost it")
            case ErrorCode.STALE_EPOCH:
                self._lose(text)
                return StaleEpochError(self.name, epoch=needed, current=free)
        return self._lose(text)

    def _lose(self, why: object) -> DeviceLostError:
        self._is_lost = True
        self._channel.close()
        return DeviceLostError(self._first, f"stage {self.name}: {why}")
