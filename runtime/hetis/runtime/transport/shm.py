"""Bytes through memory that two processes of one host share: a ring each way, and a bell each way for who sleeps.

Whoever waits says that it sleeps, and is woken by a byte in a FIFO: half of what a wake-up by a socket costs. Where the
last wait was short it first looks again and again, giving the processor away in between. The TCP connection that the
memory was agreed on over stays: it tells at once when the other end dies, which memory and FIFOs do not.

Memory and FIFOs are files in /dev/shm that have no names any more once both ends have them, so that nothing is left of
processes that are killed later. (`multiprocessing.shared_memory` would keep the name, and its tracker would remove what
others use.)

Counters are published after what they count. On x86-64 stores are seen in their order; elsewhere this pipe is refused.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import select
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from hetis.runtime.transport.errors import ChannelClosedError, ChannelStalledError, FrameError
from hetis.runtime.transport.tcp import TcpPipe

FOLDER = Path("/dev/shm")
PREFIX = "hetis-"
RING_BYTES = 4 << 20
# A wake-up costs both ends together about so much of a processor: whoever looks for longer takes more than it saves.
LOOK_S = 30e-6
MOST_RINGS = 4096  # that are heard at once
SHORT_S = 1e-4  # after a wait of less, sleep included, looking may be of use
NAP_S = 0.02  # longest sleep without another look: a byte that was missed costs no more
# Counters of one ring, each in its own cache line, in units of 8 bytes.
WRITTEN, READ, READER_SLEEPS, WRITER_SLEEPS = 0, 8, 16, 24
RING_WORDS = 32
CONTROL_BYTES = 2 * RING_WORDS * 8


def is_supported() -> bool:
    """Whether processes of this host can talk so."""
    return platform.machine() in ("x86_64", "AMD64") and FOLDER.is_dir()


class SharedFile:
    """Memory for one connection, and a bell each way; the engine's end makes them, the worker's opens them.

    Attributes:
        memory: the rings and their counters.
        bells: FIFOs, read and written by both ends: the first wakes who made them.
    """

    def __init__(self, path: Path, memory: mmap.mmap, bells: tuple[int, int]) -> None:
        self.path, self.memory, self.bells = path, memory, bells

    @classmethod
    def create(cls, ring_bytes: int = RING_BYTES) -> SharedFile:
        """Raises OSError: there is no room for it, or this process may open no more files."""
        path, num_bytes = FOLDER / f"{PREFIX}{secrets.token_hex(16)}", CONTROL_BYTES + 2 * ring_bytes
        with ExitStack() as undo:
            undo.callback(_unlink, path)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                # Not only the size: a folder that is full when a page is first written ends the process by SIGBUS.
                os.posix_fallocate(handle, 0, num_bytes)
                memory = mmap.mmap(handle, num_bytes)
            finally:
                os.close(handle)
            for bell in _bell_paths(path):
                os.mkfifo(bell, 0o600)
            made = cls(path, memory, _open_bells(path))
            undo.pop_all()
        return made

    @classmethod
    def open(cls, path: Path) -> SharedFile:
        """Raises FrameError: the path is none that `create` chooses, or the files are not of this user or not there."""
        if path.parent != FOLDER or not path.name.startswith(PREFIX):
            raise FrameError(f"{path} is no shared memory of ours")
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                found = os.fstat(handle)
                if found.st_uid != os.geteuid() or found.st_size <= CONTROL_BYTES:
                    raise FrameError(f"{path}: it belongs to user {found.st_uid} and has {found.st_size} bytes")
                memory = mmap.mmap(handle, found.st_size)
            finally:
                os.close(handle)
            return cls(path, memory, _open_bells(path))
        except OSError as error:
            raise FrameError(f"{path}: {error.strerror}") from error
        except ValueError as error:
            raise FrameError(f"{str(path)!r}: {error}") from error

    def unlink(self) -> None:
        """Takes their names away, so that nothing is left when both ends have ended."""
        _unlink(self.path)

    def close(self) -> None:
        """The bells; the memory goes with who sees it."""
        self.unlink()
        bells, self.bells = self.bells, (-1, -1)
        for bell in bells:
            if bell >= 0:
                os.close(bell)


def _bell_paths(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}-{i}") for i in range(2)]


def _open_bells(path: Path) -> tuple[int, int]:
    """Raises OSError; FrameError: they are not FIFOs of this user."""
    with ExitStack() as undo:
        handles = []
        for bell in _bell_paths(path):
            handles.append(os.open(bell, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW))
            undo.callback(os.close, handles[-1])
            found = os.fstat(handles[-1])
            if found.st_uid != os.geteuid() or not stat.S_ISFIFO(found.st_mode):
                raise FrameError(f"{bell}: it belongs to user {found.st_uid} and has mode {found.st_mode:o}")
        undo.pop_all()
    return handles[0], handles[1]


def _unlink(path: Path) -> None:
    for one in (path, *_bell_paths(path)):
        one.unlink(missing_ok=True)


class ShmPipe:
    """One end. ``first`` is true at one of the two ends."""

    def __init__(self, shared: SharedFile, connection: TcpPipe, *, first: bool) -> None:
        self.name = f"shm over {connection.name}"
        self._connection = connection
        self._shared = shared
        # Plain views of the memory: for a few numbers and some thousand bytes numpy's arrays cost more than the copy.
        everything = memoryview(shared.memory)
        control = everything[:CONTROL_BYTES].cast("q")
        size = (len(everything) - CONTROL_BYTES) // 2
        rings = [
            _Ring(control[i * RING_WORDS : (i + 1) * RING_WORDS], everything[CONTROL_BYTES + i * size :][:size])
            for i in range(2)
        ]
        self._out, self._in = rings if first else rings[::-1]
        self._own_bell, self._other_bell = shared.bells if first else shared.bells[::-1]
        self._poll = select.poll()
        self._poll.register(self._own_bell, select.POLLIN)
        self._poll.register(connection.socket, select.POLLIN)
        self._looks = True

    def write(self, buffers: Sequence[memoryview], timeout_s: float) -> None:
        ring = self._out
        for buffer in buffers:
            left = buffer[ring.put(buffer) :]
            while left:
                self._publish()
                if not self._wait(ring.has_space, WRITER_SLEEPS, ring, timeout_s):
                    raise ChannelStalledError(f"{self.name}: the other end took nothing for too long")
                left = left[ring.put(left) :]
        self._publish()

    def read_into(self, buffer: memoryview, timeout_s: float) -> int:
        ring = self._in
        if not ring.has_bytes() and not self._wait(ring.has_bytes, READER_SLEEPS, ring, timeout_s):
            return 0
        came = ring.take(buffer)
        if ring.words[WRITER_SLEEPS]:
            self._ring()
        return came

    def close(self) -> None:
        self._shared.close()
        self._connection.close()

    def _publish(self) -> None:
        self._out.publish()
        if self._out.words[READER_SLEEPS]:
            self._ring()

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # it has been rung more often than anybody reads
            os.write(self._other_bell, b"\0")

    def _wait(self, is_there: Callable[[], bool], sleeps: int, ring: _Ring, timeout_s: float) -> bool:
        begun_s = now_s = time.monotonic()
        if self._looks:
            while now_s < begun_s + LOOK_S:
                if is_there():
                    return True
                os.sched_yield()
                now_s = time.monotonic()
        ring.words[sleeps] = 1
        try:
            while not is_there():
                left_s = begun_s + timeout_s - now_s
                if left_s <= 0:
                    return False
                for handle, _ in self._poll.poll(min(left_s, NAP_S) * 1000):
                    self._hear(handle, is_there)
                now_s = time.monotonic()
            return True
        finally:
            ring.words[sleeps] = 0
            self._looks = now_s - begun_s < SHORT_S

    def _hear(self, handle: int, is_there: Callable[[], bool]) -> None:
        """Takes the bytes that woke us; an end that is gone may have left something to read."""
        if handle == self._own_bell:
            os.read(handle, MOST_RINGS)
            return
        try:
            self._connection.read_into(memoryview(bytearray(1)), 0.0)
        except ChannelClosedError:
            if not is_there():
                raise


class _Ring:
    """Bytes one way. Counters only rise; the difference is what is in the ring."""

    def __init__(self, words: memoryview, room: memoryview) -> None:
        """``words`` are the counters, of 8 bytes each; ``room`` is of bytes."""
        self.words, self._room, self._size = words, room, len(room)
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
        return takes
