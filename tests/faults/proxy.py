"""A TCP proxy on loopback that freezes, delays and cuts its traffic like a faulty network."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType

_PIECE_BYTES = 1 << 16


class Proxy:
    """Passes bytes between callers and one address.

    While frozen it acknowledges and forwards nothing in either direction, so that no TCP timeout notices; new
    connections are accepted and stay silent. While cut it resets existing connections and refuses new ones.

    Attributes:
        address: where callers connect.
        num_asked: number of pieces sent by callers, which are the round trips of a request-response protocol.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._flows = threading.Event()
        self._flows.set()
        self._delay_s = 0.0
        self._last_words: bytes | None = None
        self._is_cut = False
        self.num_asked = 0
        self._is_closed = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listening.getsockname()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def freeze(self) -> None:
        """Stop all traffic from now on without notice."""
        self._flows.clear()

    @property
    def is_frozen(self) -> bool:
        return not self._flows.is_set()

    def thaw(self) -> None:
        """Deliver everything that was held back, in order."""
        self._flows.set()

    def freeze_at(self, words: bytes) -> None:
        """Freeze when a caller sends these bytes, which are held back as well."""
        self._last_words = words

    def delay(self, seconds: float) -> None:
        """Delay every piece by this much, each way."""
        self._delay_s = seconds

    def cut(self) -> None:
        """Reset every connection, and each new one at once, until `mend`."""
        self._is_cut = True
        self._reset()

    def mend(self) -> None:
        """Repair the network; connections that were cut stay gone."""
        self._is_cut, self._delay_s, self._last_words = False, 0.0, None
        self.thaw()

    def close(self) -> None:
        """Stop the proxy and all connections."""
        self._is_closed = True
        # A thread waiting in accept() is woken by shutdown(), but not by close().
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._reset()
        self._flows.set()

    def _reset(self) -> None:
        with self._lock:
            for one in self._sockets:
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    one.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                caller, _ = self._listening.accept()
            except OSError:
                return
            if self._is_cut:
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                caller.close()
                continue
            threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        self._flows.wait()
        try:
            callee = socket.create_connection(self._target)
        except OSError:
            caller.close()
            return
        both = {caller, callee}
        with self._lock:
            self._sockets |= both
        if self._is_cut or self._is_closed:
            self._reset()
        back = threading.Thread(target=self._pump, args=(callee, caller), daemon=True)
        back.start()
        self._pump(caller, callee, counts=True)
        back.join()
        with self._lock:
            self._sockets -= both
        for one in both:
            one.close()

    def _pump(self, source: socket.socket, sink: socket.socket, *, counts: bool = False) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(_PIECE_BYTES):
                if counts:
                    with self._lock:
                        self.num_asked += 1
                if self._last_words is not None and self._last_words in piece:
                    self.freeze()
                if self._delay_s:
                    time.sleep(self._delay_s)
                self._flows.wait()
                sink.sendall(piece)
        self._flows.wait()
        for end, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
            with contextlib.suppress(OSError):
                end.shutdown(how)
