"""A channel that one thread sends on and receives from, for as long as both ends are there."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from hetis.runtime.transport.channel import Channel
from hetis.runtime.transport.errors import ChannelClosedError, ChannelStalledError
from hetis.runtime.transport.frames import Frame

_BUSY_S, _IDLE_S = 0.005, 0.1  # to look at the other side, while frames are expected and while none are


class Outbox:
    """Frames that wait to be sent; filled by any thread, emptied by one."""

    def __init__(self) -> None:
        self._frames: deque[Frame] = deque()
        self._lock = threading.Lock()
        self._came = threading.Event()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """That wait, or are being sent."""
        return self._num_bytes

    def put(self, frame: Frame) -> None:
        with self._lock:
            self._frames.append(frame)
            self._num_bytes += frame.body_bytes
        self._came.set()

    def send(self, channel: Channel) -> bool:
        """Sends a frame if there is one; returns whether there are more. ChannelError.

        One at a time, so that what comes is heard in between: the other end may be waiting to be read.
        """
        if self._frames:
            frame = self._frames[0]
            channel.send([frame])
            with self._lock:
                self._frames.popleft()
                self._num_bytes -= frame.body_bytes
        self._came.clear()
        if self._frames:  # more, or one that came between the two
            self._came.set()
            return True
        return False

    def wait(self, timeout_s: float) -> None:
        """Until something is there, or for so long."""
        self._came.wait(timeout_s)

    def clear(self) -> None:
        with self._lock:
            self._frames.clear()
            self._num_bytes = 0


def talk(
    channel: Channel,
    outbox: Outbox,
    hear: Callable[[Frame], None],
    *,
    is_busy: Callable[[], bool],
    is_full: Callable[[], bool] = lambda: False,
    has_ended: Callable[[], bool],
    ping: Callable[[], Frame] | None = None,
    ping_s: float = 1.0,
    silent_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Sends what ``outbox`` has and hears what comes, until it has ended.

    Args:
        is_busy: frames are expected: nothing waits long.
        is_full: nothing more is taken for now; the other end has to wait.
        ping: what is asked every ``ping_s``, so that silence means something. None: the other end asks.
        silent_s: an end that says nothing for so long is gone.

    Raises:
        ChannelError: the other end is gone.
    """
    heard_s = asked_s = clock()
    while not has_ended():
        has_more = outbox.send(channel)
        now_s = clock()
        if ping is not None and now_s - asked_s >= ping_s:
            asked_s = now_s
            channel.send([ping()])
        if is_full():
            heard_s = now_s
            if not has_more:
                time.sleep(_BUSY_S)
            continue
        if has_more:
            frame = channel.receive(0.0)
        elif is_busy():
            frame = channel.receive(_BUSY_S)
        elif ping is None:
            frame = channel.receive(_IDLE_S)
        else:
            outbox.wait(_IDLE_S)
            frame = channel.receive(0.0)
        if frame is not None:
            heard_s = clock()
            hear(frame)
        elif now_s - heard_s > silent_s:
            raise ChannelStalledError(f"{channel.name}: nothing was said for {silent_s:g} s")
    raise ChannelClosedError(f"{channel.name}: this end has ended")
