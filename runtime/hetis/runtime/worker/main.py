"""The process of an attention worker, and its settings from options or environment variables, checked as a whole.

An option takes precedence over its variable. The variables serve those who start processes without a shell:
Kubernetes, Slurm, systemd. Exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables, and
130 for SIGINT before the options are read.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from hetis.commands.endpoints import joined, split_address
from hetis.formats.units import parse_bytes
from hetis.runtime.transport import keys
from hetis.solver.errors import HetisError

if TYPE_CHECKING:
    from hetis.runtime.worker.core import WorkerCore


LEVELS = ("debug", "info", "warning", "error")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_DEVICE = re.compile(r"cpu|cuda(:\d{1,3})?")
_LEVEL = re.compile("|".join(LEVELS))
_EXAMPLES = """examples:
  hetis-worker --name w1 --listen 127.0.0.1:7070 --kv-memory 2GiB --key-file /etc/hetis/worker.key
  hetis-worker --name gpu2/0 --listen 10.0.0.2:7070 --kv-memory 20GiB --device cuda:0 --key-file worker.key
  HETIS_WORKER_NAME=gpu2/0 HETIS_WORKER_KV_MEMORY=20GiB HETIS_WORKER_DEVICE=cuda HETIS_WORKER_LISTEN=10.0.0.2:7070 \\
      HETIS_WORKER_KEY=... hetis-worker

exit codes: 0 stopped by SIGTERM or SIGINT, 1 failed, 2 invalid options or variables
"""
# Every option with its metavar, meaning and default. None: it is required.
_OPTIONS: Mapping[str, tuple[str, str, str | None]] = {
    "--name": ("NAME", "what its engine calls it", None),
    "--listen": ("HOST:PORT", "port 0: any free one", "127.0.0.1:0"),
    "--threads": ("N", "of the CPU", "1"),
    "--timeout": ("SECONDS", "for a frame that has begun", "10"),
    "--log-level": ("LEVEL", ", ".join(LEVELS), "info"),
    "--kv-memory": ("SIZE", "for KV, such as 512MiB", None),
    "--device": ("DEVICE", "cpu, cuda or cuda:N", "cpu"),
    "--key-file": ("FILE", f"the key that engines must know, mode 0600; or the key itself in {keys.VARIABLE}", ""),
    "--port-file": ("FILE", "to write HOST:PORT to, once engines may come", ""),
}
VARIABLES: Mapping[str, str] = {one: f"HETIS_WORKER_{one[2:].replace('-', '_').upper()}" for one in _OPTIONS}
EXIT_FAILED, EXIT_INVALID = 1, 2


class WorkerOptionError(HetisError):
    """Options or variables are wrong. There is one message for each problem."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """The settings of one worker, each of them valid."""

    name: str
    listen: tuple[str, int]
    kv_bytes: int
    device: str
    threads: int
    timeout_s: float
    log_level: str
    key: bytes  # key that engines must present
    port_file: Path | None  # file to which HOST:PORT is written


class _Version(argparse.Action):
    """Prints the version of hetis, which should be that of vLLM's plugin."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"{parser.prog} {version('hetis')}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Return the command line of `hetis-worker`. `read_options` checks the values."""
    parser = argparse.ArgumentParser(
        prog="hetis-worker",
        description="Hold KV of some attention heads and compute attention over it, until SIGTERM or SIGINT.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for option, (metavar, meaning, default) in _OPTIONS.items():
        also = f"{VARIABLES[option]}; {default}" if default else VARIABLES[option]
        parser.add_argument(option, dest=option, metavar=metavar, help=f"{meaning} [{also}]")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    return parser


def read_options(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> WorkerOptions:
    """Return the settings that options and variables give together.

    Raises:
        WorkerOptionError: with everything that is missing or wrong.
        SystemExit: an unknown option, or ``--help``.
    """
    given = vars(make_parser().parse_args(arguments))
    wrong: list[str] = []

    def read(option: str, parse: Callable[[str], Any]) -> Any:
        """Return the parsed setting; None if it is wrong. ``parse`` raises ValueError with what follows its source."""
        variable, default = VARIABLES[option], _OPTIONS[option][-1]
        source, text = option, given[option]
        if text is None and environment.get(variable):
            source, text = variable, environment[variable]
        text = default if text is None else text
        if text is None:
            wrong.append(f"{option} is missing, and so is {variable}")
            return None
        try:
            return parse(text)
        except ValueError as error:
            wrong.append(f"{source}{error}")
            return None

    values = {
        "name": read("--name", _matching(_NAME, "must be 1 to 128 letters, digits and ._:/-")),
        "listen": read("--listen", _address),
        "kv_bytes": read("--kv-memory", _size),
        "device": read("--device", _matching(_DEVICE, "must be cpu, cuda or cuda:N")),
        "threads": read("--threads", _threads),
        "timeout_s": read("--timeout", _seconds),
        "log_level": (read("--log-level", _matching(_LEVEL, f"must be {', '.join(LEVELS)}")) or "").upper(),
        "port_file": read("--port-file", _path),
    }
    try:
        values["key"] = keys.read_key(read("--key-file", _path), environment)
        if values["key"] is None:
            wrong.append(f"--key-file is missing, and so is {keys.VARIABLE}")
    except keys.InvalidKeyError as error:
        wrong.append(str(error))
    if wrong:
        raise WorkerOptionError(*wrong)
    return WorkerOptions(**values)


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _matching(pattern: re.Pattern[str], wanted: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f" is {text!r}, {wanted}")
        return text

    return parse


def _address(text: str) -> tuple[str, int]:
    try:
        return split_address(text, least_port=0)
    except ValueError:
        raise ValueError(f" is {text!r}, must be HOST:PORT with a port >= 0 and <= 65535") from None


def _size(text: str) -> int:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ValueError(f": {error}") from None
    if size < 1:
        raise ValueError(f" is {text}, must be > 0")
    return size


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ValueError(f" is {text!r}, must be a whole number >= 1 and <= 1024")
    return int(text)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0.1 <= (value := float(text)) <= 10**6:  # false for NaN, too
            return value
    raise ValueError(f" is {text!r}, must be seconds >= 0.1 and <= 1000000")


class StartError(HetisError):
    """The process cannot run with its options. The message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve engines until SIGTERM or SIGINT, and return the exit code."""
    try:
        options = read_options(arguments, os.environ)
    except WorkerOptionError as error:
        for message in error.messages:
            print(f"hetis-worker: {message}", file=sys.stderr)
        return EXIT_INVALID
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    return _serve(options)


def _serve(options: WorkerOptions) -> int:
    import torch

    from hetis.runtime.transport.pipes import listen
    from hetis.runtime.worker.core import WorkerLoop

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
        # inference_mode once, not for every frame
        with listener, _address_in(options.port_file, joined(host, port)), torch.inference_mode():
            loop.run()
    except StartError as error:
        return _failed(options, str(error), EXIT_FAILED)
    return 0


@contextmanager
def _address_in(path: Path | None, address: str) -> Iterator[None]:
    """Hold the address in a file while the block runs, and remove it whatever ends it, even a signal meanwhile.

    Raises StartError where it cannot be written.
    """
    if path is None:
        yield
        return
    part, content = path.with_name(f".{path.name}.{os.getpid()}"), f"{address}\n".encode()
    try:
        try:
            part.write_bytes(content)
            part.replace(path)  # atomically
        except OSError as error:
            raise StartError(f"{path}: {error.strerror or error}") from None
        yield
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
            if path.is_file() and path.read_bytes() == content:  # unless another worker has replaced it
                path.unlink()


def _make_core(options: WorkerOptions) -> WorkerCore:
    """Return the core to serve with. Raises StartError."""
    from hetis.formats.units import format_bytes
    from hetis.runtime.attention.device import LocalDevice
    from hetis.runtime.attention.kv import KvShape, cuda_count, free_memory_bytes, use_cuda_device
    from hetis.runtime.worker.core import WorkerCore

    name, device = options.name, options.device

    def make_device(shape: KvShape) -> LocalDevice:
        made = LocalDevice(name, shape, options.kv_bytes // shape.page_bytes, device=device)
        made.warm()
        return made

    if device != "cpu" and not use_cuda_device(device):
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
    from hetis.runtime.attention.device import LocalDevice
    from hetis.runtime.attention.kv import KvShape
    from hetis.solver.backends.compiled import is_cached

    for dtype, kernel in (("float32", paged_compiled.attend), ("bfloat16", paged_compiled.attend_bfloat16)):
        if not is_cached(kernel):
            sizes = {"layers": 1, "head_dim": 16, "queries_per_group": 1, "page_tokens": 16}
            LocalDevice("none", KvShape(**sizes, dtype=dtype, scale=1.0, windows=(0,)), 1).warm()


def _failed(options: WorkerOptions, why: str, code: int) -> int:
    print(f"hetis-worker {options.name}: {why}", file=sys.stderr)
    return code


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)
