"""The process of an attention worker.

Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from hetis.runtime.worker.options import WorkerOptionError, WorkerOptions, read_options
from hetis.solver.errors import HetisError

if TYPE_CHECKING:  # torch comes with these, and `--help` must not wait for it
    from hetis.runtime.worker.core import WorkerCore

EXIT_FAILED, EXIT_INVALID = 1, 2


class StartError(HetisError):
    """The process cannot run as its options say. The message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve engines until SIGTERM or SIGINT, and return the exit code."""
    try:
        options = read_options(arguments, os.environ)
    except WorkerOptionError as error:
        for message in error.messages:
            print(f"hetis worker: {message}", file=sys.stderr)
        return EXIT_INVALID
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    return _serve(options)


def _serve(options: WorkerOptions) -> int:
    import torch

    from hetis.runtime.transport.tcp import listen
    from hetis.runtime.worker.loop import WorkerLoop

    torch.set_num_threads(options.threads)
    host, port = options.listen
    try:
        core = _make_core(options)
        listener = listen(host, port)
    except StartError as error:
        return _failed(options, str(error), EXIT_INVALID)
    except OSError as error:
        return _failed(options, f"cannot listen on {host}:{port}: {error.strerror or error}", EXIT_FAILED)
    port = listener.getsockname()[1]
    logging.info("%s: listens on %s:%d", options.name, host, port)
    loop = WorkerLoop(core, listener, stall_s=options.timeout_s)
    try:
        if options.port_file is not None:
            _write_whole(options.port_file, f"[{host}]:{port}\n" if ":" in host else f"{host}:{port}\n")
    except OSError as error:
        return _failed(options, f"{options.port_file}: {error.strerror or error}", EXIT_FAILED)
    try:
        with torch.inference_mode():  # once, not for every frame
            loop.run()
    finally:
        if options.port_file is not None:
            options.port_file.unlink(missing_ok=True)
    return 0


def _make_core(options: WorkerOptions) -> WorkerCore:
    """Return the core to serve with. Raises StartError."""
    from hetis.formats.units import format_bytes
    from hetis.runtime.attention.cuda import cuda_count
    from hetis.runtime.attention.local import LocalDevice
    from hetis.runtime.kv.memory import free_memory_bytes
    from hetis.runtime.kv.shape import KvShape
    from hetis.runtime.worker.core import WorkerCore

    name, device = options.name, options.device

    def make_device(shape: KvShape) -> LocalDevice:
        made = LocalDevice(name, shape, options.kv_bytes // shape.page_bytes, device=device)
        made.warm()
        return made

    if device != "cpu" and int(device.partition(":")[2] or 0) >= cuda_count():
        raise StartError(f"{device} is not there: torch finds {cuda_count()} CUDA devices")
    # Check now, not when pages are first written: the system would then kill the process.
    if options.kv_bytes > (free := free_memory_bytes(device)):
        raise StartError(f"--kv-memory is {format_bytes(options.kv_bytes)}, {device} has {free >> 20}MiB free")
    if device == "cpu" and find_spec("numba"):
        _compile_for_cpu()
    return WorkerCore(name, make_device, key=options.key)


def _compile_for_cpu() -> None:
    """Compile the kernels before engines may connect, once per machine: it can take a minute."""
    from hetis.runtime.attention import paged_compiled
    from hetis.runtime.attention.local import LocalDevice
    from hetis.runtime.kv.shape import KvShape
    from hetis.solver.compiled import is_cached

    kernels: dict[str, Callable[..., None]] = {
        "float32": paged_compiled.attend,
        "bfloat16": paged_compiled.attend_bfloat16,
    }
    for dtype, kernel in kernels.items():
        if not is_cached(kernel):
            sizes = {"layers": 1, "head_dim": 16, "queries_per_group": 1, "page_tokens": 16}
            LocalDevice("none", KvShape(**sizes, dtype=dtype, scale=1.0, windows=(0,)), 1).warm()


def _failed(options: WorkerOptions, why: str, code: int) -> int:
    print(f"hetis worker {options.name}: {why}", file=sys.stderr)
    return code


def _write_whole(path: Path, text: str) -> None:
    """Write a file atomically. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
