"""Where the planner listens: ``host:port``, and who can reach it there."""

from __future__ import annotations

import ipaddress
import socket


def split_address(address: str) -> tuple[str, int]:
    """Host, without the brackets of IPv6, and port.

    Raises:
        ValueError: not ``host:port`` with a port up to 65535.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{address!r} is not an address: write host:port with a port up to 65535, 0 for a free one")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{address!r} is not an address: put brackets around IPv6, like [::1]:8470")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable_from_elsewhere(address: str) -> str:
    """The address with this machine's name where it listens on all of the machine's addresses."""
    host, port = split_address(address)
    return join_address(socket.getfqdn(), port) if host in ("0.0.0.0", "::") else address


def is_socket_path(address: str) -> bool:
    """Whether it is a Unix socket, ``unix:/run/hetis/planner.sock``."""
    return address.startswith("unix:")


def is_local(address: str) -> bool:
    """Whether only this machine can connect: a loopback address, ``localhost``, or a Unix socket."""
    if is_socket_path(address):
        return True
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # another name may mean anything
