"""The attention workers of one rank: connected at the start, lost on the first failure, then joined again."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from hetis.runtime.attention.device import AttentionDevice
from hetis.runtime.attention.kv import DeviceError
from hetis.runtime.transport.keys import InvalidKeyError

_log = logging.getLogger(__name__)
AGAIN_S = 1.0  # interval between attempts to join a worker

Join = Callable[[int], AttentionDevice]


class ConnectedWorkers:
    """Workers by their number among the devices, from 1 on; number 0 is the rank itself."""

    def __init__(
        self, names: Sequence[str], join: Join, *, epoch: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``join`` connects to the worker with a number; it may take its whole time-out, and raise DeviceError."""
        self.names, self.epoch = tuple(names), epoch
        self._join, self._clock = join, clock
        self._devices: dict[int, AttentionDevice] = {}
        self._joining: set[int] = set()
        self._again_s: dict[int, float] = {}
        self._told: dict[int, str] = {}  # the last reason why a worker could not be joined, as logged
        self._came: SimpleQueue[tuple[int, AttentionDevice | Exception]] = SimpleQueue()
        for number in range(1, len(self.names) + 1):
            try:
                self._devices[number] = join(number)
            except DeviceError as error:
                _log.warning("attention worker %s is not there yet: %s", self._name(number), error)
                self._told[number] = str(error)
                self._again_s[number] = clock() + AGAIN_S

    def get(self, number: int) -> AttentionDevice | None:
        """Return a worker, or None if it is lost or was never there."""
        return self._devices.get(number)

    @property
    def present(self) -> tuple[int, ...]:
        """The numbers of the workers that are there."""
        return tuple(sorted(self._devices))

    def number(self, name: str) -> int:
        """Return the number of a worker by its name."""
        return self.names.index(name) + 1

    def lose(self, number: int, error: Exception) -> bool:
        """Drop a worker that failed, and return whether it was there until now."""
        device = self._devices.pop(number, None)
        if device is None:
            return False
        _log.warning("attention worker %s is lost: %s", self._name(number), error)
        _close(device)
        self._again_s[number] = self._clock() + AGAIN_S
        return True

    def close(self) -> None:
        """Disconnect from all workers, which then drop what they hold."""
        for device in self._devices.values():
            _close(device)
        self._devices.clear()

    def advance(self) -> tuple[int, ...]:
        """Begin to join missing workers, between two steps, and return the numbers of those that are back."""
        back = []
        while not self._came.empty():
            number, came = self._came.get_nowait()
            self._joining.discard(number)
            if isinstance(came, Exception):
                self._again_s[number] = self._clock() + AGAIN_S
                self._tell_once(number, came)
            else:
                _log.info("attention worker %s is back", self._name(number))
                self._devices[number] = came
                self._told.pop(number, None)
                back.append(number)
        now_s = self._clock()
        for number, again_s in list(self._again_s.items()):
            if again_s <= now_s and number not in self._joining and number not in self._devices:
                del self._again_s[number]
                self._joining.add(number)
                name = f"join-{self._name(number)}"
                threading.Thread(target=self._try, args=(number,), name=name, daemon=True).start()
        return tuple(back)

    def _tell_once(self, number: int, error: Exception) -> None:
        """Log why a worker is not back, once for every reason."""
        if self._told.get(number) == str(error):
            return
        self._told[number] = str(error)
        is_expected = isinstance(error, DeviceError | InvalidKeyError | OSError)
        _log.warning(
            "attention worker %s cannot be joined: %s",
            self._name(number),
            error,
            exc_info=None if is_expected else error,
        )

    def _name(self, number: int) -> str:
        return self.names[number - 1]

    def _try(self, number: int) -> None:
        try:
            self._came.put((number, self._join(number)))
        except Exception as error:  # retry, whatever the error is
            self._came.put((number, error))


def _close(device: AttentionDevice) -> None:
    close: Callable[[], None] | None = getattr(device, "close", None)
    if close is not None:
        close()
