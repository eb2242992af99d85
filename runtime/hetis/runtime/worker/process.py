"""A process that serves an engine, an attention worker or a stage: what all of them do around their core.

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

from hetis.runtime.transport.keys import KEY_BYTES
from hetis.runtime.worker.settings import OptionError, ProcessOptions
from hetis.solver.errors import HetisError

if TYPE_CHECKING:  # torch comes with them, and `--help` does not wait for that
    from hetis.runtime.transport.frames import Kind
    from hetis.runtime.worker.loop import Core

EXIT_FAILED, EXIT_INVALID = 1, 2
Options = TypeVar("Options", bound=ProcessOptions)
ReadOptions = Callable[[Sequence[str] | None, Mapping[str, str]], Options]


class StartError(HetisError):
    """The process cannot be what its options say; the message is why."""


def run_process(
    kind: str, arguments: Sequence[str] | None, read: ReadOptions[Options], serve: Callable[[Options], int]
) -> int:
    """Reads the settings and serves until SIGTERM or SIGINT; returns the exit code. ``kind`` is said before errors."""
    try:
        options = read(arguments, os.environ)
    except OptionError as error:
        for message in error.messages:
            print(f"hetis {kind}: {message}", file=sys.stderr)
        return EXIT_INVALID
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    # torch's client of the store writes pages of stack into the log where an engine dies while it is spoken to.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    return serve(options)


def serve_core(
    kind: str,
    options: ProcessOptions,
    make_core: Callable[[bytes], Core],
    *,
    greeting: Kind,
    key: bytes | None = None,
    port_file: Path | None = None,
) -> int:
    """Listens, says where, and serves engines until the process is ended; returns the exit code where it cannot.

    Args:
        kind: of process, said before errors.
        options: what every process is told.
        make_core: what it serves with, from the key that engines must say; may raise StartError.
        greeting: the frame that a connection begins with.
        key: that engines must say; None: one that is drawn now.
        port_file: where HOST:PORT is written once it listens, whole or not at all; it is removed in the end.
    """
    import torch

    from hetis.runtime.transport.connecting import Endpoint
    from hetis.runtime.transport.tcp import listen
    from hetis.runtime.worker.announcing import Announcer
    from hetis.runtime.worker.loop import WorkerLoop

    torch.set_num_threads(options.threads)
    name, key = options.name, key or secrets.token_bytes(KEY_BYTES)
    try:
        core = make_core(key)
        listener = listen(*options.listen)
    except StartError as error:
        print(f"hetis {kind} {name}: {error}", file=sys.stderr)
        return EXIT_INVALID
    except OSError as error:
        host, port = options.listen
        print(f"hetis {kind} {name}: cannot listen on {host}:{port}: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    host, port = options.advertise, listener.getsockname()[1]
    announcer = Announcer(name, options.store) if options.store else None

    def announce(served: int) -> None:
        if announcer is not None:
            announcer.say(Endpoint(host=host, port=port, key=key, served=served))

    logging.info("%s: listens on %s:%d", name, host, port)
    loop = WorkerLoop(core, listener, stall_s=options.timeout_s, announce=announce, greeting=greeting)
    try:
        if port_file is not None:
            _write_whole(port_file, f"[{host}]:{port}\n" if ":" in host else f"{host}:{port}\n")
    except OSError as error:
        print(f"hetis {kind} {name}: {port_file}: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED
    try:
        with torch.inference_mode():  # once, not for every frame
            loop.run()
    finally:
        if port_file is not None:
            port_file.unlink(missing_ok=True)
    return 0


def _write_whole(path: Path, text: str) -> None:
    """Writes a file so that nobody sees a part of it. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
