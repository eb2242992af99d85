"""Addresses to listen on: ``host:port`` or a Unix socket."""

from __future__ import annotations

import socket

from hetis.formats import endpoints


def split_address(address: str) -> tuple[str, int]:
    """Return the host to listen on, without the brackets of IPv6, and the port; 0 asks for a free one.

    Raises:
        ValueError: not ``host:port`` with a port up to 65535.
    """
    try:
        host, port = endpoints.split_address(address, least_port=0)
    except ValueError:
        message = f"{address!r} is not an address: write host:port with a port up to 65535, 0 for a free one"
        raise ValueError(message) from None
    if ":" in host and not address.startswith(f"[{host}]:"):
        raise ValueError(f"{address!r} is not an address: put brackets around IPv6, like [::1]:8470")
    return host, port


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable_from_elsewhere(address: str) -> str:
    """Return the address, with this machine's name as the host if it listens on all interfaces."""
    host, port = split_address(address)
    return join_address(socket.getfqdn(), port) if host in ("0.0.0.0", "::") else address


def is_socket_path(address: str) -> bool:
    """Return whether the address is a Unix socket, ``unix:/run/hetis/planner.sock``."""
    return address.startswith("unix:")
