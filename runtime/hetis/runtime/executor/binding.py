"""The socket where an engine listens for its agent."""

from __future__ import annotations

import os
from pathlib import Path

import grpc


def bind_socket(server: grpc.aio.Server, socket: Path) -> None:
    """Listen on a new Unix socket that only this user may use. One left by an earlier run is replaced.

    Raises:
        OSError: it cannot be created.
    """
    if socket.is_socket():
        socket.unlink(missing_ok=True)
    elif socket.exists():
        raise OSError(f"cannot listen on unix:{socket}: it is there, and no socket")
    before = os.umask(0o177)
    try:
        bind(server, f"unix:{socket}")
    finally:
        os.umask(before)


def bind(server: grpc.aio.Server, address: str) -> int:
    """Listen on an address without TLS, and return the port.

    Raises:
        OSError: the address is taken, or not ours.
    """
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: {error}") from None
    if port == 0:
        raise OSError(f"cannot listen on {address}")
    return port
