"""Bytes through memory that two processes of one host share: a ring each way, and a futex each way for who sleeps.

Whoever waits says that it sleeps, and is woken by Linux's futex, which needs nothing but the counter that it waits for:
a fraction of what a wake-up by a socket or a pipe costs. Where the last wait was short it first looks again and again,
giving the processor away in between. The TCP connection that the memory was agreed on over stays: it tells when the
other end dies, which memory does not.

The memory is a file in /dev/shm that has no name any more once both ends have it, so that nothing is left of processes
that are killed later. (`multiprocessing.shared_memory` would keep the name, and its tracker would remove what others
use.)

Counters are published after what they count. On x86-64 stores are seen in their order; elsewhere this pipe is refused.
A store and a later load are not: that one says that it sleeps may cross with the other's last look at that. Hence no
sleep is long.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hetis.runtime.transport.errors import ChannelClosedError, ChannelStalledError, FrameError
from hetis.runtime.transport.tcp import TcpPipe

FOLDER = Path("/dev/shm")
PREFIX = "hetis-"
RING_BYTES = 4 << 20
# A wake-up costs both ends together about so much of a processor: whoever looks for longer takes more than it saves.
LOOK_S = 30e-6
SHORT_S = 1e-4  # after a wait of less, sleep included, looking may be of use
NAP_S = 0.02  # longest sleep without another look: what a missed wake-up costs, and how much later a death is known
# Numbers of one ring, each of 8 bytes in a cache line of its own: two counters, and whether somebody sleeps until they
# change.
WRITTEN, READ, SLEEPS = 0, 8, 16
RING_WORDS = 32
CONTROL_BYTES = 2 * RING_WORDS * 8
_FUTEX, _WAIT, _WAKE = 202, 0, 1  # of Linux on x86-64: the call, and what it does


def is_supported() -> bool:
    """Return whether processes of this host can talk so."""
    return platform.machine() in ("x86_64", "AMD64") and FOLDER.is_dir() and _has_futex()


class SharedFile:
    """Memory for one connection; the engine's end makes it, the worker's opens it.

    Attributes:
        memory: the rings and their counters.
    """

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path, self.memory = path, memory

    @classmethod
    def create(cls, ring_bytes: int = RING_BYTES) -> SharedFile:
        """Raises OSError: there is no room for it, or this process may open no more files."""
        path, num_bytes = FOLDER / f"{PREFIX}{secrets.token_hex(16)}", CONTROL_BYTES + 2 * ring_bytes
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Not only the size: a folder that is full when a page is first written ends the process by SIGBUS.
            os.posix_fallocate(handle, 0, num_bytes)
            return cls(path, mmap.mmap(handle, num_bytes))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)

    @classmethod
    def open(cls, path: Path) -> SharedFile:
        """Raises FrameError: it is none that `create` has made, another user's, or such memory does not work here."""
        if path.parent != FOLDER or not path.name.startswith(PREFIX):
            raise FrameError(f"{path} is no shared memory of ours")
        if not is_supported():
            raise FrameError(f"{path}: shared memory needs Linux on x86-64, and its futex")
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                found = os.fstat(handle)
                if found.st_uid != os.geteuid() or found.st_size <= CONTROL_BYTES:
                    raise FrameError(f"{path}: it belongs to user {found.st_uid} and has {found.st_size} bytes")
                return cls(path, mmap.mmap(handle, found.st_size))
            finally:
                os.close(handle)
        except OSError as error:
            raise FrameError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise FrameError(f"{str(path)!r}: {error}") from error

    def unlink(self) -> None:
        """Takes its name away, so that nothing is left when both ends have ended; it goes with who sees it."""
        self.path.unlink(missing_ok=True)


class ShmPipe:
    """One end. ``first`` is true at one of the two ends."""

    def __init__(self, shared: SharedFile, connection: TcpPipe, *, first: bool) -> None:
        self.name = f"shm over {connection.name}"
        self._connection = connection
        self._shared = shared
        # Plain views of the memory: for a few numbers and some thousand bytes numpy's arrays cost more than the copy.
        everything = memoryview(shared.memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared.memory))
        size, half = (len(everything) - CONTROL_BYTES) // 2, CONTROL_BYTES // 2
        rings = [
            _Ring(
                everything[i * half : (i + 1) * half].cast("q"),
                address + i * half,
                everything[CONTROL_BYTES + i * size : CONTROL_BYTES + (i + 1) * size],
            )
            for i in range(2)
        ]
        self._out, self._in = rings if first else rings[::-1]
        self._looks = True

    def write(self, buffers: Sequence[memoryview], timeout_s: float) -> None:
        ring = self._out
        for buffer in buffers:
            left = buffer[ring.put(buffer) :]
            while left:
                ring.publish()
                if not self._wait(ring, READ, ring.has_space, timeout_s):
                    raise ChannelStalledError(f"{self.name}: the other end took nothing for too long")
                left = left[ring.put(left) :]
        ring.publish()

    def read_into(self, buffer: memoryview, timeout_s: float) -> int:
        ring = self._in
        if not ring.has_bytes() and not self._wait(ring, WRITTEN, ring.has_bytes, timeout_s):
            return 0
        return ring.take(buffer)

    def close(self) -> None:
        self._shared.unlink()
        self._connection.close()

    def _wait(self, ring: _Ring, counter: int, is_there: Callable[[], bool], timeout_s: float) -> bool:
        """Until it is there, which ``counter`` tells. A sleep that has begun may end later than the time-out."""
        words = ring.words
        begun_s = now_s = time.monotonic()
        if self._looks:
            while now_s < begun_s + LOOK_S:
                if is_there():
                    return True
                os.sched_yield()
                now_s = time.monotonic()
        words[counter + SLEEPS] = 1
        try:
            while True:
                seen = words[counter]
                if is_there():
                    return True
                if now_s >= begun_s + timeout_s:
                    return False
                ring.sleep(counter, seen)
                now_s = time.monotonic()
                if words[counter] == seen:
                    self._check_connection(is_there)
        finally:
            words[counter + SLEEPS] = 0
            self._looks = now_s - begun_s < SHORT_S

    def _check_connection(self, is_there: Callable[[], bool]) -> None:
        """An end that is gone may have left something to read. Raises ChannelError."""
        try:
            came = self._connection.read_into(memoryview(bytearray(1)), 0.0)
        except ChannelClosedError:
            if not is_there():
                raise
        else:
            if came:
                raise FrameError(f"{self.name}: something was said beside the shared memory")


class _Ring:
    """Bytes one way. Counters only rise; the difference is what is in the ring."""

    def __init__(self, words: memoryview, address: int, room: memoryview) -> None:
        """``words`` are the counters, of 8 bytes each, at ``address``; ``room`` is of bytes."""
        self.words, self._address, self._room, self._size = words, address, room, len(room)
        self._written = words[WRITTEN]  # what is put but not yet published

    def has_bytes(self) -> bool:
        written: int = self.words[WRITTEN]
        return written > self.words[READ]

    def has_space(self) -> bool:
        return self._written - self.words[READ] < self._size

    def put(self, data: memoryview) -> int:
        """Copies what there is room for; returns how much."""
        size = self._size
        takes = min(len(data), size - (self._written - self.words[READ]))
        begin = self._written % size
        first = min(takes, size - begin)
        self._room[begin : begin + first] = data[:first]
        if first < takes:
            self._room[: takes - first] = data[first:takes]
        self._written += takes
        return takes

    def publish(self) -> None:
        self.words[WRITTEN] = self._written
        if self.words[WRITTEN + SLEEPS]:
            self._wake(WRITTEN)

    def take(self, into: memoryview) -> int:
        size, at = self._size, self.words[READ]
        takes = min(len(into), self.words[WRITTEN] - at)
        if not 0 < takes <= size:
            raise FrameError(f"the shared ring's counters are {takes} bytes apart")
        begin = at % size
        first = min(takes, size - begin)
        into[:first] = self._room[begin : begin + first]
        if first < takes:
            into[first:takes] = self._room[: takes - first]
        self.words[READ] = at + takes
        if self.words[READ + SLEEPS]:
            self._wake(READ)
        return takes

    def sleep(self, counter: int, seen: int) -> None:
        """Until a counter is changed by the other end, but not long; not at all where it is not as it was ``seen``."""
        _syscall(_FUTEX, self._address + 8 * counter, _WAIT, seen & 0xFFFF_FFFF, _NAP)

    def _wake(self, counter: int) -> None:
        _syscall(_FUTEX, self._address + 8 * counter, _WAKE, 1, None)


def _has_futex() -> bool:
    """False: a sandbox refuses the call, and whoever waits would not sleep."""
    word = ctypes.c_uint32(0)
    woken: int = _syscall(_FUTEX, ctypes.addressof(word), _WAKE, 1, None)
    return woken == 0


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_NAP = ctypes.byref(_Timespec(0, round(NAP_S * 1e9)))
_syscall = ctypes.CDLL(None).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
_syscall.restype = ctypes.c_long
