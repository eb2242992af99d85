"""Attention workers and stages in processes of their own: the store where they say where they are; who meets them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hetis.runtime.engine.engine import Engine
from hetis.runtime.engine.heads import StageHeads
from hetis.runtime.kv.errors import DeviceError, StaleEpochError, UnreachedDeviceError
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.returning import Returning
from hetis.runtime.model.config import ModelConfig
from hetis.runtime.stages.remote import RemoteStage
from hetis.runtime.stages.setup import StageSetup
from hetis.runtime.transport.connecting import Endpoint, connect, look_up, open_store
from hetis.runtime.transport.errors import ChannelError
from hetis.runtime.worker.joining import join
from hetis.runtime.worker.remote import RemoteDevice
from hetis.solver.dispatch.snapshot import DeviceStatus

T = TypeVar("T")
_log = logging.getLogger(__name__)
_LOOK_S = 0.5  # what a worker has said is there already
_AGAIN_S = 1.0  # between attempts of which the worker knows nothing


class Workers:
    """The workers of one engine.

    Attributes:
        names: of all of them.
        epoch: of the engine: what an earlier one says, the workers refuse. Settled when all have come.
        returning: those that were lost and are looked for.
    """

    def __init__(self, store: str, names: Sequence[str], *, epoch: int, timeout_s: float, start_s: float) -> None:
        """Opens the store at ``host:port``. ``start_s``: until a worker has come; ``timeout_s``: until a silent one is
        lost.

        Raises:
            ChannelError: the address cannot be used.
        """
        self._store: Any = open_store(store, is_master=True, timeout_s=timeout_s)
        self.names, self.epoch = tuple(names), epoch
        self._timeout_s, self._start_s = timeout_s, start_s
        self._met: dict[str, Endpoint] = {}  # of a worker that is being reached again, that attempt's
        self._said: dict[str, str] = {}  # why a worker is not back, in the log: once for as long as it is the same
        self.returning = Returning()

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

        It waits for nobody: workers are reached meanwhile, and taken by a later call.
        """
        for part in engine.stages:
            for index, device in enumerate(part.stage.devices):
                if device.name in self._met and part.placement.state.devices[index].status is DeviceStatus.LOST:
                    self._bring_back(engine, part, index, device.name)

    def close(self, engine: Engine) -> None:
        """Lets the workers go; they wait for the next engine."""
        self.returning.close()
        for device in [device for part in engine.stages for device in part.stage.devices]:
            if isinstance(device, RemoteDevice):
                device.close()

    def _bring_back(self, engine: Engine, part: StageHeads, index: int, name: str) -> None:
        shape = part.stage.shape

        def reach() -> RemoteDevice | None:
            endpoint, before = look_up(self._store, name, timeout_s=_LOOK_S), self._met[name]
            if endpoint == before:
                return None  # it is still gone: one that is started again, or cut off and free, says so
            try:
                return self._join(name, endpoint, shape)
            except UnreachedDeviceError:
                self._met[name] = before  # it has nothing new to say, and is tried again all the same
                time.sleep(_AGAIN_S)  # in a thread of its own
                raise

        try:
            device = self.returning.ask(name, reach)
        except (ChannelError, DeviceError) as error:
            if self._said.get(name) != str(error):
                self._said[name] = str(error)
                _log.info("%s is not back: %s", name, error)
            return
        if device is None:
            return
        lost = part.stage.devices[index]
        if device.num_pages != lost.num_pages:
            _log.warning("%s is back with %d pages, had %d: not taken", name, device.num_pages, lost.num_pages)
            device.close()
            return
        self._said.pop(name, None)
        engine.restore_device(index, device, stage=part.number)
        _log.info("%s is back", name)

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
        self._met[name] = endpoint
        return join(name, endpoint, shape, epoch=self.epoch, timeout_s=self._timeout_s)
