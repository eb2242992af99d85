"""Where attention workers were met, and how those that were lost are met again: by an engine, or a stage process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from hetis.runtime.kv.errors import DeviceError, UnreachedDeviceError
from hetis.runtime.kv.shape import KvShape
from hetis.runtime.launch.returning import Returning
from hetis.runtime.transport.connecting import Endpoint, look_up
from hetis.runtime.transport.errors import ChannelError
from hetis.runtime.worker.joining import join
from hetis.runtime.worker.remote import RemoteDevice

_log = logging.getLogger(__name__)
_LOOK_S = 0.5  # what a worker has said is there already
_AGAIN_S = 1.0  # between attempts of which the worker knows nothing


class Meetings:
    """The workers that one engine has met.

    Attributes:
        returning: those that were lost and are looked for.
    """

    def __init__(self, store: Callable[[], Any], *, timeout_s: float) -> None:
        """``store`` is where workers say where they are; asked by other threads too. ``timeout_s``: until a silent
        worker is lost."""
        self._store, self._timeout_s = store, timeout_s
        self._met: dict[str, Endpoint] = {}  # of a worker that is being reached again, that attempt's
        self._said: dict[str, str] = {}  # why a worker is not back, in the log: once for as long as it is the same
        self.returning = Returning()

    def has_met(self, name: str) -> bool:
        return name in self._met

    def join(self, name: str, endpoint: Endpoint, shape: KvShape, *, epoch: int) -> RemoteDevice:
        """As `hetis.runtime.worker.joining.join`."""
        self._met[name] = endpoint
        return join(name, endpoint, shape, epoch=epoch, timeout_s=self._timeout_s)

    def back(self, name: str, shape: KvShape, *, epoch: int, num_pages: int) -> RemoteDevice | None:
        """A worker that was lost, with nothing in it, once it is there again, with as many pages; None: not yet.

        It waits for nobody: a thread reaches the worker meanwhile, and a later call returns it. The log says why not.
        """
        if name not in self._met:
            return None
        try:
            device = self.returning.ask(name, lambda: self._reach(name, shape, epoch))
        except (ChannelError, DeviceError) as error:
            if self._said.get(name) != str(error):
                self._said[name] = str(error)
                _log.info("%s is not back: %s", name, error)
            return None
        if device is None:
            return None
        if device.num_pages != num_pages:
            _log.warning("%s is back with %d pages, had %d: not taken", name, device.num_pages, num_pages)
            device.close()
            return None
        self._said.pop(name, None)
        _log.info("%s is back", name)
        return device

    def end(self) -> None:
        """The engine has ended: who is reached from now on is let go at once."""
        self.returning.close()
        self.returning = Returning()

    def _reach(self, name: str, shape: KvShape, epoch: int) -> RemoteDevice | None:
        endpoint, before = look_up(self._store(), name, timeout_s=_LOOK_S), self._met[name]
        if endpoint == before:
            return None  # it is still gone: one that is started again, or cut off and free, says so
        try:
            return self.join(name, endpoint, shape, epoch=epoch)
        except UnreachedDeviceError:
            self._met[name] = before  # it has nothing new to say, and is tried again all the same
            time.sleep(_AGAIN_S)  # in a thread of its own
            raise
