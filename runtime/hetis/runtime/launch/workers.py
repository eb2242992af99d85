"""Attention workers and stages in processes of their own: the store where they say where they are; who meets them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.heads import StageHeads
from hetis.runtime.kv.errors import StaleEpochError
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.meetings import Meetings
from hetis.runtime.model.config import ModelConfig
from hetis.runtime.stages.remote import RemoteStage
from hetis.runtime.stages.setup import StageSetup
from hetis.runtime.transport.connecting import Endpoint, connect, look_up, open_store
from hetis.runtime.worker.remote import RemoteDevice
from hetis.solver.dispatch.snapshot import DeviceStatus

T = TypeVar("T")
_log = logging.getLogger(__name__)


class Workers:
    """The workers of one engine.

    Attributes:
        names: of all of them.
        epoch: of the engine: what an earlier one says, the workers refuse. Settled when all have come.
        meetings: with those of the stages in this process.
    """

    def __init__(self, store: str, names: Sequence[str], *, epoch: int, timeout_s: float, start_s: float) -> None:
        """Opens the store at ``host:port``. ``start_s``: until a worker has come; ``timeout_s``: until a silent one is
        lost.

        Raises:
            ChannelError: the address cannot be used.
        """
        opened: Any = open_store(store, is_master=True, timeout_s=timeout_s)
        self._store = opened
        self.names, self.epoch = tuple(names), epoch
        self._timeout_s, self._start_s = timeout_s, start_s
        self.meetings = Meetings(lambda: opened, timeout_s=timeout_s)
        self._asked: dict[tuple[int, int], Future[bool]] = {}  # of stage processes: whether a worker of theirs is back

    def wait_for(self, name: str, shape: KvShape) -> RemoteDevice:
        """The worker of that name, with nothing in it.

        Raises:
            ChannelError: it did not come.
            DeviceError: it does not answer.
        """
        return self._meet(name, lambda endpoint: self._join(name, endpoint, shape))

    def stage(self, name: str, setup: StageSetup, config: ModelConfig) -> RemoteStage:
        """The stage process of that name, as it is told to be.

        Raises:
            ChannelError: it did not come, or is not reached.
            DeviceError: it does not answer, or cannot be what it is told.
        """

        def greet(endpoint: Endpoint) -> RemoteStage:
            channel = connect(endpoint, stall_s=self._timeout_s)
            return RemoteStage(name, setup, config, channel, epoch=self.epoch, key=endpoint.key)

        return self._meet(name, greet)

    def bring_back(self, engine: Engine) -> None:
        """Devices that were lost, and whose workers are there again, take heads again; called between two steps.

        It waits for nobody: workers are reached meanwhile, by us or by the process of their stage, and taken by a later
        call.
        """
        for part in engine.stages:
            for index, device in enumerate(part.stage.devices):
                if part.placement.state.devices[index].status is not DeviceStatus.LOST:
                    continue
                if self.meetings.has_met(device.name):
                    num = device.num_pages
                    back = self.meetings.back(device.name, part.stage.shape, epoch=self.epoch, num_pages=num)
                    if back is not None:
                        engine.restore_device(index, back, stage=part.number)
                else:
                    self._ask_stage(engine, part, index)

    def close(self, engine: Engine) -> None:
        """Lets the workers go; they wait for the next engine."""
        self.meetings.end()
        for device in [device for part in engine.stages for device in part.stage.devices]:
            if isinstance(device, RemoteDevice):
                device.close()

    def _ask_stage(self, engine: Engine, part: StageHeads, index: int) -> None:
        """Its process says in its turn, after the step that it is at; until then it is not asked again."""
        asked = self._asked.get((part.number, index))
        if asked is None:
            self._asked[part.number, index] = part.rejoin(index)
        elif asked.done():
            del self._asked[part.number, index]
            if asked.exception() is None and asked.result():  # else the stage is lost, which its next step tells
                engine.take_back(index, stage=part.number)
                _log.info("%s is back at its stage", part.stage.devices[index].name)

    def _meet(self, name: str, greet: Callable[[Endpoint], T]) -> T:
        """What ``greet`` makes of a process, once that has come.

        Engines count epochs by their clocks. Where the last one's was ahead of ours, we go on from its epoch: it is we
        who start now.
        """
        endpoint = look_up(self._store, name, timeout_s=self._start_s)
        try:
            return greet(endpoint)
        except StaleEpochError as error:
            _log.warning("%s has served an engine of epoch %d, later than %d", name, error.current, self.epoch)
            self.epoch = error.current + 1
        return greet(endpoint)

    def _join(self, name: str, endpoint: Endpoint, shape: KvShape) -> RemoteDevice:
        return self.meetings.join(name, endpoint, shape, epoch=self.epoch)
