"""Pipes: ordered bytes between two processes, over TCP or through memory that they share.

TCP: bytes are sent without delay, and one system call sends, or waits for and reads, anything small.

Incoming bytes are read ahead into a buffer, so that a frame's header and body, and those of the frames behind it,
arrive together. Large bodies are read straight into place.

Shared memory: one ring and one futex for each direction, in memory that two processes of one host share.

The waiting end marks itself asleep and is woken by Linux's futex, which needs only the counter that it waits for: a
fraction of the cost of a wake-up by a socket or a pipe. If the last wait was short, it first polls repeatedly, yielding
the processor in between. The TCP connection over which the memory was agreed stays open: it reveals when the other end
dies, which memory does not.

The memory is a file in /dev/shm that is unlinked once both ends have opened it, so nothing is left of processes that
are killed later. (`multiprocessing.shared_memory` would keep the name, and its tracker would remove memory that others
use.)

Counters are published after what they count. On x86-64 stores become visible in order; on other architectures this
pipe is refused. A store may be reordered with a later load: marking oneself asleep can cross with the other end's last
check of that mark. Therefore no sleep is long.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hetis.runtime.transport.frames import ChannelClosedError, ChannelStalledError, FrameError

BUFFER_BYTES = 2 << 20
AHEAD_BYTES = 1 << 16  # bytes read ahead
MOST_BUFFERS = 256  # limit per call; the kernel accepts 1,024
FINE_S = 0.05  # the kernel counts a read's time-out in ticks of some milliseconds, so shorter ones use poll
LONGEST_S = 1e9
FOLDER = Path("/dev/shm")
PREFIX = "hetis-"
RING_BYTES = 4 << 20
# A wake-up costs both ends together about this much processor time: polling longer costs more than it saves.
LOOK_S = 30e-6
SHORT_S = 1e-4  # after a wait shorter than this, sleep included, polling may pay off
NAP_S = 0.02  # longest sleep without a check: what a missed wake-up costs, and the delay in noticing a death
# Words of one ring, each of 8 bytes in a cache line of its own: two counters and, for each, whether an end sleeps until
# it changes.
WRITTEN, READ, SLEEPS = 0, 8, 16
RING_WORDS = 32
CONTROL_BYTES = 2 * RING_WORDS * 8
_FUTEX, _WAIT, _WAKE = 202, 0, 1  # Linux on x86-64: the system call and its operations


class TcpPipe:
    """One end of a TCP connection."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.name, self._socket = name, connection
        self._ahead = memoryview(bytearray(AHEAD_BYTES))
        self._begin = self._end = 0  # bounds of the unread bytes in it
        self._wait_s = 0.0  # the kernel's time-out for reading; 0: forever
        connection.setblocking(True)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for which in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, which, BUFFER_BYTES)
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connection, select.POLLIN)
        self._writable.register(connection, select.POLLOUT)

    @classmethod
    def connect(cls, host: str, port: int, *, timeout_s: float) -> TcpPipe:
        """Connect. Raises ChannelError if nothing listens there."""
        where = f"tcp:{host}:{port}"
        try:
            connection = socket.create_connection((host, port), timeout=timeout_s)
        except OSError as error:
            raise ChannelClosedError(f"{where}: {error}") from error
        return cls(connection, where)

    @property
    def socket(self) -> socket.socket:
        return self._socket

    @property
    def is_local(self) -> bool:
        """Return whether both ends are on this host."""
        try:
            host: str = self._socket.getpeername()[0]
        except OSError:
            return False  # the other end is gone, as reading will show
        return host.startswith("127.") or host == "::1"

    def write(self, buffers: Sequence[memoryview], timeout_s: float) -> None:
        left = list(buffers)
        deadline_s = None
        while left:
            try:
                sent = self._socket.sendmsg(left[:MOST_BUFFERS], (), socket.MSG_DONTWAIT)
            except BlockingIOError:
                deadline_s = deadline_s or time.monotonic() + timeout_s
                self._wait(deadline_s - time.monotonic())
                continue
            except OSError as error:
                raise ChannelClosedError(f"{self.name}: {error}") from error
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if sent:
                left[0] = left[0][sent:]

    def read_into(self, buffer: memoryview, timeout_s: float) -> int:
        if self._begin == self._end:
            if len(buffer) >= AHEAD_BYTES:
                return self._read(buffer, timeout_s)
            self._begin, self._end = 0, self._read(self._ahead, timeout_s)
        num = min(len(buffer), self._end - self._begin)
        buffer[:num] = self._ahead[self._begin : self._begin + num]
        self._begin += num
        return num

    def close(self) -> None:
        self._socket.close()

    def _read(self, into: memoryview, timeout_s: float) -> int:
        """Read and return the number of bytes, or 0 if none arrived in time. Handling a signal restarts the time-out.

        For long waits the kernel waits within the read: a separate call would cost as much as reading.
        """
        try:
            if timeout_s >= FINE_S:
                if timeout_s != self._wait_s:
                    wait = struct.pack("@ll", *divmod(round(min(timeout_s, LONGEST_S) * 1e6), 1_000_000))
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
                    self._wait_s = timeout_s
                came = self._socket.recv_into(into)
            elif timeout_s <= 0 or self._readable.poll(timeout_s * 1000):
                came = self._socket.recv_into(into, 0, socket.MSG_DONTWAIT)
            else:
                return 0
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ChannelClosedError(f"{self.name}: {error}") from error
        if not came:
            raise ChannelClosedError(f"{self.name}: the other end is gone")
        return came

    def _wait(self, left_s: float) -> None:
        if left_s <= 0 or not self._writable.poll(left_s * 1000):
            raise ChannelStalledError(f"{self.name}: the other end took nothing for too long")


def listen(host: str, port: int = 0) -> socket.socket:
    """Return a socket that accepts connections; port 0 picks any free port. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def is_supported() -> bool:
    """Return whether processes of this host can communicate this way."""
    return platform.machine() in ("x86_64", "AMD64") and FOLDER.is_dir() and _has_futex()


class SharedFile:
    """Memory for one connection, rings and their counters, created by the engine's end and opened by the worker's."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path, self.memory = path, memory

    @classmethod
    def create(cls, ring_bytes: int = RING_BYTES) -> SharedFile:
        """Create the memory. Raises OSError if there is no room for it, or no free file descriptor."""
        path, num_bytes = FOLDER / f"{PREFIX}{secrets.token_hex(16)}", CONTROL_BYTES + 2 * ring_bytes
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # Allocate instead of only setting the size: if the folder is full when a page is first written, SIGBUS ends
            # the process.
            os.posix_fallocate(handle, 0, num_bytes)
            return cls(path, mmap.mmap(handle, num_bytes))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)

    @classmethod
    def open(cls, path: Path) -> SharedFile:
        """Open the memory. Raises FrameError if it is not from `create`, is another user's, or does not work here."""
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
        """Remove the name, so that nothing is left when both ends have ended. Either end may do it."""
        self.path.unlink(missing_ok=True)


class ShmPipe:
    """One end of the pipe. ``first`` is true at exactly one of the two ends."""

    def __init__(self, shared: SharedFile, connection: TcpPipe, *, first: bool) -> None:
        self.name, self._connection, self._shared = f"shm over {connection.name}", connection, shared
        # Plain views of the memory: for a few numbers and some thousand bytes, numpy arrays cost more than the copy.
        everything = memoryview(shared.memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(shared.memory))
        size, half = (len(everything) - CONTROL_BYTES) // 2, CONTROL_BYTES // 2
        words = [everything[i * half : (i + 1) * half].cast("q") for i in range(2)]
        rooms = [everything[CONTROL_BYTES + i * size : CONTROL_BYTES + (i + 1) * size] for i in range(2)]
        rings = [_Ring(words[i], address + i * half, rooms[i]) for i in range(2)]
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
        """Wait until ``is_there``, which ``counter`` signals, and return that. A sleep may outlast the time-out."""
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
        """Raise ChannelError if the other end is gone and has left nothing to read."""
        try:
            came = self._connection.read_into(memoryview(bytearray(1)), 0.0)
        except ChannelClosedError:
            if not is_there():
                raise
        else:
            if came:
                raise FrameError(f"{self.name}: something was said beside the shared memory")


class _Ring:
    """Bytes in one direction. Counters only rise; their difference is the content of the ring."""

    def __init__(self, words: memoryview, address: int, room: memoryview) -> None:
        """Initialise with the counters ``words``, 8 bytes each at ``address``, and the buffer ``room``, in bytes."""
        self.words, self._address, self._room, self._size = words, address, room, len(room)
        self._written = words[WRITTEN]  # written to the ring but not yet published

    def has_bytes(self) -> bool:
        written: int = self.words[WRITTEN]
        return written > self.words[READ]

    def has_space(self) -> bool:
        return self._written - self.words[READ] < self._size

    def put(self, data: memoryview) -> int:
        """Copy as much as fits, and return its length."""
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
        """Sleep until the other end changes a counter, but not for long; not at all if it is no longer ``seen``."""
        _syscall(_FUTEX, self._address + 8 * counter, _WAIT, seen & 0xFFFF_FFFF, _NAP)

    def _wake(self, counter: int) -> None:
        _syscall(_FUTEX, self._address + 8 * counter, _WAKE, 1, None)


def _has_futex() -> bool:
    """Return False if a sandbox refuses the call, so that a waiting end would not sleep."""
    word = ctypes.c_uint32(0)
    woken: int = _syscall(_FUTEX, ctypes.addressof(word), _WAKE, 1, None)
    return woken == 0


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_NAP = ctypes.byref(_Timespec(0, round(NAP_S * 1e9)))
_syscall = ctypes.CDLL(None).syscall
_syscall.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
_syscall.restype = ctypes.c_long
