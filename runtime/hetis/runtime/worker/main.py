"""The command line of an attention worker.

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options.
"""

from __future__ import annotations

import argparse
import logging
import re
import secrets
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    import torch

    from hetis.runtime.attention.local import LocalDevice
    from hetis.runtime.kv.shape import KvShape
    from hetis.runtime.transport.connecting import Endpoint, open_store, publish
    from hetis.runtime.transport.errors import ChannelError
    from hetis.runtime.transport.tcp import listen
    from hetis.runtime.worker.core import WorkerCore
    from hetis.runtime.worker.loop import WorkerLoop

    torch.set_num_threads(options.threads)
    name, device = options.name, options.device

    def make_device(shape: KvShape) -> LocalDevice:
        return LocalDevice(name, shape, options.kv_memory // shape.page_bytes, device=device)

    host, port = options.listen
    key = secrets.token_bytes(16)
    try:
        listener = listen(host, port)
        endpoint = Endpoint(host=options.advertise or host, port=listener.getsockname()[1], key=key)
        publish(open_store(options.store, is_master=False, timeout_s=options.timeout), name, endpoint)
    except (OSError, ChannelError) as error:
        print(f"hetis worker {name}: {error}", file=sys.stderr)
        return 1
    logging.info("%s: listens on %s:%d", name, endpoint.host, endpoint.port)
    WorkerLoop(WorkerCore(name, make_device, key=key), listener, stall_s=options.timeout, device=device).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hetis.runtime.worker", description=main.__doc__)
    parser.add_argument("--name", required=True, help="unique among the workers of the store")
    parser.add_argument("--store", required=True, metavar="HOST:PORT", help="TCPStore of torch, to say where it is")
    parser.add_argument("--kv-memory", required=True, type=_bytes, metavar="SIZE", help="for KV, such as 512MiB")
    parser.add_argument("--listen", default=("127.0.0.1", 0), type=_address, metavar="HOST:PORT", help="port 0: any")
    parser.add_argument("--advertise", default="", metavar="HOST", help="what others call this host")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", default=1, type=_at_least_one, help="of the CPU; default 1")
    parser.add_argument("--timeout", default=10.0, type=float, metavar="SECONDS", help="for a frame that has begun")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9.]+)\s*([KMG]i?B)?", text)
    try:
        size = int(float(found[1]) * _UNITS[found[2] or ""]) if found else 0
    except ValueError:
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size above 0, such as 512MiB")
    return size


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} must be HOST:PORT")
    return host.strip("[]"), int(port)


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number >= 1")
    return int(text)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
