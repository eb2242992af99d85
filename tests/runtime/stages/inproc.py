"""A stage process without a process: its core behind a channel, which runs while the engine waits."""

from __future__ import annotations

from pathlib import Path

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.local import LocalDevice
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.layout import DevicePages, StageLayout
from hetis.runtime.model.config import read_config
from hetis.runtime.stages.core import StageCore
from hetis.runtime.stages.remote import RemoteStage
from hetis.runtime.stages.setup import StageBuilder, StageSetup
from hetis.runtime.transport.channel import PipeChannel
from hetis.runtime.transport.errors import ChannelError
from hetis.runtime.transport.frames import Kind
from hetis.runtime.transport.inproc import InprocPipe

KEY = bytes(range(16))


def setup_of(layers: range, *, ranks: int = 1, pages: tuple[int, ...] = (400,), name: str = "s") -> StageSetup:
    """A stage in float32 whose devices, ``name`` and a number, are all of its process."""
    devices = tuple(DevicePages(name=f"{name}{i}", pages=count) for i, count in enumerate(pages))
    stage = StageLayout(layers=layers, ranks=ranks, devices=devices)
    return StageSetup(stage=stage, workers=(), dtype="float32", page_tokens=16, max_tokens=None)


class InprocStage:
    """One stage process. ``catch_up`` does what it was told and owes no answer for; ``is_running`` False: it hangs.

    Its attention workers are devices of its own; ``back_pages``: of those that were lost and are back, by name.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.core = StageCore(name, StageBuilder(folder, self._join), self, key=KEY)
        self.back_pages: dict[str, int] = {}
        self.num_ended = 0
        self.is_running = True
        self.pipe: InprocPipe | None = None
        self.catch_up = lambda: None
        self._folder = folder

    def meet(self, setup: StageSetup, *, epoch: int = 1, key: bytes = KEY) -> RemoteStage:
        """An engine's connection to it."""
        ours, self.pipe = InprocPipe.pair(self.core.name)
        channel, pipe = PipeChannel(self.pipe), self.pipe
        ours.idle = self.catch_up = lambda: self._run(channel, pipe)
        config = read_config(self._folder)
        return RemoteStage(self.core.name, setup, config, PipeChannel(ours), epoch=epoch, key=key)

    def back(self, name: str, shape: KvShape, *, epoch: int, num_pages: int) -> AttentionDevice | None:
        pages = self.back_pages.get(name)
        return None if pages is None else LocalDevice(name, shape, pages)

    def end(self) -> None:
        self.num_ended += 1

    def _run(self, channel: PipeChannel, pipe: InprocPipe) -> None:
        while self.is_running and not pipe.is_closed:
            try:
                frame = channel.receive(0)
                if frame is None:
                    return
                if frame.kind is Kind.BYE:
                    raise ChannelError("it said goodbye")
                answer = self.core.handle(frame)
                if answer is not None:
                    channel.send([answer])
            except ChannelError:
                channel.close()
                self.core.leave()

    def _join(self, name: str, shape: KvShape, epoch: int) -> AttentionDevice:
        return LocalDevice(name, shape, 100)
