"""The command line of an attention worker.

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from hetis.runtime.worker.options import OptionError, WorkerOptions, read_options

EXIT_FAILED, EXIT_INVALID = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code."""
    try:
        options = read_options(arguments, os.environ)
    except OptionError as error:
        for message in error.messages:
            print(f"hetis worker: {message}", file=sys.stderr)
        return EXIT_INVALID
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    # torch's client of the store writes pages of stack into the log where an engine dies while it is spoken to.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    return _serve(options)


def _serve(options: WorkerOptions) -> int:
    import torch

    from hetis.runtime.attention.local import LocalDevice
    from hetis.runtime.kv.shape import KvShape
    from hetis.runtime.transport.connecting import Endpoint
    from hetis.runtime.transport.tcp import listen
    from hetis.runtime.worker.announcing import Announcer
    from hetis.runtime.worker.core import WorkerCore
    from hetis.runtime.worker.loop import WorkerLoop

    torch.set_num_threads(options.threads)
    name, device = options.name, options.device
    if device != "cpu" and not _is_there(device):
        print(f"hetis worker {name}: {device} is not there: torch finds {_cuda_count()} CUDA devices", file=sys.stderr)
        return EXIT_INVALID

    def make_device(shape: KvShape) -> LocalDevice:
        return LocalDevice(name, shape, options.kv_bytes // shape.page_bytes, device=device)

    host, port = options.listen
    key = secrets.token_bytes(16)
    try:
        listener = listen(host, port)
    except OSError as error:
        print(f"hetis worker {name}: cannot listen on {host}:{port}: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    port = listener.getsockname()[1]
    announcer = Announcer(name, options.store)

    def announce(served: int) -> None:
        announcer.say(Endpoint(host=options.advertise, port=port, key=key, served=served))

    logging.info("%s: listens on %s:%d", name, options.advertise, port)
    core = WorkerCore(name, make_device, key=key)
    WorkerLoop(core, listener, stall_s=options.timeout_s, device=device, announce=announce).run()
    return 0


def _is_there(device: str) -> bool:
    number = int(device.partition(":")[2] or 0)
    return number < _cuda_count()


def _cuda_count() -> int:
    import torch

    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
