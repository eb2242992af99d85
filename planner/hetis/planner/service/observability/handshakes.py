"""TLS handshakes that fail, with the peer and the reason, from the trace that gRPC's core writes on stderr.

The core refuses a peer before any Python code knows of it, and tells it nowhere else: not to interceptors, not in
statuses, not in channelz as far as Python has it. Its trace of handshakes has both. It goes into a pipe, with all else
that is written to the descriptor 2; a thread reads it, counts and logs failures, and passes on what is not the core's.
"""

from __future__ import annotations

import faulthandler
import fcntl
import logging
import os
import re
import resource
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO
from urllib.parse import unquote

FAILED: Counter[str] = Counter()
"""Failed handshakes of this process by reason."""
CLOSED = "CLOSED"  # by the peer: a probe of the port, or a client that does not trust the planner's certificate
# By what the core says. The order matters: an expired certificate could not be verified, either.
_REASONS = {
    "certificate has expired": ("EXPIRED", "the peer's certificate has expired: renew it there"),
    "CERTIFICATE_VERIFY_FAILED": (
        "UNKNOWN_AUTHORITY",
        "the peer's certificate is of no authority in tls.client_ca",
    ),
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": (
        "NO_CERTIFICATE",
        "the peer has no certificate, as tls.client_ca requires",
    ),
    "WRONG_VERSION_NUMBER": (
        "NOT_TLS",
        "the peer does not use TLS: give it the planner's authority",
    ),
    "HTTP_REQUEST": ("NOT_TLS", "the peer sent plain HTTP"),
    "Socket closed": (CLOSED, "the peer closed the connection"),
    "closed by peer": (CLOSED, "the peer closed the connection"),
}
_OWN = re.compile(rb"[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+:\d+\] ")
_ERROR = re.compile(rb"CallNextHandshakerLocked: error=(?!OK)(.*)")
_PEER = re.compile(rb"endpoint_peer_address=([^,}\s]+)")
_PIPE_BYTES = 2**20
_LEAST_DESCRIPTORS = 256
_LONGEST_REST_S = 1.0  # for the rest of the pipe at the end
_log = logging.getLogger("hetis.planner.handshakes")


@contextmanager
def watched_handshakes() -> Iterator[None]:
    """Watch this process's handshakes in the block, in which gRPC is imported: it reads its variables then.

    Does nothing if the operator has set gRPC's own variables, or where descriptors are too few for a planner anyway.
    """
    is_traced_already = not {"GRPC_VERBOSITY", "GRPC_TRACE"}.isdisjoint(os.environ)
    if is_traced_already or 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] < _LEAST_DESCRIPTORS:
        yield
        return
    os.environ |= {"GRPC_VERBOSITY": "INFO", "GRPC_TRACE": "handshaker"}
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    os.set_blocking(writing, False)  # lines are lost rather than that the core's threads wait
    stderr, own = os.dup(2), sys.stderr
    own.flush()
    os.dup2(writing, 2)
    os.close(writing)
    if own is sys.__stderr__:  # not what a test or a caller has put there
        sys.stderr = open(stderr, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    read = threading.Thread(target=_read, args=(os.fdopen(reading, "rb"), stderr), name="handshakes", daemon=True)
    read.start()
    faulthandler.enable(stderr)  # a process that aborts must say so past the pipe, which nobody reads then
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)  # the pipe has no writer any more, so the thread ends after what is in it
        sys.stderr = own
        for variable in ("GRPC_VERBOSITY", "GRPC_TRACE"):
            os.environ.pop(variable, None)
        read.join(_LONGEST_REST_S)


def _read(lines: BinaryIO, stderr: int) -> None:
    def pass_on(line: bytes) -> None:
        with suppress(OSError):  # a full disk, or a terminal that is gone: handshakes are counted all the same
            os.write(stderr, line)

    with lines:
        for peer, error in failures(lines, pass_on=pass_on):
            note(peer, error)


def failures(lines: Iterable[bytes], pass_on: Callable[[bytes], object]) -> Iterator[tuple[str, str]]:
    """Yield peer and error of each failed handshake; lines that are not the core's go to ``pass_on``."""
    error = b""
    is_own = False  # whether the last message was the core's, whose further lines follow without a head
    for line in lines:
        if _OWN.match(line):
            is_own, found = True, _ERROR.search(line)
            error = found[1] if found else b""
        elif is_own and (line.startswith((b"=== ", b"src/core/", b" shutdown=")) or line == b"\n"):
            pass
        else:
            is_own, error = False, b""
            pass_on(line)
            continue
        if error and (peer := _PEER.search(line)):
            yield unquote(peer[1].decode(errors="replace")), error.decode(errors="replace")
            error = b""


def note(peer: str, error: str) -> None:
    """Count a failed handshake, and log it unless the peer has only closed the connection, as probes do."""
    reason, meaning = next((found for part, found in _REASONS.items() if part in error), ("OTHER", error))
    FAILED[reason] += 1
    host = peer.partition(":")[2].rpartition(":")[0].strip("[]")
    level = logging.DEBUG if reason == CLOSED else logging.WARNING
    _log.log(level, "a TLS handshake failed", extra={"host": host, "reason": reason, "meaning": meaning})
