"""The command line of a stage process.

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

EXIT_FAILED, EXIT_INVALID = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Be the stage that an engine says, until SIGTERM or SIGINT; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    return _serve(options)


def _serve(options: argparse.Namespace) -> int:
    import torch

    from hetis.runtime.attention.device import AttentionDevice
    from hetis.runtime.kv.shape import KvShape
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
        read_config(options.model)
        listener = listen(*options.listen)
    except ModelError as error:
        print(f"hetis stage {name}: {error}", file=sys.stderr)
        return EXIT_INVALID
    except OSError as error:
        host, port = options.listen
        print(f"hetis stage {name}: cannot listen on {host}:{port}: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    host, port = options.advertise or options.listen[0], listener.getsockname()[1]
    announcer = Announcer(name, options.store)

    def announce(served: int) -> None:
        announcer.say(Endpoint(host=host, port=port, key=key, served=served))

    def join_worker(worker: str, shape: KvShape, epoch: int) -> AttentionDevice:
        store = open_store("{}:{}".format(*options.store), is_master=False, timeout_s=options.timeout)
        where = look_up(store, worker, timeout_s=options.timeout)
        return join(worker, where, shape, epoch=epoch, timeout_s=options.timeout)

    logging.info("%s: listens on %s:%d", name, host, port)
    core = StageCore(name, StageBuilder(options.model, join_worker), key=key)
    WorkerLoop(core, listener, stall_s=options.timeout, announce=announce, greeting=Kind.SETUP).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hetis.runtime.stages", description=main.__doc__)
    parser.add_argument("--name", required=True, help="unique among the processes of the store")
    parser.add_argument(
        "--store", required=True, type=_address, metavar="HOST:PORT", help="the engine's rendezvous, to say where it is"
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="folder of the model")
    parser.add_argument("--listen", default=("127.0.0.1", 0), type=_address, metavar="HOST:PORT", help="port 0: any")
    parser.add_argument("--advertise", default="", metavar="HOST", help="what the engine calls this host")
    parser.add_argument("--threads", default=1, type=_at_least_one, help="of the CPU; default 1")
    parser.add_argument("--timeout", default=30.0, type=float, metavar="SECONDS", help="for a frame that has begun")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} must be HOST:PORT")
    return host.strip("[]"), int(port)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number >= 1")
    return int(text)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
