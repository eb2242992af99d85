"""The command line of a stage process.

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

from hetis.runtime.stages.options import StageOptions, read_options
from hetis.runtime.worker.settings import OptionError

EXIT_FAILED, EXIT_INVALID = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Be the stage that an engine says, until SIGTERM or SIGINT; returns the exit code."""
    try:
        options = read_options(arguments, os.environ)
    except OptionError as error:
        for message in error.messages:
            print(f"hetis stage: {message}", file=sys.stderr)
        return EXIT_INVALID
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    # torch's client of the store writes pages of stack into the log where an engine dies while it is spoken to.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    return _serve(options)


def _serve(options: StageOptions) -> int:
    import torch

    from hetis.runtime.attention.device import AttentionDevice
    from hetis.runtime.kv.shape import KvShape
    from hetis.runtime.launch.compute import torch_devices
    from hetis.runtime.launch.errors import LayoutError
    from hetis.runtime.model.config import read_config
    from hetis.runtime.model.errors import ModelError
    from hetis.runtime.stages.core import StageCore
    from hetis.runtime.stages.setup import StageBuilder
    from hetis.runtime.transport.connecting import Endpoint, look_up, open_store
    from hetis.runtime.transport.frames import Kind
    from hetis.runtime.transport.tcp import listen
    from hetis.runtime.worker.announcing import Announcer
    from hetis.runtime.worker.joining import join
    from hetis.runtime.worker.loop import WorkerLoop

    torch.set_num_threads(options.threads)
    name, key = options.name, secrets.token_bytes(16)
    try:
        torch_devices(options.device, 1)  # at once, rather than when an engine comes
        read_config(options.model)
        listener = listen(*options.listen)
    except (LayoutError, ModelError) as error:
        print(f"hetis stage {name}: {error}", file=sys.stderr)
        return EXIT_INVALID
    except OSError as error:
        host, port = options.listen
        print(f"hetis stage {name}: cannot listen on {host}:{port}: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    host, port = options.advertise, listener.getsockname()[1]
    announcer = Announcer(name, options.store)

    def announce(served: int) -> None:
        announcer.say(Endpoint(host=host, port=port, key=key, served=served))

    def join_worker(worker: str, shape: KvShape, epoch: int) -> AttentionDevice:
        store = open_store("{}:{}".format(*options.store), is_master=False, timeout_s=options.timeout_s)
        where = look_up(store, worker, timeout_s=options.timeout_s)
        return join(worker, where, shape, epoch=epoch, timeout_s=options.timeout_s)

    logging.info("%s: listens on %s:%d", name, host, port)
    core = StageCore(name, StageBuilder(options.model, join_worker, compute=options.device), key=key)
    WorkerLoop(core, listener, stall_s=options.timeout_s, announce=announce, greeting=Kind.SETUP).run()
    return 0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
